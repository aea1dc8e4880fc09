"""How much of a GPU an update uses: the operations that its forward and backward passes need, over what the GPU could do.

The usual count (PaLM, arXiv:2204.02311, appendix B): two operations a weight and token forward, as many for the gradient of the
activations and, where the weight is trained, for its own; and the two products of attention, halved because it is causal. The
head counts for the tokens that are learnt from. Recomputed activations, the optimizer and the method's own operations count not
at all, and take their time; passes that only score are no part of the update, neither their operations nor their time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent.models import head_size
from fastlatent.types import Batch, Varlen

PEAK_FLOP_S = {
    "NVIDIA H100 80GB HBM3": 989e12,  # H100 data sheet, 2023: SXM; the PCIe and NVL cards are other ones
    "NVIDIA H200": 989e12,  # H200 data sheet, 2024: SXM
}
"""Dense bfloat16, which is half of what the vendor's data sheets say with sparsity, by the device's whole name."""


def peak_flop_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """What this device could do in this dtype; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return PEAK_FLOP_S.get(torch.cuda.get_device_name(device))  # a MIG slice has another name


def pair_flops(config) -> int:
    """Operations of training, all layers together, for one pair of a query and a key that it sees."""
    return 3 * 4 * config.num_hidden_layers * config.num_attention_heads * head_size(config)


def num_pairs(varlen: Varlen) -> Tensor:
    """Pairs of a query and a key that it sees in a packed batch, a float64 scalar on its device."""
    length_S = varlen.cu_seqlens.diff().double()
    pairs = (length_S * (length_S + 1) / 2).sum()
    if varlen.cu_seqlens_k is not None:
        pairs = pairs + (length_S * (varlen.cu_seqlens_k.diff() - length_S)).sum()
    return pairs


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations of training on one token read, one scored, and one pair of a query and a key."""

    token: int
    scored: int
    pair: int

    @classmethod
    def of(cls, base) -> Cost | None:
        """`base` is the transformers model, its adapters in place; None for a mixture of experts, not all of which are used."""
        if getattr(base.config, "num_experts_per_tok", None):
            return None
        head, tables = base.lm_head.weight, {base.get_input_embeddings().weight, base.lm_head.weight}
        token, scored = (sum((6 if p.requires_grad else 4) * p.numel() for p in parameters)
                         for parameters in ([p for p in base.parameters() if p not in tables], [head]))
        return cls(token, scored, pair_flops(base.config))

    def flops(self, batch: Batch) -> Tensor:
        """Of a forward and backward pass, a float64 scalar on the batch's device."""
        return self.pair * num_pairs(batch.varlen) + (self.token * batch.num_tokens + self.scored * len(batch.score_A))
