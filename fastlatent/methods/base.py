"""What a training method is: four things an engine calls, and three the trainer calls.

A method says what happens at a decode step (`decide`), what has to be remembered of it (`record_spec`), how an input is made
from what was remembered (`embed`), and what is learnt (`advantages`, `score`, `loss`). The defaults are token-only GRPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlatent import advantages
from fastlatent.registry import Family
from fastlatent.schema import ObjectiveConfig
from fastlatent.types import Batch, Capability, Group, Loss, Sampling, Scored

METHODS = Family("fastlatent.methods", "method")

RecordSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
State = dict[str, Tensor]
Record = dict[str, Tensor]


@dataclass(kw_only=True)
class MethodConfig:
    name: str = "grpo"
    """Which method: a member of fastlatent.methods or a dotted path to a Method class."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a method may know of the model it is attached to."""

    width: int
    vocab_size: int
    dtype: torch.dtype  # of the model's inputs
    embedding_is_frozen: bool
    initializer_range: float = 0.02


@dataclass(slots=True)
class StepView:
    """What the head returned for B rows at one decode step. `token_B` was drawn; `read_B` will be read (they differ only
    where an end is forced); `thinking_B` is True where the token is read while thinking."""

    token_B: Tensor
    read_B: Tensor
    logprob_B: Tensor
    log_kept_B: Tensor
    entropy_B: Tensor
    hidden_BD: Tensor
    thinking_B: Tensor
    seed: Tensor
    counter_B3: Tensor
    mixture_BD: Tensor | None = None
    ids_BK: Tensor | None = None
    weights_BK: Tensor | None = None
    logits_BV: Tensor | None = None


@dataclass(slots=True)
class Decision:
    """What the method makes of a step: whether the next input is latent, and what to remember where it is."""

    latent_B: Tensor
    record: Record
    token_B: Tensor | None = None  # the token to commit, where it is not the one drawn
    acted_B: Tensor | None = None  # False where the token is no action; None: every drawn token is
    restart_B: Tensor | None = None  # True where the sequence starts anew from this input
    latent_logprob_B: Tensor | None = None  # log-density of a latent action; None: it is deterministic


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Trainable parameters of a method whose names start with `prefix`, and how fast they learn."""

    prefix: str
    lr: float
    weight_decay: float


class Method(nn.Module):
    """Tokens only. Subclasses override what differs, in one file of this folder.

    `embedding` maps token ids [T] to the model's own input embeddings [T, D]; it belongs to the model, not to the method.
    """

    Config = MethodConfig
    needs: frozenset[Capability] = frozenset({Capability.TOKENS})

    def __init__(self, config: MethodConfig, model: ModelInfo, embedding: Callable[[Tensor], Tensor]):
        super().__init__()
        self.config, self.model = config, model
        self._embedding = (embedding,)  # in a tuple: nn.Module would adopt the model's table as a parameter of ours

    def embedding(self, token_ids_T: Tensor) -> Tensor:
        return self._embedding[0](token_ids_T)

    # ---- called by an engine: fixed shapes, no host synchronisation ----------------------------------------------------

    def record_spec(self, width: int, sampling: Sampling) -> RecordSpec:
        """Columns of one latent position: name -> (shape, dtype)."""
        return {}

    def start(self, num_slots: int, device: torch.device) -> State:
        """Per-row state, [slots, ...] each; changed in place by `decide`."""
        return {}

    def decide(self, view: StepView, state: State) -> Decision:
        return Decision(latent_B=torch.zeros_like(view.thinking_B), record={})

    def embed(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> Tensor:
        """Model inputs [T, D]; pure and differentiable, the only code that makes one.

        Record columns lie over all T rows (fixed shapes for graphs, one mask instead of an index) and are ignored where
        `latent_T` is False; `record_T` is None where no row is latent, as in a prompt.
        """
        return self.embedding(token_ids_T)

    # ---- called by the trainer ----------------------------------------------------------------------------------------

    def param_groups(self) -> list[ParamGroup]:
        """Every parameter of the method must match exactly one prefix."""
        return []

    def advantages(self, group: Group, objective: ObjectiveConfig) -> Tensor:
        """Advantage [G] of each rollout of a group, float32."""
        return advantages.of_group(group, objective)

    def score(self, policy, batch: Batch, temperature: float) -> Scored:
        """Log-probabilities and entropies of the scored tokens, differentiable."""
        return policy.score(batch, temperature)

    def loss(self, policy, batch: Batch, temperature: float, objective: ObjectiveConfig) -> Loss:
        """The loss of a microbatch: the surrogate on the log-probabilities of `score`, here fused with the head that makes them.

        A method that scores something else overrides both, this one with `objectives.surrogate(self.score(...), ...)`.
        """
        return policy.loss(batch, temperature, objective)

    @torch.no_grad()
    def statistics(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> dict[str, Tensor]:
        """Sums over latent positions for the log, by `latent/*` metric name: each a pair (sum, count) in one tensor [2]."""
        return {}
