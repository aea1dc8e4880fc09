"""topk_mixture on a CPU: one pass over each row of logits in C++."""

from __future__ import annotations

import torch

import fastlatent_kernels._C as _C
from fastlatent_kernels.native import LIBRARY, row_arguments, row_outputs, row_scratch, why_not_cpu
from fastlatent_kernels.topk_mixture import TopkMixture, topk_mixture

LIBRARY.define("topk_rows(Tensor logits, float temperature, int top_k, float top_p, Tensor seed, Tensor counter, bool greedy, "
               "str isa='') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def _rows(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy, isa=""):
    logits_BV, counter_B3 = logits_BV.contiguous(), counter_B3.contiguous()
    token_B, logprob_B, log_kept_B, entropy_B, ids_BK, weights_BK = out = _empty_outputs(logits_BV, top_k)
    scratch = row_scratch(logits_BV)
    _C.topk_mixture(*row_arguments(logits_BV, temperature, seed, counter_B3, greedy, token_B, logprob_B, entropy_B, scratch),
                    top_k, top_p, log_kept_B.data_ptr(), ids_BK.data_ptr(), weights_BK.data_ptr(), isa)
    return out


def _empty_outputs(logits_BV, top_k):
    token_B, logprob_B, entropy_B = row_outputs(logits_BV)
    ids_BK = token_B.new_empty(len(token_B), top_k)
    return token_B, logprob_B, torch.empty_like(logprob_B), entropy_B, ids_BK, logprob_B.new_empty(ids_BK.shape)


LIBRARY.impl("topk_rows", _rows, "CPU")


@torch.library.register_fake("fastlatent::topk_rows", lib=LIBRARY)
def _fake_rows(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy, isa=""):
    return _empty_outputs(logits_BV, top_k)


def _supports(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy) -> str | None:
    return why_not_cpu(logits_BV)


@topk_mixture.backend("native", supports=_supports)
@torch.no_grad()
def _run(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy):
    return TopkMixture(*torch.ops.fastlatent.topk_rows(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy))
