"""Other libraries' kernels beside ours, where they compute the same: the one table here that knows ops by name.

Before a rival is timed its result is held against the reference's. Ours do more in both comparisons: they give the
entropy, too, which no rival computes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


class Refused(Exception):
    """Why a variant is not timed in a case, in a sentence."""


@dataclass(frozen=True, slots=True)
class Rival:
    call: Callable[[], Tensor]  # the op's first output, differentiable in the same leaves
    options: dict[str, Any] = field(default_factory=dict)  # of the op, under which its first output is the same
    is_checked: bool = True  # False: it computes nothing of the op, and is there as a yardstick


def liger_token_logprob(inputs: Inputs) -> Rival:
    """The log-probability inside of liger's chunked losses; its backward pass makes the logits again, as ours does."""
    base = _import("liger_kernel.chunked_loss.fused_linear_ppo", "liger-kernel").LigerFusedLinearPPOBase

    def call() -> Tensor:
        hidden_A1D, target_A1 = inputs["hidden_AD"][:, None], inputs["target_A"][:, None]
        return base.chunk_forward(hidden_A1D, inputs["weight_VD"], target_A1, temperature=inputs["temperature"])[:, 0]

    return Rival(call)


def cut_token_logprob(inputs: Inputs) -> Rival:
    """cut-cross-entropy's loss of each row, which is minus its log-probability."""
    cut = _import("cut_cross_entropy", "cut-cross-entropy")
    if not inputs["hidden_AD"].is_cuda:
        raise Refused("cut-cross-entropy needs a GPU")

    def call() -> Tensor:
        hidden_AD = inputs["hidden_AD"] / inputs["temperature"]
        weight_VD = inputs["weight_VD"].to(hidden_AD.dtype)
        return -cut.linear_cross_entropy(hidden_AD, weight_VD, inputs["target_A"], reduction="none")

    return Rival(call)


def liger_policy_gradient(inputs: Inputs) -> Rival:
    """liger's chunked GRPO loss, each token a sequence of its own, 1024 of them to a chunk."""
    kind = _import("liger_kernel.chunked_loss.grpo_loss", "liger-kernel").LigerFusedLinearGRPOLoss
    if inputs["kl_estimator"] != "k3":
        raise Refused("liger has the k3 estimator only")
    loss = kind(beta=inputs["kl_coef"], epsilon_low=inputs["clip_low"], epsilon_high=inputs["clip_high"],
                loss_type="bnpo", temperature=inputs["temperature"], chunk_size=1024,
                use_ref_model=inputs["ref_logprob_A"] is not None)
    column = lambda name: None if inputs[name] is None else inputs[name][:, None]
    mask_A1 = (inputs["weight_A"] != 0).float()[:, None]

    def call() -> Tensor:
        mean = loss(inputs["hidden_AD"][:, None], inputs["weight_VD"], column("target_A"), mask_A1,
                    inputs["advantage_A"], ref_per_token_logps=column("ref_logprob_A"),
                    old_per_token_logps=column("old_logprob_A"))[0]
        return mean * inputs["weight_A"].sum()  # all weights but the zeros are equal

    return Rival(call, {"dual_clip": None, "entropy_coef": 0.0})


def bare_gemms(inputs: Inputs) -> Rival:
    """The three GEMMs of a head and its gradients, 1024 rows at a time, with nothing between them."""
    hidden_AD, weight_VD = inputs["hidden_AD"].detach(), inputs["weight_VD"].detach().to(inputs["hidden_AD"].dtype)

    def call() -> Tensor:
        grad_hidden_AD, grad_weight_VD = torch.empty_like(hidden_AD), torch.zeros_like(weight_VD)
        for start in range(0, len(hidden_AD), 1024):
            rows = slice(start, start + 1024)
            logits_RV = hidden_AD[rows] @ weight_VD.t()
            torch.mm(logits_RV, weight_VD, out=grad_hidden_AD[rows])
            grad_weight_VD.addmm_(logits_RV.t(), hidden_AD[rows])
        return grad_weight_VD

    return Rival(call, is_checked=False)


RIVALS: dict[str, dict[str, Callable[[Inputs], Rival]]] = {
    "token_logprob": {"liger-kernel": liger_token_logprob, "cut-cross-entropy": cut_token_logprob},
    "policy_gradient_head": {"liger-kernel": liger_policy_gradient, "three GEMMs": bare_gemms},
}


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # another module that is missing is a broken installation, and travels
        if error.name is None or not module.startswith(error.name):
            raise
        raise Refused(f"{package} is not installed") from None

