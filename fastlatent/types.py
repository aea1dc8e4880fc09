"""The data that flows, in the order it flows: Prompt -> Request -> Rollout -> Group -> Batch -> Scored -> Loss.

Shape suffixes used everywhere: B rows, T packed tokens, S sequences, N latent positions, G group, V vocabulary, D width,
K mixture, Z latent width, A scored (acted) tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor


class Capability(Enum):
    """What an engine can hand to `Method.decide` after the head; methods need some, engines offer some."""

    TOKENS = "TOKENS"  # token_B, logprob_B, log_kept_B, entropy_B
    MIXTURE = "MIXTURE"  # ids_BK and weights_BK where the policy is truncated to top-k, else mixture_BD
    HIDDEN = "HIDDEN"  # hidden_BD, after the final norm
    LOGITS = "LOGITS"  # logits_BV


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question. `id` is stable across epochs and names it to the noise; `columns` reach the reward functions."""

    id: int
    text: str
    token_ids: tuple[int, ...]
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw; its noise follows from (run seed, step, prompt id, sample) and nothing else."""

    prompt: Prompt
    step: int
    sample: int  # 0 .. G-1 within the group; the next G where a step has the same prompt again


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `greedy` takes the likeliest token; `temperature` still shapes the mixture a latent method
    reads (the published HRPO needs its training temperature even in greedy evaluation)."""

    temperature: float = 1.0
    top_k: int = 0  # 0: no truncation
    top_p: float = 1.0
    max_new_tokens: int = 1024
    greedy: bool = False

    @property
    def is_truncated(self) -> bool:
        return self.top_k > 0


@dataclass(slots=True)
class LatentTrace:
    """The N latent positions of one rollout: what `Method.embed` needs to read them again, with gradients."""

    position_N: Tensor  # int32, index into the completion
    logprob_N: Tensor  # float32 log-density of the latent when drawn; 0 where it is deterministic
    record: dict[str, Tensor]  # the columns of Method.record_spec, each [N, ...]


@dataclass(slots=True)
class Rollout:
    """One completion. Lists are host side; `trace` stays on the device that made it."""

    request: Request
    token_ids: list[int]  # what the model read
    target_ids: list[int]  # what the policy drew; differs only where an end was forced
    acted: list[bool]  # False where the policy drew nothing (forced, or inside a deterministic latent block)
    latent: list[bool]  # True where the input that reads this token is latent
    thinking: list[bool]  # True where the token was drawn while thinking
    # log softmax(logits / T) of the drawn token over the whole vocabulary, or a latent action's log-density; 0 where not acted
    logprobs: list[float]
    log_kept: list[float]  # log of the mass top-k/top-p kept; 0 without truncation
    entropy: list[float]  # entropy in nats of softmax(logits / T)
    trace: LatentTrace | None  # None where no position is latent
    finish: Literal["stop", "length"]
    forced_end: bool  # the end of thinking was written by the engine, not by the policy
    version: int  # of the weights that sampled it
    latent_acted: list[bool] = field(default_factory=list)  # True where the latent, not the token, was drawn; empty: nowhere

    @property
    def num_thinking(self) -> int:
        """Tokens the policy drew while thinking."""
        return sum(self.thinking)


@dataclass(slots=True)
class Group:
    """The G rollouts of one prompt, with what was thought of them."""

    rollouts: list[Rollout]
    reward_G: Tensor  # float64; NaN where no reward could be had
    rewards: dict[str, list[float | None]]  # each reward function's own values, for the log
    advantage_G: Tensor | None = None  # float32; 0 where masked


@dataclass(slots=True)
class Varlen:
    """Where the S packed segments lie among T tokens. A segment is a whole sequence, or one half of a shared-prompt layout:
    a prompt, or a completion whose tokens also attend to the prompt it names as its prefix."""

    cu_seqlens: Tensor  # int32 [S + 1], for varlen kernels
    max_seqlen: int
    unpack_SL: Tensor  # int64 [S, max_seqlen], packed index of each padded place; pads point at 0
    repack_T: Tensor  # int64 [T], place in the padded [S * max_seqlen] of each packed token
    prefix_SP: Tensor | None = None  # int64 [S, longest prefix], packed index of each prefix token; None: no prefixes
    mask_SLK: Tensor | None = None  # bool [S, max_seqlen, longest prefix + max_seqlen], what each token may attend to
    # for varlen kernels where there are prefixes: each segment's prefix, then its own tokens, back to back
    key_K: Tensor | None = None  # int64, packed index of each key
    cu_seqlens_k: Tensor | None = None  # int32 [S + 1]
    max_seqlen_k: int = 0

    def to(self, device: torch.device) -> Varlen:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Varlen(move(self.cu_seqlens), self.max_seqlen, move(self.unpack_SL), move(self.repack_T),
                      move(self.prefix_SP), move(self.mask_SLK), move(self.key_K), move(self.cu_seqlens_k), self.max_seqlen_k)


@dataclass(slots=True)
class LatentActions:
    """The N scored places of a Batch whose action is a latent, and the M whose action is a token: A = N + M."""

    latent_N: Tensor  # int64 into A
    token_M: Tensor  # int64 into A
    record_N: dict[str, Tensor]  # record columns of the latents, each [N, ...]


@dataclass(slots=True)
class Batch:
    """One microbatch: sequences packed into T tokens, of which A are scored.

    Place t holds the *input* at t. `score_A` indexes the positions whose hidden state predicts a scored token, and the
    other `*_A` fields belong to those tokens: every acted token of every completion, in packed order.
    """

    token_ids_T: Tensor  # int64
    position_T: Tensor  # int64, from 0 in each sequence
    latent_T: Tensor  # bool
    record_T: dict[str, Tensor] | None  # record columns laid over the packed tokens; garbage-free zeros elsewhere
    varlen: Varlen
    score_A: Tensor  # int64 into T; siblings that share a packed prompt share its last place
    sequence_A: Tensor  # int64, which completion of the batch each scored token belongs to; never descends
    target_A: Tensor  # int64
    behaviour_logprob_A: Tensor  # float32, `Rollout.logprobs` of the scored actions
    advantage_A: Tensor  # float32
    weight_A: Tensor  # float32, already divided by the step's global count
    old_logprob_A: Tensor | None = None  # None: on policy, ratio = exp(lp - stopgrad(lp))
    ref_logprob_A: Tensor | None = None
    actions: LatentActions | None = None  # None: every action is a token
    num_tokens: int = 0

    def to(self, device: torch.device) -> Batch:
        def move(value):
            if isinstance(value, Varlen):
                return value.to(device)
            if isinstance(value, LatentActions):
                return LatentActions(move(value.latent_N), move(value.token_M), move(value.record_N))
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**{name: move(getattr(self, name)) for name in self.__slots__})


@dataclass(slots=True)
class Scored:
    """What one differentiable pass over a Batch gives the objective."""

    logprob_A: Tensor  # float32, at objective.score_temperature
    entropy_A: Tensor  # float32
    aux: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Loss:
    """A scalar to differentiate and device sums to log; nobody calls `.item()` before the optimizer has stepped."""

    value: Tensor
    sums: dict[str, Tensor]
    logprob_A: Tensor  # of the scored tokens, as the loss saw them; detached
    statistics: dict[str, Tensor] = field(default_factory=dict)  # pairs (sum, count) by metric name
