"""AdamW over named groups: the model's weights, and each of the method's with its own learning rate and decay."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from transformers import get_scheduler

from fastlatent.checkpoint import load_optimizer, optimizer_tensors
from fastlatent.errors import UserError
from fastlatent.policy import Policy
from fastlatent.schema import Config

NO_DECAY = ("bias", "norm")


class Optimizer:
    """AdamW, its schedule and the gradient clip. State is keyed by parameter name, so a checkpoint outlives code changes."""

    def __init__(self, policy: Policy, config: Config):
        self.parameters = policy.trainable()
        self.max_grad_norm = config.optim.max_grad_norm
        groups: dict[tuple[float, float], list[str]] = {}
        for name, (lr, decay) in ((n, _rates(n, policy, config)) for n in self.parameters):
            groups.setdefault((lr, decay), []).append(name)
        self.group_names = list(groups.values())
        self.names = [name for names in self.group_names for name in names]
        self.adamw = torch.optim.AdamW(
            [{"params": [self.parameters[n] for n in names], "lr": lr, "weight_decay": decay}
             for (lr, decay), names in groups.items()],
            betas=tuple(config.optim.betas), eps=config.optim.eps, fused=True)
        num_updates = config.num_steps * config.objective.num_epochs * config.objective.num_minibatches
        self.scheduler = get_scheduler(
            config.optim.schedule, self.adamw, num_warmup_steps=math.ceil(config.optim.warmup_ratio * num_updates),
            num_training_steps=num_updates)

    @property
    def lr(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def clip(self) -> Tensor:
        """Scale gradients to `max_grad_norm` and return the norm they had, on the device."""
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        return torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))

    def step(self, is_bad: Tensor) -> None:
        """Move the weights, or leave them where `is_bad` (a bool scalar) is true: decided on the device, without a sync."""
        # the fused kernel honours the attribute that torch.amp.GradScaler sets
        self.adamw.grad_scale, self.adamw.found_inf = None, is_bad.float()
        self.adamw.step()
        self.scheduler.step()
        self.zero_grad()

    def pass_over(self, num_updates: int) -> None:
        """Let the schedule go on past updates that had nothing to learn from: the rate is a function of the step alone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, where no update has been before the schedule's
            for _ in range(num_updates):
                self.scheduler.step()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Moments by parameter name, and the schedule's place."""
        tensors, steps = optimizer_tensors(self.adamw, self.names)
        schedule = {"last_epoch": self.scheduler.last_epoch, "lr": self.scheduler.get_last_lr()}
        return tensors, {"adamw": steps, "schedule": schedule}

    def load(self, tensors: dict[str, Tensor], state: dict) -> None:
        load_optimizer(self.adamw, self.names, tensors, state["adamw"])
        self.scheduler.last_epoch = state["schedule"]["last_epoch"]
        self.scheduler._last_lr = state["schedule"]["lr"]
        for group, lr in zip(self.adamw.param_groups, state["schedule"]["lr"], strict=True):
            group["lr"] = lr

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)


def _rates(name: str, policy: Policy, config: Config) -> tuple[float, float]:
    """Learning rate and weight decay of a parameter; the longest matching prefix of the method's groups wins."""
    if name.startswith("method."):
        inner = name.removeprefix("method.")
        matching = [g for g in policy.method.param_groups() if inner.startswith(g.prefix)]
        if not matching:
            raise UserError(f"method {policy.method.config.name!r}: {inner!r} has no learning rate; wanted a ParamGroup in its "
                            "param_groups() with the beginning of that name")
        group = max(matching, key=lambda g: len(g.prefix))
        return group.lr, group.weight_decay
    is_exempt = any(part in name.lower() for part in NO_DECAY)
    return config.optim.lr, 0.0 if is_exempt else config.optim.weight_decay
