"""Two methods as a user would write them, outside the package: continuous inputs that come of the last hidden state.

`Hidden` feeds the state itself back (Coconut, arXiv:2412.06769; SWITCH, arXiv:2606.13106): nothing is drawn there, and the
latents are no actions. `Gaussian` draws a vector around a projection of it (ATP-Latent, arXiv:2601.21598), which is the action.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastlatent_kernels import gaussian_reparam, token_logprob
from torch import Tensor, nn

from fastlatent import objectives
from fastlatent.methods.base import Decision, Method, MethodConfig, ModelInfo, ParamGroup, Record, RecordSpec, State, StepView
from fastlatent.schema import ObjectiveConfig
from fastlatent.types import Batch, Capability, Loss, Sampling, Scored


NAMES = ["feedback.Gaussian", "feedback.Hidden"]


class Blocks(Method):
    """Thinking starts with a block of latents, and every token whose id `opens_every` divides opens another."""

    needs = frozenset({Capability.HIDDEN})

    @dataclass(kw_only=True)
    class Config(MethodConfig):
        name: str = "feedback.Blocks"
        num_latents: int = 4
        """Latents in a block."""
        latent_id: int = 3
        """The token that stands for a latent in the completion."""
        opens_every: int = 8
        """Tokens whose ids this divides open a block."""

    def start(self, num_slots: int, device: torch.device) -> State:
        return {"left": torch.full((num_slots,), self.config.num_latents, device=device)}

    def draw(self, view: StepView, state: State) -> None:
        is_latent_B = view.thinking_B & (state["left"] > 0)
        view.token_B = torch.where(is_latent_B, self.config.latent_id, view.token_B)

    def in_block(self, view: StepView, state: State) -> Tensor:
        """Whether the next input is a latent, [B]; counts it."""
        is_latent_B = view.thinking_B & (state["left"] > 0)
        is_opened_B = ~is_latent_B & (view.token_B % self.config.opens_every == 0)
        state["left"].copy_(torch.where(is_opened_B, self.config.num_latents, state["left"] - is_latent_B.long()))
        return is_latent_B


class Hidden(Blocks):
    @dataclass(kw_only=True)
    class Config(Blocks.Config):
        name: str = "feedback.Hidden"

    def record_spec(self, width: int, sampling: Sampling) -> RecordSpec:
        return {"hidden": ((width,), self.model.dtype)}

    def decide(self, view: StepView, state: State) -> Decision:
        is_latent_B = self.in_block(view, state)
        return Decision(latent_B=is_latent_B, record={"hidden": view.hidden_BD}, acted_B=~is_latent_B)

    def embed(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> Tensor:
        token_TD = self.embedding(token_ids_T)
        return token_TD if record_T is None else torch.where(latent_T[:, None], record_T["hidden"], token_TD)


class Gaussian(Blocks):
    @dataclass(kw_only=True)
    class Config(Blocks.Config):
        name: str = "feedback.Gaussian"
        lr: float = 1e-5
        """Learning rate of the heads: small, as a density is a sum over all dimensions."""

    def __init__(self, config: Config, model: ModelInfo, embedding):
        super().__init__(config, model, embedding)
        self.mean, self.logvar = nn.Linear(model.width, model.width), nn.Linear(model.width, model.width)

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup("", self.config.lr, 0.0)]

    def record_spec(self, width: int, sampling: Sampling) -> RecordSpec:
        return {"z": ((width,), torch.float32)}

    def heads(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(hidden_ND.float()), self.logvar(hidden_ND.float())

    def decide(self, view: StepView, state: State) -> Decision:
        mean_BD, logvar_BD = self.heads(view.hidden_BD)
        noise = {"eps_TD": torch.zeros_like(mean_BD)} if view.sampling.greedy else {
            "seed": view.seed, "counter_T3": view.counter_B3}
        drawn = gaussian_reparam(mean_BD, logvar_BD, **noise)
        return Decision(latent_B=self.in_block(view, state), record={"z": drawn.z_TD}, latent_logprob_B=drawn.logprob_T)

    def embed(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> Tensor:
        token_TD = self.embedding(token_ids_T)
        return token_TD if record_T is None else torch.where(latent_T[:, None], record_T["z"].to(token_TD.dtype), token_TD)

    def score(self, policy, batch: Batch, temperature: float) -> Scored:
        return self.scored(policy.scored_hidden(batch), policy.head_weight, batch, temperature)

    def scored(self, hidden_AD: Tensor, head_VD: Tensor, batch: Batch, temperature: float) -> Scored:
        """Tokens by the language-model head, latents by the density of what was drawn."""
        logprob_A, entropy_A = token_logprob(hidden_AD, head_VD, batch.target_A, temperature)
        if batch.actions is None:
            return Scored(logprob_A, entropy_A)
        latent_N = batch.actions.latent_N
        density_N = gaussian_reparam(*self.heads(hidden_AD[latent_N]), z_TD=batch.actions.record_N["z"]).logprob_T
        return Scored(logprob_A.index_copy(0, latent_N, density_N), entropy_A)

    @torch.no_grad()
    def reference_logprob(self, policy, batch: Batch, temperature: float) -> Tensor:
        """The reference reads the same latents; those that are actions are priced by the heads of now."""
        hidden_AD = policy.reference_hidden(batch, self.embed(batch.token_ids_T, batch.latent_T, batch.record_T))
        return self.scored(hidden_AD, policy.reference_head_weight, batch, temperature).logprob_A

    def loss(self, policy, batch: Batch, temperature: float, objective: ObjectiveConfig) -> Loss:
        return objectives.surrogate(self.score(policy, batch, temperature), batch, objective)

    @torch.no_grad()
    def statistics(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> dict[str, Tensor]:
        """The mean square of a latent's elements, by a name of its own."""
        if record_T is None:
            return {}
        live_T = latent_T.float()
        return {"method/square": torch.stack([(record_T["z"].square().mean(dim=1) * live_T).sum(), live_T.sum()])}
