"""What a configuration must be beyond its types: ranges, choices, and options that need each other.

Here is what can be known from the configuration alone; what needs a tokenizer, a file or a GPU is checked where it is
used, and what only concerns one family member by that member.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from fastlatent.errors import UserError
from fastlatent.metrics import SPANS
from fastlatent.schema import Config

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
"""The transformers schedules that need only a number of steps; listed, as importing transformers takes long."""

CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.device": ("auto", "cpu", "cuda"),
    "model.attention": ("auto", "flash", "sdpa"),
    "objective.advantage": ("z_score", "mean_only", "leave_one_out"),
    "objective.normalizer": ("token_mean", "sequence_mean", "constant"),
    "objective.kl_estimator": ("k1", "k2", "k3"),
    "mismatch.correction": ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "optim.schedule": SCHEDULES,
    "log.live": ("auto", "plain", "quiet"),
    "profile.tool": ("torch", "nsys", "ncu", "none"),
    "resume": ("auto",),
}

AT_LEAST = {
    "seed": 0, "num_steps": 1, "num_prompts": 1, "group_size": 2,
    "model.lora.r": 1, "model.lora.alpha": 1, "chat.max_prompt_tokens": 1,
    "thinking.max_tokens": 1, "answer.max_tokens": 1, "sampling.max_new_tokens": 1,
    "objective.advantage_eps": 0, "objective.constant_length": 0, "objective.kl_coef": 0, "objective.num_epochs": 1,
    "objective.num_minibatches": 1, "objective.max_filter_rounds": 0,
    "sft.tokens_per_latent": 0, "sft.latent_weight": 0,
    "mismatch.ratio_max": 1, "mismatch.ratio_min": 0, "mismatch.probe_tokens": 0,
    "optim.lr": 0, "optim.weight_decay": 0, "optim.max_grad_norm": 0, "optim.warmup_ratio": 0,
    "update.tokens_per_microbatch": 1, "update.max_bad_steps": 1,
    "eval.every": 0, "eval.num_prompts": 0, "eval.num_samples": 0,
    "checkpoint.every": 0, "checkpoint.keep": 1, "log.samples": 0,
}

ABOVE = {
    "sampling.temperature": 0, "sampling.top_p": 0, "sft.decay": 0, "objective.score_temperature": 0, "objective.clip_low": 0,
    "objective.clip_high": 0, "objective.dual_clip": 1, "optim.eps": 0,
}

AT_MOST = {
    # step and sample share 32 bits of the noise counter; the last step numbers are the parity probe's and evaluation's
    "num_steps": 2**16 - 2, "group_size": 2**16, "eval.num_samples": 2**16, "seed": 2**63 - 1, "sampling.top_p": 1,
    "objective.clip_low": 1, "mismatch.ratio_min": 1, "sft.decay": 1, "optim.warmup_ratio": 1,
}


def validate(config: Config) -> None:
    """Raise UserError, one sentence that begins with the key, for the first thing that cannot work."""
    _check_finite(dataclasses.asdict(config), "")
    for path, known in CHOICES.items():
        _check_choice(path, _get(config, path), known)
    for path, least in AT_LEAST.items():
        _check(path, _get(config, path), f"at least {least}", lambda value, least=least: value >= least)
    for path, bound in ABOVE.items():
        _check(path, _get(config, path), f"more than {bound}", lambda value, bound=bound: value > bound)
    for path, most in AT_MOST.items():
        _check(path, _get(config, path), f"at most {most}", lambda value, most=most: value <= most)
    _check("recipe", config.recipe, "a name without slashes, for the run folder",
           lambda name: name.strip(". ") and not set(name) & set("/\\"))
    _check_sampling(config)
    _check_thinking(config)
    _check_objective(config)
    if config.sft is not None:
        _check("sft.answer", config.sft.answer, "a text that contains {answer}", lambda text: "{answer}" in text)
    _check_optim(config)
    _check_eval(config)
    _check_rewards(config)
    _check_profile(config)
    _check_model(config)
    if config.model.lora is not None:
        _check("model.lora.dropout", config.model.lora.dropout, "0 to below 1", lambda value: 0 <= value < 1)
        _check("model.lora.target_modules", config.model.lora.target_modules, "at least one name", bool)
    for index, tracker in enumerate(config.log.trackers):
        if "." not in tracker and ":" not in tracker:
            _check_choice(f"log.trackers.{index}", tracker, ("tensorboard",), "nor a dotted path to your own")


def _check_model(config: Config) -> None:
    model = config.model
    _check("model.gradient_checkpointing", model.gradient_checkpointing, "true, false or selective",
           lambda value: value in (True, False, "selective"))
    if model.gradient_checkpointing == "selective":
        # liger rotates queries and keys where they lie, by a kernel that torch does not see: what is stored would be rotated
        # twice
        for name, reason in (("compile", "cannot see into compiled blocks"),
                             ("liger", "stores what liger's kernels overwrite")):
            if getattr(model, name):
                raise UserError(f"model.gradient_checkpointing: selective {reason}; wanted true or false with "
                                f"model.{name}=true")


def _check_sampling(config: Config) -> None:
    s = config.sampling
    _check("sampling.top_k", s.top_k, "0 (no truncation) to 64", lambda value: 0 <= value <= 64)
    if s.top_p < 1 and not s.top_k:
        raise UserError(f"sampling.top_p: {s.top_p} needs sampling.top_k, 1 to 64, got 0")


def _check_thinking(config: Config) -> None:
    thinking, answer, most = config.thinking, config.answer, config.sampling.max_new_tokens
    _check("thinking.end", thinking.end, "a text of 1 to 254 bytes", lambda text: 1 <= len(text.encode()) <= 254)
    for path, texts in (("thinking.stop", thinking.stop), ("answer.stop", answer.stop)):
        _check(path, texts, "texts that are not empty", all)
    if thinking.force is not None and thinking.end not in thinking.force:
        raise UserError(
            f"thinking.force: wanted a text that contains thinking.end={thinking.end!r}, got {thinking.force!r}")
    if thinking.max_tokens is None:
        for name in ("force", "stop"):
            if getattr(thinking, name):
                raise UserError(f"thinking.{name}: needs thinking.max_tokens, without which no end is ever forced")
        return
    # the forced text is at least one token; its true length is the tokenizer's to tell
    least = thinking.max_tokens + 1 + (answer.max_tokens or 1)
    if most < least:
        raise UserError(
            f"sampling.max_new_tokens: wanted at least {least}, for thinking.max_tokens={thinking.max_tokens}, the "
            f"forced end and {answer.max_tokens or 1} tokens of answer, got {most}")


def _check_objective(config: Config) -> None:
    objective = config.objective
    if config.num_prompts % objective.num_minibatches:
        raise UserError(f"objective.num_minibatches: wanted a divisor of num_prompts={config.num_prompts}, "
                        f"got {objective.num_minibatches}")
    if objective.constant_length and objective.normalizer != "constant":
        raise UserError(f"objective.constant_length: needs objective.normalizer=constant, got {objective.normalizer}")


def _check_optim(config: Config) -> None:
    optim = config.optim
    for index, beta in enumerate(optim.betas):
        _check(f"optim.betas.{index}", beta, "0 to below 1", lambda value: 0 <= value < 1)
    if optim.warmup_ratio and optim.schedule == "constant":
        raise UserError("optim.warmup_ratio: optim.schedule=constant does not warm up; constant_with_warmup does")


def _check_eval(config: Config) -> None:
    if not config.eval.every:
        for name in ("num_samples", "ablations"):
            if getattr(config.eval, name):
                raise UserError(f"eval.{name}: needs eval.every, which is 0: nothing is evaluated")


def _check_rewards(config: Config) -> None:
    names = [reward.name for reward in config.rewards]
    if not any(reward.weight for reward in config.rewards):
        raise UserError("rewards: wanted at least one reward with a weight other than 0")
    for index, reward in enumerate(config.rewards):
        if reward.name in names[:index]:
            raise UserError(f"rewards.{index}.name: {reward.name!r} is listed twice")
        _check(f"rewards.{index}.timeout_s", reward.timeout_s, "more than 0", lambda value: value > 0)


def _check_profile(config: Config) -> None:
    profile = config.profile
    _check("profile.steps", profile.steps, "FIRST:LAST or one step", lambda steps: re.fullmatch(r"\d+(:\d+)?", steps, re.ASCII))
    if profile.steps is not None and profile.tool != "none":
        _check("profile.steps", profile.steps, f"FIRST:LAST within 1:{config.num_steps}, the steps of this run",
               lambda _: profile.window and 1 <= profile.window[0] and profile.window[-1] <= config.num_steps)
    for name in profile.spans:
        _check_choice("profile.ranges", name, tuple(SPANS))
    if profile.ranges and profile.steps is None:
        raise UserError("profile.ranges: needs profile.steps, without which nothing is recorded")


def _check(path: str, value: Any, wanted: str, is_ok) -> None:
    """An option that is null asks for nothing and is left alone."""
    if value is not None and not is_ok(value):
        raise UserError(f"{path}: wanted {wanted}, got {value!r}")


def _check_choice(path: str, value: str | None, known: Sequence[str], or_else: str = "") -> None:
    if value is None or value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{path}: {value!r} is not one of {', '.join(known)}{', ' if or_else else ''}{or_else}{hint}")


def _check_finite(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, below in value.items():
            _check_finite(below, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)):
        for index, below in enumerate(value):
            _check_finite(below, f"{path}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}: wanted a finite number, got {value}")


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name) if value is not None else None
    return value
