"""trl's GRPO update on completions that are already there: its own trainer's loss, backward, clip and optimizer step.

GRPOTrainer is built as a user would build it, from a configuration with our recipe's numbers; then, instead of
train(), which would draw completions of its own, `compute_loss` and what transformers' Trainer does around it are
called on the tensors given. Gradient checkpointing, on by default in trl, is off as in the recipe. On a CPU trl 1.16
sends every position through the vocabulary head, prompts and pads too; that is its own choice and stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer

from benches import setting
from fastlatent import build, models
from fastlatent.schema import Config
from fastlatent.types import Group, Rollout


class TrlUpdate:
    """Call it to make one update from what it has read; it returns the norm of the gradient before clipping, as a tensor."""

    def __init__(self, config: Config, tokenizer, num_rows: int, folder: Path,
                 change: Callable[[nn.Module], None] = lambda model: None):
        """`change` is given the model before anything else sees it."""
        device = build.device_of(config)
        model = models.load_causal_lm(models.resolve_model(config.model.path), torch.float32)
        change(model)
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # it explains at length which device it found
        dataset = Dataset.from_list([{"prompt": "none"}] * num_rows)  # never read: train() is not called
        self.trainer = trainer = GRPOTrainer(
            model, reward_funcs=_no_reward, args=_arguments(config, num_rows, device, folder),
            train_dataset=dataset, processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = 1  # what train() would set; the whole batch is one pass
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.model.train()
        self.device, self.pad_id = device, tokenizer.pad_token_id

    def read(self, groups: Sequence[Group]) -> None:
        """Take as many completions as there are rows for the updates to come."""
        advantage_B = torch.cat([group.advantage_G for group in groups])
        tensors = padded([r for group in groups for r in group.rollouts], advantage_B, self.pad_id)
        self.inputs = {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def __call__(self) -> Tensor:
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(self.model, self.inputs)
        trainer.accelerator.backward(loss)
        norm = trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return norm


def padded(rollouts: Sequence[Rollout], advantage_B: Tensor, pad_id: int) -> dict[str, Tensor]:
    """The tensors GRPOTrainer makes of rollouts, [B, ...] each: prompts padded on the left, completions on the right.

    `tool_mask` is trl's own way to name completion tokens that the model reads and the policy did not draw.
    """
    prompts = [list(r.request.prompt.token_ids) for r in rollouts]
    acted_BC = _pad([[int(a) for a in r.acted] for r in rollouts], 0, left=False)
    return {
        "prompt_ids": _pad(prompts, pad_id, left=True),
        "prompt_mask": _pad([[1] * len(p) for p in prompts], 0, left=True),
        "completion_ids": _pad([r.token_ids for r in rollouts], pad_id, left=False),
        "completion_mask": _pad([[1] * len(r.token_ids) for r in rollouts], 0, left=False),
        "tool_mask": acted_BC,
        "advantages": advantage_B,
        "num_items_in_batch": acted_BC.sum(),
    }


def _arguments(config: Config, num_rows: int, device: torch.device, folder: Path) -> GRPOConfig:
    objective, optim = config.objective, config.optim
    return GRPOConfig(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu", seed=config.seed,
        per_device_train_batch_size=num_rows, gradient_accumulation_steps=1, num_generations=config.group_size,
        max_completion_length=config.sampling.max_new_tokens, temperature=config.sampling.temperature,
        loss_type="dapo",  # trl's name for normalizer=token_mean
        beta=objective.kl_coef, epsilon=objective.clip_low, epsilon_high=objective.clip_high,
        optim="adamw_torch_fused", learning_rate=optim.lr, lr_scheduler_type=optim.schedule, adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1], adam_epsilon=optim.eps, weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        gradient_checkpointing=config.model.gradient_checkpointing,
        bf16=setting.dtype(config) == torch.bfloat16)


def _no_reward(completions, **_) -> list[float]:
    return [0.0] * len(completions)


def _pad(rows: Sequence[list[int]], fill: int, *, left: bool) -> Tensor:
    longest = max(map(len, rows))
    fills = [[fill] * (longest - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for pad, row in zip(fills, rows, strict=True)])
