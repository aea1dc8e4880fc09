"""vocab_head on a CPU: torch's GEMM, then one pass over each row of its logits in C++, in their own dtype; all of it in
one stream over the vocabulary (native_bf16.py) where the processor multiplies bfloat16 itself."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlatent_kernels._C as _C
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.native import empty_rows, run_rows, why_not_cpu
from fastlatent_kernels.token_logprob import head_logits
from fastlatent_kernels.vocab_head import VocabHead, native_bf16, vocab_head

LIBRARY.define("vocab_rows(Tensor logits, float temperature, Tensor seed, Tensor counter, bool greedy, "
               "ScalarType? unit_p_dtype, str isa='') -> (Tensor, Tensor, Tensor, Tensor)")


def _rows(logits_BV, temperature, seed, counter_B3, greedy, unit_p_dtype, isa=""):
    """token, logprob, entropy, and p / ||p||_2 [B, V] in `unit_p_dtype`, [B, 0] where that is None."""
    token_B, logprob_B, entropy_B, unit_p = out = _empty_outputs(logits_BV, unit_p_dtype)
    mixture = {} if unit_p_dtype is None else {"unit_p": unit_p, "unit_p_bf16": unit_p_dtype == torch.bfloat16}
    run_rows(_C.vocab_head, _C.VocabHead(), isa, logits=logits_BV, temperature=temperature, counter=counter_B3,
             seed=seed, greedy=greedy, token=token_B, logprob=logprob_B, entropy=entropy_B, **mixture)
    return out


def _empty_outputs(logits_BV: Tensor, unit_p_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, vocab_size = logits_BV.shape
    num_columns = 0 if unit_p_dtype is None else vocab_size
    return *empty_rows(logits_BV), torch.empty(num_rows, num_columns, dtype=unit_p_dtype, device=logits_BV.device)


LIBRARY.impl("vocab_rows", _rows, "CPU")


@torch.library.register_fake("fastlatent::vocab_rows", lib=LIBRARY)
def _fake_rows(logits_BV, temperature, seed, counter_B3, greedy, unit_p_dtype, isa=""):
    return _empty_outputs(logits_BV, unit_p_dtype)


def _supports(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD) -> str | None:
    return why_not_cpu(hidden_BD) if embed_VD is None else why_not_cpu(hidden_BD, embed_VD)


@vocab_head.backend("native", supports=_supports)
@torch.no_grad()
def _run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    if native_bf16.takes(hidden_BD, weight_VD, embed_VD):
        return native_bf16.run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD)
    if weight_VD.is_mkldnn:
        logits_BV = head_logits(hidden_BD, weight_VD)
    else:
        logits_BV = hidden_BD @ weight_VD.to(hidden_BD.dtype).t()
    unit_p_dtype = None if embed_VD is None else embed_VD.dtype
    token_B, logprob_B, entropy_B, unit_p_BV = torch.ops.fastlatent.vocab_rows(
        logits_BV, temperature, seed, counter_B3, greedy, unit_p_dtype)
    return VocabHead(token_B, logprob_B, entropy_B, None if embed_VD is None else unit_p_BV @ embed_VD)
