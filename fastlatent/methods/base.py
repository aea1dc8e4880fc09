"""What a training method is: what an engine calls of it, and what the trainer calls.

A method says what is drawn at a decode step (`draw`) and what becomes of it (`decide`), what has to be remembered of it
(`record_spec`), how an input is made from what was remembered (`embed`), and what is learnt (`advantages`, `score`, `loss`).
The defaults are token-only GRPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlatent import advantages, schema
from fastlatent.errors import UserError
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
    hidden_BD: Tensor  # after the final norm
    thinking_B: Tensor
    seed: Tensor  # of the run, and with the next one the address of this step's noise: see `fastlatent_kernels.noise`
    counter_B3: Tensor  # int64, (index of the completion token being drawn, prompt id, step * 2^16 + sample)
    mixture_BD: Tensor | None = None
    ids_BK: Tensor | None = None
    weights_BK: Tensor | None = None
    logits_BV: Tensor | None = None
    sampling: Sampling = Sampling()  # how the token was drawn
    is_end_V: Tensor | None = None  # bool, tokens that hold the end of thinking by themselves
    drawn: Record | None = None  # what `Method.draw` leaves for `decide`


@dataclass(slots=True)
class Decision:
    """What the method makes of a step: whether the next input is latent, and what to remember where it is."""

    latent_B: Tensor
    record: Record
    acted_B: Tensor | None = None  # False where nothing was drawn by the policy; None: it always is
    # log-density of the latent, which is then the action where `latent_B`, instead of the token; None: tokens are the actions
    latent_logprob_B: Tensor | None = None


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

    def draw(self, view: StepView, state: State) -> None:
        """Replace what the head drew (`token_B`, `logprob_B`, `log_kept_B`) in place, before the thinking span sees it: a token
        that nobody reads must not end the thinking or the completion.

        `thinking_B` is True here where the token is drawn while thinking.
        """

    def decide(self, view: StepView, state: State) -> Decision:
        return Decision(latent_B=torch.zeros_like(view.thinking_B), record={})

    def embed(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> Tensor:
        """Model inputs [T, D]; pure and differentiable, the only code that makes one.

        Record columns lie over all T rows (fixed shapes for graphs, one mask instead of an index) and are ignored where
        `latent_T` is False; `record_T` is None where no row is latent, as in a prompt.
        """
        return self.embedding(token_ids_T)

    # ---- called by SFT ------------------------------------------------------------------------------------------------

    @classmethod
    def mixture_size(cls, config: MethodConfig) -> int:
        """Most tokens of a mixture that can be a latent of this method; 0: none can."""
        return 0

    def mixture_record(self, ids_NK: Tensor, weights_NK: Tensor, seed: Tensor, counter_N3: Tensor, noise: bool) -> Record:
        """The record of latents that are these mixtures, as `embed` reads them; `weights_NK` are at least 0 and sum to 1.

        With `noise` as they are read once drawn, where the policy predicts these weights; only where `mixture_size` is above 0.
        """
        raise NotImplementedError

    # ---- called by the trainer ----------------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: schema.Config, tokenizer) -> list[str]:
        """Sentences to warn the user with; UserError for what cannot work. Called before any model is loaded."""
        return []

    def param_groups(self) -> list[ParamGroup]:
        """Every parameter of the method must match a prefix; of several the longest counts."""
        return []

    def advantages(self, group: Group, objective: ObjectiveConfig) -> Tensor:
        """Advantage [G] of each rollout of a group, float32."""
        return advantages.of_group(group, objective)

    def action_advantages(self, group: Group) -> list[float | list[float]]:
        """What each rollout's actions are learnt with: one number for all of them, or one for each."""
        return group.advantage_G.tolist()

    def score(self, policy, batch: Batch, temperature: float) -> Scored:
        """Log-probabilities and entropies of the scored actions, differentiable; here of tokens, as in the next two."""
        return policy.score(self._of_tokens(batch), temperature)

    def reference_logprob(self, policy, batch: Batch, temperature: float) -> Tensor:
        """The same log-probabilities [A] under the frozen reference."""
        return policy.reference_logprob(self._of_tokens(batch), temperature)

    def loss(self, policy, batch: Batch, temperature: float, objective: ObjectiveConfig) -> Loss:
        """The loss of a microbatch: the surrogate on the log-probabilities of `score`, here fused with the head that makes
        them.

        A method that scores something else overrides all three, this one with `objectives.surrogate(self.score(...), ...)`.
        """
        return policy.loss(self._of_tokens(batch), temperature, objective)

    def _of_tokens(self, batch: Batch) -> Batch:
        """The batch; UserError where actions of it are latents, whose density only the method itself can tell."""
        if batch.actions is not None:
            raise UserError(f"method {self.config.name!r}: its latents are actions, with log-densities of their own; wanted "
                            "its own score and loss and, where objective.kl_coef is above 0, its own reference_logprob")
        return batch

    def group_statistics(self, group: Group) -> dict[str, Tensor]:
        """Sums over a group, once it has its advantages, in the form of `statistics`."""
        return {}

    @torch.no_grad()
    def statistics(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> dict[str, Tensor]:
        """Sums over latent positions for the log, each a pair (sum, count) in one tensor [2], by a `latent/*` name of
        `metrics.NAMES` or any `method/*`."""
        return {}
