"""What a run reads: its data and the prompts made of it. Whatever can be wrong with a configuration and its files is found
here, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastlatent import build
from fastlatent.data.base import Dataset, Example
from fastlatent.data.chat import make_prompt
from fastlatent.data.order import prompt_indices
from fastlatent.errors import UserError
from fastlatent.profiling import capture
from fastlatent.schema import Config
from fastlatent.types import Prompt


class Inputs:
    """The data of a run, its tokenizer and its prompts. UserError, one sentence, for what cannot work."""

    def __init__(self, config: Config, argv: Sequence[str] = ()):
        self.config = config
        build.check_engine(config)
        build.device_of(config)
        capture.check(config, argv)
        _check_budget(config)
        self.dataset = _dataset(config)
        self.tokenizer = build.tokenizer(config)
        build.check_model(config)
        self.warnings = build.check_method(config, self.tokenizer)

    def prompts(self, start: int) -> list[Prompt]:
        """`num_prompts` of the endless stream of training prompts, from place `start` on."""
        train, config = self.dataset.train, self.config
        return [self._prompt(train[i]) for i in prompt_indices(len(train), config.seed, start, config.num_prompts)]

    def each_prompt(self) -> Iterator[tuple[Prompt, str]]:
        """Every training prompt and where it was read; of a procedural dataset, which names no source, one stands for all."""
        train = self.dataset.train
        for example in train if train[0].source else [train[0]]:
            yield self._prompt(example), example.source or f"example {example.id}"

    def held_out(self) -> list[Prompt]:
        """The prompts of evaluation while training; none where there is none."""
        if not self.config.eval.every:
            return []
        held_out = self.dataset.held_out
        return [self._prompt(held_out[i]) for i in range(min(len(held_out), self.config.eval.num_prompts or len(held_out)))]

    def columns(self) -> set[str]:
        """The columns every training row carries, as its first row shows them."""
        return set(self.dataset.train[0].columns)

    def _prompt(self, example: Example) -> Prompt:
        return make_prompt(self.tokenizer, example, self.config.chat)


def _check_budget(config: Config) -> None:
    longest = config.chat.max_prompt_tokens + config.sampling.max_new_tokens
    if config.update.tokens_per_microbatch < longest:
        raise UserError(
            f"update.tokens_per_microbatch: wanted at least {longest}, the longest sequence (chat.max_prompt_tokens="
            f"{config.chat.max_prompt_tokens} and sampling.max_new_tokens={config.sampling.max_new_tokens}), got "
            f"{config.update.tokens_per_microbatch}")


def _dataset(config: Config) -> Dataset:
    dataset = build.dataset(config)
    if len(dataset.train) < config.num_prompts:
        raise UserError(f"data: {len(dataset.train)} training rows are fewer than num_prompts={config.num_prompts}")
    if config.eval.every and not len(dataset.held_out):
        raise UserError("eval.every: there is no held-out data; wanted data with a held-out part, or eval.every=0")
    return dataset
