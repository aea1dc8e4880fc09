"""topk_mixture on a CPU: one pass over each row of logits in C++."""

from __future__ import annotations

import torch

import fastlatent_kernels._C as _C
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.native import empty_rows, run_rows, why_not_cpu
from fastlatent_kernels.topk_mixture import TopkMixture, topk_mixture

LIBRARY.define("topk_rows(Tensor logits, float temperature, int top_k, float top_p, Tensor seed, Tensor counter, "
               "bool greedy, str isa='') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def _rows(logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy, isa=""):
    token_B, logprob_B, log_kept_B, entropy_B, ids_BK, weights_BK = out = _empty_outputs(logits_BV, top_k)
    run_rows(_C.topk_mixture, _C.TopkMixture(), isa, logits=logits_BV, temperature=temperature, counter=counter_B3,
             seed=seed, greedy=greedy, token=token_B, logprob=logprob_B, entropy=entropy_B, top_k=top_k, top_p=top_p,
             log_kept=log_kept_B, ids=ids_BK, weights=weights_BK)
    return out


def _empty_outputs(logits_BV, top_k):
    token_B, logprob_B, entropy_B = empty_rows(logits_BV)
    ids_BK = token_B.new_empty(token_B.shape[0], top_k)
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
    return TopkMixture(*torch.ops.fastlatent.topk_rows(
        logits_BV, temperature, top_k, top_p, seed, counter_B3, greedy))
