"""SofT-GRPO (arXiv:2511.06411), the ancestor of Latent-GRPO, as a preset of its code: two-sided noise on the five likeliest
tokens of the nucleus, renormalised, in nearly one-hot mixtures, under plain GRPO.

It needs no latent SFT: an input that is nearly one token's is one that a text model can read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from fastlatent.methods.base import METHODS
from fastlatent.methods.latent_grpo import LatentGRPO


@METHODS.register("soft_grpo")
class SoftGRPO(LatentGRPO):
    @dataclass(kw_only=True)
    class Config(LatentGRPO.Config):
        name: str = "soft_grpo"
        top_k: int = 5
        """Tokens in a mixture, 1 to 64."""
        candidates: str = "renormalised"
        """union: the nucleus and the top_k likeliest. renormalised: the top_k inside the nucleus, renormalised."""
        one_sided: bool = False
        """Shift the clipped noise up until it is never negative, as Latent-GRPO does."""
        mixture_temperature: float = 0.1
        """tau: the weights are softmax(score / tau); at 0.1 they are nearly one-hot."""
        clamp_density: bool = True
        """Clamp score - log p into the noise's interval before its density is taken."""
        logprob_floor: Optional[float] = -3.0
        """Leave tokens out of the density whose log p is not above this; null: none."""
        truncated: str = "kept"
        """Completions cut by their length limit: kept, masked or excluded."""
        bound_negative: bool = False
        """Latent-GRPO's bound on slopes where d < 0 and the advantage is not positive."""
        select_first: bool = False
        """Latent-GRPO's selection of one first mixture a group."""

    needs_latent_init = False
