"""HRPO, hybrid reasoning policy optimisation (arXiv:2505.18454): while it thinks, the model's next input is the sampled token's
embedding gated with the vocabulary mixture the token was sampled from. The token stays an action; the mixture is a side input.

    mixture h = (sum_v p_v E_v) / ||p||_2                       p: the distribution sampled from
    r = sigmoid(W_r e + b_r)     i = sigmoid(W_i e + b_i)       e: embedding of the sampled token
    a = exp(-8 softplus(-Lambda) r)                              per channel
    input = a e + sqrt(1 - a^2) (i h)

Deviations from the released code: sqrt(-expm1(2 log a)) instead of sqrt(1 - a^2 + 1e-8), so that a = 1 is exactly GRPO
(`compat_eps=1e-8` restores theirs); pads are never attended; the log-probabilities are differentiated at the sampling
temperature unless `objective.score_temperature=1.0`, which is what was published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastlatent_kernels import hrpo_gate, soft_embedding
from fastlatent_kernels.hrpo_gate import gate_decay
from torch import Tensor, nn
from torch.nn.functional import linear

from fastlatent.errors import UserError
from fastlatent.methods.base import (
    METHODS, Decision, Method, MethodConfig, ModelInfo, ParamGroup, Record, RecordSpec, State, StepView)
from fastlatent.types import Capability, Sampling


@METHODS.register("hrpo")
class HRPO(Method):
    needs = frozenset({Capability.MIXTURE})

    @dataclass(kw_only=True)
    class Config(MethodConfig):
        name: str = "hrpo"
        r_min: float = 0.99
        """Least u of the initialiser, where a = u^r and r is about 0.5; nearer 1 starts nearer to plain token reasoning."""
        r_max: float = 0.999
        """Largest u of the initialiser."""
        compat_eps: float = 0.0
        """Added under the square root; the released code has 1e-8."""
        mixture: str = "behaviour"
        """behaviour: p is the distribution sampled from, after temperature and truncation."""
        lr_gate: float = 1e-4
        """Learning rate of W_r, b_r, W_i, b_i."""
        lr_lambda: float = 1e-3
        """Learning rate of Lambda, whose gradient is small: sigmoid(-Lambda) is about 1e-3 at the start."""
        weight_decay: float = 0.1
        """On the gate and on Lambda: decay pulls Lambda to 0, which makes a smaller and the inputs more latent over time."""

        def __post_init__(self):
            if self.mixture != "behaviour":
                raise UserError(f"method.mixture: {self.mixture!r} is not one of behaviour")
            if not 0 < self.r_min <= self.r_max < 1:
                raise UserError(f"method.r_min, method.r_max: wanted 0 < r_min <= r_max < 1, got {self.r_min}, {self.r_max}")

    def __init__(self, config: Config, model: ModelInfo, embedding):
        super().__init__(config, model, embedding)
        D = model.width
        # one [2D, D] matrix for W_r over W_i: one product at decode
        self.gate_weight = nn.Parameter(torch.empty(2 * D, D).normal_(std=model.initializer_range))
        self.gate_bias = nn.Parameter(torch.zeros(2 * D))
        u_D = torch.empty(D).uniform_(config.r_min, config.r_max)
        # exp(-8 softplus(-Lambda)) = u
        self.gate_lambda = nn.Parameter(-torch.log(u_D.pow(-1 / 8) - 1))

    def param_groups(self) -> list[ParamGroup]:
        c = self.config
        return [ParamGroup("gate_lambda", c.lr_lambda, c.weight_decay), ParamGroup("gate_", c.lr_gate, c.weight_decay)]

    def record_spec(self, width: int, sampling: Sampling) -> RecordSpec:
        # the mixture itself where E moves or p is dense; the K pairs it came from where they rebuild it exactly
        if sampling.is_truncated and self.model.embedding_is_frozen:
            return {"ids": ((sampling.top_k,), torch.int32), "weights": ((sampling.top_k,), torch.float32)}
        return {"mixture": ((width,), self.model.dtype)}

    def decide(self, view: StepView, state: State) -> Decision:
        if view.ids_BK is None:
            record = {"mixture": view.mixture_BD}
        elif self.model.embedding_is_frozen:
            record = {"ids": view.ids_BK.int(), "weights": view.weights_BK}
        else:
            record = {"mixture": soft_embedding(view.ids_BK, view.weights_BK, self.table())}
        return Decision(latent_B=view.thinking_B, record=record)

    def table(self) -> Tensor:
        return self._embedding[0].weight.detach()

    def mixture(self, record_T: Record) -> Tensor:
        """The recorded mixture [T, D], a constant of the update."""
        if "mixture" in record_T:
            return record_T["mixture"]
        return soft_embedding(record_T["ids"].long(), record_T["weights"], self.table().to(self.model.dtype))

    def embed(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> Tensor:
        token_TD = self.embedding(token_ids_T)
        if record_T is None:
            return token_TD
        mixture_TD = self.mixture(record_T)
        u_T2D = linear(token_TD.to(mixture_TD.dtype), self.gate_weight.to(mixture_TD.dtype))
        return hrpo_gate(u_T2D, token_TD, mixture_TD, self.gate_bias, self.gate_lambda, latent_T, self.config.compat_eps)

    @torch.no_grad()
    def statistics(self, token_ids_T: Tensor, latent_T: Tensor, record_T: Record | None) -> dict[str, Tensor]:
        if record_T is None:
            return {}
        token_TD, mixture_TD = self.embedding(token_ids_T).float(), self.mixture(record_T).float()
        D = self.model.width
        a_TD = gate_decay(linear(token_TD, self.gate_weight[:D].float()), self.gate_bias[:D], self.gate_lambda)
        live_T = latent_T.float()
        count = live_T.sum()

        def pair(value_T: Tensor) -> Tensor:
            return torch.stack([(value_T * live_T).sum(), count])

        return {
            "latent/gate_mean": pair(a_TD.mean(-1)),
            "latent/gate_std": pair(a_TD.std(-1)),
            "latent/gate_min": pair(a_TD.amin(-1)),
            "latent/norm_ratio": pair(mixture_TD.norm(dim=-1) / token_TD.norm(dim=-1).clamp_min(1e-12)),
        }
