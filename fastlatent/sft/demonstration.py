"""From a question, a written chain of thought and an answer to the completion to imitate: its chain as text, or compressed
into mixtures of tokens.

    chain   "7 + 5 = 12"             tokens_per_latent = 2
    read    [7 +] [_ 5] [= _] [1 2]  ####  _ 1 2  <end of turn>

A chain may be a list of texts, ["7 +", " 5 =", " ", "1", "2"]: no latent spans two of them. A mixture knows no order, and one
of a result's digits cannot be told from one of several results: say where it matters.

A demonstration is a Rollout that the data wrote instead of the policy, so that what packs and reads rollouts packs and reads
it, too: the mixtures of `Demonstrated` are its latent actions, everything else its token actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.errors import UserError
from fastlatent.methods.base import Method
from fastlatent.schema import Config, SftConfig
from fastlatent.types import LatentTrace, Prompt, Request, Rollout

TARGET_IDS, TARGET_WEIGHTS = "target_ids", "target_weights"
"""Columns of a demonstration's record beside the method's own: the mixture that is to be predicted, [N, K] each."""


@dataclass(frozen=True, slots=True)
class Demonstrated:
    """The tokens of a completion: latents first (or, as text, the chain), then the end of thinking and the answer."""

    mixtures: list[dict[int, float]]  # weight by token id, heaviest first; empty where the chain stays text
    chain_ids: list[int]  # the chain as text; empty where it is compressed
    answer_ids: list[int]  # end of thinking, answer and end of turn

    @property
    def token_ids(self) -> list[int]:
        """What the completion's text shows: of a mixture, its heaviest token."""
        return [next(iter(mixture)) for mixture in self.mixtures] + self.chain_ids + self.answer_ids


def compress(chain_ids: Sequence[int], tokens_per_latent: int, decay: float) -> Iterator[dict[int, float]]:
    """One mixture for each run of `tokens_per_latent` tokens, the last perhaps shorter: the token at place j of its run weighs
    decay**j, tokens that come again add up, and the weights sum to 1."""
    for start in range(0, len(chain_ids), tokens_per_latent):
        weights: dict[int, float] = {}
        for place, index in enumerate(chain_ids[start : start + tokens_per_latent]):
            weights[index] = weights.get(index, 0.0) + decay**place
        total = sum(weights.values())
        yield {index: w / total for index, w in sorted(weights.items(), key=lambda item: -item[1])}


class Demonstrator:
    """Writes demonstrations for one (configuration, tokenizer)."""

    def __init__(self, config: Config, tokenizer):
        self.config, self.sft, self.tokenizer = config, config.sft, tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.path: the tokenizer of {config.model.path} has no end-of-sequence token, which "
                            "answers need")
        thinking = config.thinking
        if self.sft.chain is None:
            self.end = ""
        else:  # latents end with the end itself: text before it, as in a forced end, would be read as tokens
            self.end = thinking.end if self.sft.tokens_per_latent else thinking.force or thinking.end

    def write(self, prompt: Prompt, source: str) -> Demonstrated:
        """The completion to imitate; UserError that begins with `source`, the row it came from, where there is none."""
        parts = _chain(prompt, self.sft, self.config.thinking.end, source)
        answer_ids = self._encode(self.end) + self._encode(self.sft.answer.replace("{answer}", prompt.answer))
        answer_ids.append(self.tokenizer.eos_token_id)
        if K := self.sft.tokens_per_latent:
            mixtures = [mixture for part in parts for mixture in compress(self._encode(part), K, self.sft.decay)]
            out = Demonstrated(mixtures, [], answer_ids)
        else:
            out = Demonstrated([], self._encode("".join(parts)), answer_ids)
        num_thinking, length = len(out.mixtures) + len(out.chain_ids), len(out.token_ids)
        for path, wanted, came in (("thinking.max_tokens", self.config.thinking.max_tokens, num_thinking),
                                   ("sampling.max_new_tokens", self.config.sampling.max_new_tokens, length)):
            if wanted is not None and came > wanted:
                raise UserError(f"{source}: its demonstration has {came} tokens, more than {path}={wanted}")
        return out

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _chain(prompt: Prompt, sft: SftConfig, end: str, source: str) -> list[str]:
    """The texts of the chain, none where the data has no chain; else UserError unless there are some, and the end of thinking
    is in none."""
    if sft.chain is None:
        return []
    where = f"{source}: column {sft.chain!r}"
    if sft.chain not in prompt.columns:
        raise UserError(f"{where}: wanted the chain of thought, and there is no such column; sft.chain=null imitates "
                        "answers alone")
    chain = prompt.columns[sft.chain]
    parts = chain if isinstance(chain, list) else [chain]
    if not all(isinstance(part, str) and part for part in parts) or not "".join(parts).strip():
        raise UserError(f"{where}: wanted the chain of thought, a text or a list of texts, got {chain!r}")
    if end in "".join(parts):
        raise UserError(f"{where} holds thinking.end={end!r}, which only the end of thinking may")
    return parts


# ---- as a rollout ---------------------------------------------------------------------------------------------------


def rollout_of(demonstrated: Demonstrated, prompt: Prompt, method: Method, config: Config, step: int) -> Rollout:
    """The demonstration as training step `step` reads it; the noise of its mixtures is a function of
    (config.seed, step, prompt, position), as a rollout's is."""
    token_ids = demonstrated.token_ids
    N, length = len(demonstrated.mixtures), len(token_ids)
    num_thinking = N + len(demonstrated.chain_ids)
    is_latent = [k < N for k in range(length)]
    trace = None
    if N:
        trace = LatentTrace(torch.arange(N, dtype=torch.int32), torch.zeros(N),
                            _record(demonstrated.mixtures, prompt, method, config, step))
    nothing = [0.0] * length  # nobody drew these tokens
    return Rollout(
        request=Request(prompt, step, 0), token_ids=token_ids, target_ids=token_ids, acted=[True] * length, latent=is_latent,
        thinking=[k < num_thinking for k in range(length)], logprobs=nothing, log_kept=nothing, entropy=nothing, trace=trace,
        finish="stop", forced_end=False, version=step, latent_acted=is_latent)


def _record(mixtures: Sequence[dict[int, float]], prompt: Prompt, method: Method, config: Config,
            step: int) -> dict[str, Tensor]:
    N, K = len(mixtures), config.sft.tokens_per_latent
    ids_NK, weights_NK = torch.zeros(N, K, dtype=torch.int64), torch.zeros(N, K)
    for row, mixture in enumerate(mixtures):
        ids_NK[row, : len(mixture)] = torch.tensor(list(mixture))
        weights_NK[row, : len(mixture)] = torch.tensor(list(mixture.values()))
    # position, prompt id, step * 2^16 + sample
    counter_N3 = torch.tensor([[position, prompt.id, step << 16] for position in range(N)])
    record = method.mixture_record(ids_NK, weights_NK, torch.tensor(config.seed), counter_N3, config.sft.noise)
    return record | {TARGET_IDS: ids_NK, TARGET_WEIGHTS: weights_NK}
