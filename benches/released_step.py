"""A training step of the released HRPO trainer (arXiv:2505.18454), re-created: its rollout loop, then trl's update, padded.

Its rollout is `benches/latent_loop.py`, which hands over the mixtures that were read; nothing is scored again before the
update, as it has one pass for each rollout (ratio 1) and the recipe no reference. The update is trl's
(`benches/trl_update.py`): one padded batch, prompts repeated for every sibling, and the recorded latents laid over it, gated
with the current weights.

Kinder to it than it was: pads are masked, the head, optimizer and kernels are those of trl and transformers today, and the loop
decodes with a copy of the weights in the compute dtype. The gate learns at the model's learning rate, which costs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from benches import setting
from benches.latent_loop import Drawn, LatentLoop
from benches.timing import wait_for_device
from benches.trl_update import TrlUpdate
from fastlatent import build
from fastlatent.policy import EmbeddingInDtype, model_info
from fastlatent.schema import Config
from fastlatent.types import Group, LatentTrace, Request, Rollout


class ReleasedStep:
    """`reward` makes groups of what a step's requests drew."""

    def __init__(self, config: Config, tokenizer, num_rows: int, folder: Path, reward: Callable[[list[Rollout]], list[Group]]):
        self.reward, self.rollout_s = reward, 0.0
        self.loop, self.latents = LatentLoop(config, tokenizer), LatentInputs(config)
        self.update = TrlUpdate(config, tokenizer, num_rows, folder, self.latents.attach)

    def __call__(self, requests: Sequence[Request], number: int) -> list[Group]:
        start = perf_counter()
        groups, drawn = self.draw(requests, number)
        wait_for_device()
        self.rollout_s = perf_counter() - start
        self.learn(groups, drawn)
        return groups

    def draw(self, requests: Sequence[Request], number: int) -> tuple[list[Group], Drawn]:
        """Every row as long as the recipe allows, under the newest weights."""
        self.loop.load_weights(dict(self.update.model.named_parameters()))
        drawn = self.loop.draw(requests, [], number)
        return self.reward(rollouts(requests, drawn)), drawn

    def learn(self, groups: Sequence[Group], drawn: Drawn) -> Tensor:
        """One update; the norm of its gradient."""
        self.update.read(groups)
        self.latents.read(drawn, num_prompt=self.update.inputs["prompt_ids"].shape[1])
        return self.update()


def rollouts(requests: Sequence[Request], drawn: Drawn) -> list[Rollout]:
    """What was drawn as an engine of ours would hand it over, but for the log-probabilities, which the loop does not keep."""
    out = []
    for row, request in enumerate(requests):
        token_ids, latent = drawn.token_ids_BC[row].tolist(), drawn.latent_BC[row]
        zeros, position_N = [0.0] * len(token_ids), latent.nonzero()[:, 0]
        trace = LatentTrace(position_N.int(), torch.zeros_like(position_N, dtype=torch.float32),
                            {"mixture": drawn.mixture_BCD[row, position_N]})
        out.append(Rollout(
            request=request, token_ids=token_ids, target_ids=token_ids, acted=[True] * len(token_ids), latent=latent.tolist(),
            thinking=latent.tolist(), logprobs=zeros, log_kept=zeros, entropy=zeros, trace=trace if len(position_N) else None,
            finish="length", forced_end=False, version=0))
    return out


class LatentInputs:
    """Makes a stock model read latents: the method's input instead of its own embedding of `input_ids`."""

    def __init__(self, config: Config):
        self.config = config

    def attach(self, model: nn.Module) -> None:
        """Make the method, drawn as `build.policy` draws it, a submodule of `model`, whose parameters are trained and
        clipped."""
        table, dtype = model.get_input_embeddings(), setting.dtype(self.config)
        torch.manual_seed(self.config.seed)
        method = build.method_of(self.config)
        rows = EmbeddingInDtype(Rows(table), dtype)
        model.method = method(self.config.method, model_info(model, self.config.model, dtype), rows)
        self.method = model.method
        table.register_forward_hook(self._input)

    def read(self, drawn: Drawn, num_prompt: int) -> None:
        """Lay the latents behind padded prompts of `num_prompt` tokens."""
        self.latent_BL = pad(drawn.latent_BC, (num_prompt, 0))
        self.mixture_BLD = pad(drawn.mixture_BCD, (0, 0, num_prompt, 0))

    def _input(self, table: nn.Module, args: tuple[Tensor], token_BLD: Tensor) -> Tensor:
        (token_ids_BL,) = args
        with torch.autocast(token_ids_BL.device.type, enabled=False):  # it is our own arithmetic, in its own dtypes
            record_T = {"mixture": self.mixture_BLD.flatten(0, 1)}
            input_TD = self.method.embed(token_ids_BL.flatten(), self.latent_BL.flatten(), record_T)
        return input_TD.unflatten(0, token_ids_BL.shape)


class Rows:
    """The rows of an embedding without what is hooked to it."""

    def __init__(self, table: nn.Embedding):
        self.table = table

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        return self.table.forward(token_ids_T)
