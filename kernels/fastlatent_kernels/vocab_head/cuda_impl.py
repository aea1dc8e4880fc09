"""vocab_head in one CUDA pass over tied weights, on a Hopper GPU (csrc/cuda/sm90/vocab_head.cu). Compiled, never run.

Triton's kernels take any shape and read the weights twice: for the token, and again for the mixture.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import fastlatent_kernels._cuda as _cuda
from fastlatent_kernels.cuda_support import never_run, why_not_cuda
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.native import empty_rows
from fastlatent_kernels.noise import TILE_SIZE
from fastlatent_kernels.structs import fill
from fastlatent_kernels.vocab_head import VocabHead, vocab_head

WIDTHS = (896, 1536, 2048)
MOST_ROWS, MOST_IDS = 64, 2**18
_PART_FIELDS = 6  # numbers of RowPart in csrc/cuda/sm90/head_sums.h

LIBRARY.define("vocab_head_cuda(Tensor hidden, Tensor weight, float temperature, Tensor seed, Tensor counter, "
               "bool greedy) -> (Tensor, Tensor, Tensor, Tensor)")


def _launch(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy):
    """token, logprob, entropy and the mixture of the weights' own rows."""
    (B, D), V, device = hidden_BD.shape, weight_VD.shape[0], hidden_BD.device
    if weight_VD.data_ptr() % 16:
        raise ValueError(f"weight_VD: expected an address that is a multiple of 16, got {weight_VD.data_ptr():#x}")
    token_B, logprob_B, entropy_B, mixture_BD = out = _empty_outputs(hidden_BD)
    # a function of the sizes and the device alone: the rounding of a row's sums does not depend on its batch
    num_clusters = min(_clusters_at_once(D, device.index), -(-V // TILE_SIZE))
    hidden_BD = hidden_BD.contiguous()
    scratch = {"parts": (num_clusters, B, _PART_FIELDS), "logits": (num_clusters, B, TILE_SIZE),
               "mixtures": (num_clusters, B, D)}
    fields = {name: torch.empty(shape, dtype=torch.float32, device=device) for name, shape in scratch.items()}
    fields |= {"hidden": hidden_BD if hidden_BD.data_ptr() % 16 == 0 else hidden_BD.clone(), "weight": weight_VD,
               "rows": B, "vocab": V, "width": D, "inv_temperature": 1.0 / temperature, "seed": seed,
               "counter": counter_B3.contiguous(), "greedy": greedy, "clusters": num_clusters, "token": token_B,
               "logprob": logprob_B, "entropy": entropy_B, "mixture": mixture_BD}
    arguments = _cuda.OnePassHead()
    fill(arguments, fields)
    _cuda.one_pass_head(arguments, torch.cuda.current_stream(device).cuda_stream, device.index)
    return out


@cache
def _clusters_at_once(width: int, device_index: int) -> int:
    return _cuda.one_pass_clusters(width, device_index)


def _empty_outputs(hidden_BD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_rows(hidden_BD), torch.empty_like(hidden_BD, memory_format=torch.contiguous_format)


LIBRARY.impl("vocab_head_cuda", _launch, "CUDA")


@torch.library.register_fake("fastlatent::vocab_head_cuda", lib=LIBRARY)
def _fake_launch(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy):
    return _empty_outputs(hidden_BD)


def why_not_inputs(hidden_BD: Tensor, weight_VD: Tensor, embed_VD: Tensor | None) -> str | None:
    """None where the one-pass kernel takes tensors like these on a Hopper GPU, else the sentence that refuses."""
    if embed_VD is not weight_VD:
        return "cuda takes weights that are the embedding too, the very same tensor; triton takes others, in two passes"
    if any(x.dtype != torch.bfloat16 for x in (hidden_BD, weight_VD)):
        return "cuda takes bfloat16 hidden states and weights"
    (num_rows, width), vocab_size = hidden_BD.shape, weight_VD.shape[0]
    if width not in WIDTHS:
        return f"cuda takes widths 896, 1536 and 2048, not {width}; triton takes any, in two passes"
    if not 1 <= num_rows <= MOST_ROWS:
        return f"cuda takes 1 to {MOST_ROWS} rows, not {num_rows}; triton takes any, in two passes"
    if vocab_size > MOST_IDS:
        return f"cuda takes up to {MOST_IDS} ids, not {vocab_size}; triton takes any, in two passes"
    return None if weight_VD.is_contiguous() else "cuda takes contiguous weights"


def _supports(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD) -> str | None:
    if (reason := why_not_cuda(hidden_BD)) is not None:
        return reason
    if torch.cuda.get_device_capability(hidden_BD.get_device()) != (9, 0):
        return "cuda takes a GPU of compute capability 9.0 (H100, H200)"
    return why_not_inputs(hidden_BD, weight_VD, embed_VD)


@vocab_head.backend("cuda", supports=_supports, rule=never_run)
@torch.no_grad()
def _run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    return VocabHead(*torch.ops.fastlatent.vocab_head_cuda(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy))
