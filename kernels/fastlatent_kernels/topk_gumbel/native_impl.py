"""topk_gumbel on a CPU: a few passes over each row of logits in C++, noise only for tokens that can win."""

from __future__ import annotations

import torch

import fastlatent_kernels._C as _C
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.native import empty_rows, run_rows, why_not_cpu
from fastlatent_kernels.topk_gumbel import TopkGumbel, topk_gumbel

LIBRARY.define("topk_gumbel_rows(Tensor logits, float temperature, int top_k, float top_p, float[] noise, "
               "float mixture_temperature, Tensor seed, Tensor counter, str isa='') "
               "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def _rows(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3, isa=""):
    out = _empty_outputs(logits_BV, top_k)
    ids_BK, score_BK, logprob_BK, weights_BK, likeliest_B, log_kept_B, num_candidates_B, entropy_B = out
    low, high, shift, scale = noise
    run_rows(_C.topk_gumbel, _C.TopkGumbel(), isa, logits=logits_BV, temperature=temperature, counter=counter_B3,
             seed=seed, top_k=top_k, top_p=top_p, low=low, high=high, shift=shift, scale=scale,
             inv_mixture_temperature=1.0 / mixture_temperature, ids=ids_BK, score=score_BK, logprob=logprob_BK,
             weights=weights_BK, token=likeliest_B, log_kept=log_kept_B, num_candidates=num_candidates_B,
             entropy=entropy_B)
    return out


def _empty_outputs(logits_BV, top_k):
    likeliest_B, log_kept_B, entropy_B = empty_rows(logits_BV)
    ids_BK = likeliest_B.new_empty(likeliest_B.shape[0], top_k)
    score_BK, logprob_BK, weights_BK = (log_kept_B.new_empty(ids_BK.shape) for _ in range(3))
    return (ids_BK, score_BK, logprob_BK, weights_BK, likeliest_B, log_kept_B, torch.empty_like(likeliest_B),
            entropy_B)


LIBRARY.impl("topk_gumbel_rows", _rows, "CPU")


@torch.library.register_fake("fastlatent::topk_gumbel_rows", lib=LIBRARY)
def _fake_rows(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3, isa=""):
    return _empty_outputs(logits_BV, top_k)


def _supports(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3) -> str | None:
    return why_not_cpu(logits_BV)


@topk_gumbel.backend("native", supports=_supports)
@torch.no_grad()
def _run(logits_BV, temperature, top_k, top_p, noise, mixture_temperature, seed, counter_B3):
    return TopkGumbel(*torch.ops.fastlatent.topk_gumbel_rows(
        logits_BV, temperature, top_k, top_p, list(noise), mixture_temperature, seed, counter_B3))
