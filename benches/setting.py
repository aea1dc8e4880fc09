"""What benchmarks start from: the quickstart recipes' configuration, prompts and engines, on the model asked for."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from fastlatent_kernels.overview import choices

from benches import results
from fastlatent import build
from fastlatent.cli import Parser
from fastlatent.config import load_config
from fastlatent.data.chat import make_prompt
from fastlatent.data.order import prompt_indices
from fastlatent.errors import UserError
from fastlatent.policy import compute_dtype
from fastlatent.rollout.base import RolloutEngine
from fastlatent.rollout.thinking import ThinkingSpan
from fastlatent.schema import AnswerConfig, Config, ThinkingConfig
from fastlatent.types import Prompt

RECIPES = {"discrete": "grpo_quickstart", "latent": "hrpo_quickstart"}


def parser(name: str, doc: str, rounds: int) -> Parser:
    """A parser with the arguments that every timed benchmark has."""
    out = Parser(prog=f"python -m benches.{name}", description=doc.splitlines()[0])
    out.add_argument("--model", metavar="PATH", help="model.path (default: the quickstart's)")
    out.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    out.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"rounds that count (default: {rounds})")
    results.add_out(out)
    return out


def apply(args: Namespace) -> None:
    """Check the shared arguments and set the number of threads."""
    for name in ("threads", "rounds", "batch", "length", "tokens_per_microbatch"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name}: wanted 1 or more, got {value}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def config(mode: str, model: str | None, *overrides: str) -> Config:
    """The quickstart recipe of `mode` (discrete or latent)."""
    return load_config(RECIPES[mode], overrides=[*([f"model.path={model}"] if model else []), *overrides])


def dtype(config: Config) -> torch.dtype:
    """What every side computes in."""
    return compute_dtype(config.model, build.device_of(config))


def facts(config: Config) -> dict[str, Any]:
    """What every line says about the model, and which backend each of our ops uses for it."""
    device, name = build.device_of(config).type, str(dtype(config)).removeprefix("torch.")
    backends = {choice.op: choice.backend for choice in choices() if (choice.device, choice.dtype) == (device, name)}
    return {"model": config.model.path, "dtype": name, "backends": backends}


def prompts(config: Config, tokenizer, count: int) -> list[Prompt]:
    """The first `count` prompts of the recipe's training stream."""
    train = build.dataset(config).train
    return [make_prompt(tokenizer, train[i], config.chat) for i in prompt_indices(len(train), config.seed, 0, count)]


def engine(config: Config, tokenizer) -> RolloutEngine:
    """The recipe's engine with its untrained weights; the policy they came from is not kept."""
    policy = build.policy(config)
    out = build.engine(config, policy, tokenizer)
    out.load_weights(policy.published(), 0)
    return out


def unforced_span(config: Config, tokenizer, vocab_size: int, stop_ids: list[int]) -> ThinkingSpan:
    """Rows end at `stop_ids` alone: the delimiter still ends the latents, but nothing is forced."""
    thinking = ThinkingConfig(end=config.thinking.end)
    return ThinkingSpan(tokenizer, vocab_size, stop_ids, thinking, AnswerConfig(), build.device_of(config))
