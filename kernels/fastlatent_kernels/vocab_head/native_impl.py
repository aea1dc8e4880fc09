"""vocab_head on a CPU: torch's GEMM, then one pass over each row of its logits in C++, in their own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlatent_kernels._C as _C
from fastlatent_kernels.native import LIBRARY, row_arguments, row_outputs, row_scratch, why_not_cpu
from fastlatent_kernels.vocab_head import VocabHead, vocab_head

LIBRARY.define("vocab_rows(Tensor logits, float temperature, Tensor seed, Tensor counter, bool greedy, ScalarType? unit_p_dtype, "
               "str isa='') -> (Tensor, Tensor, Tensor, Tensor)")


def _rows(logits_BV, temperature, seed, counter_B3, greedy, unit_p_dtype, isa=""):
    """token, logprob, entropy, and p / ||p||_2 [B, V] in `unit_p_dtype`, [B, 0] where that is None."""
    logits_BV, counter_B3 = logits_BV.contiguous(), counter_B3.contiguous()
    out, unit_p = row_outputs(logits_BV), _empty_unit_p(logits_BV, unit_p_dtype)
    scratch = row_scratch(logits_BV)
    _C.vocab_head(*row_arguments(logits_BV, temperature, seed, counter_B3, greedy, *out, scratch),
                  unit_p.data_ptr() if unit_p_dtype is not None else 0, unit_p_dtype == torch.bfloat16, isa)
    return *out, unit_p


def _empty_unit_p(logits_BV: Tensor, dtype: torch.dtype | None) -> Tensor:
    num_rows, vocab_size = logits_BV.shape
    return torch.empty(num_rows, 0 if dtype is None else vocab_size, dtype=dtype, device=logits_BV.device)


LIBRARY.impl("vocab_rows", _rows, "CPU")


@torch.library.register_fake("fastlatent::vocab_rows", lib=LIBRARY)
def _fake_rows(logits_BV, temperature, seed, counter_B3, greedy, unit_p_dtype, isa=""):
    return *row_outputs(logits_BV), _empty_unit_p(logits_BV, unit_p_dtype)


def _supports(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD) -> str | None:
    return why_not_cpu(hidden_BD) if embed_VD is None else why_not_cpu(hidden_BD, embed_VD)


@vocab_head.backend("native", supports=_supports)
@torch.no_grad()
def _run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    logits_BV = hidden_BD @ weight_VD.to(hidden_BD.dtype).t()
    unit_p_dtype = None if embed_VD is None else embed_VD.dtype
    token_B, logprob_B, entropy_B, unit_p_BV = torch.ops.fastlatent.vocab_rows(
        logits_BV, temperature, seed, counter_B3, greedy, unit_p_dtype)
    return VocabHead(token_B, logprob_B, entropy_B, None if embed_VD is None else unit_p_BV @ embed_VD)
