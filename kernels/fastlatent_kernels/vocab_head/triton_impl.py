"""vocab_head on a GPU: the weights are read once for the token, and the embedding once for the mixture."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.noise import TILE_SIZE
from fastlatent_kernels.triton_support import why_not_triton
from fastlatent_kernels.vocab_head import VocabHead, vocab_head
from fastlatent_kernels.vocab_head.triton_kernels import (
    NUM_STATS,
    draw_kernel,
    mix_kernel,
    sum_kernel,
    tiles_kernel,
)

_MIX_PROGRAMS = 264  # two for each SM of an H200
_SUM_BLOCK = 512

# 64 rows even for one: Hopper's tensor cores take no fewer, and reading the weights takes longer than 64 rows' products
_HALF = {"BLOCK_B": 64, "TILES": 2, "BLOCK_K": 64}, {"num_warps": 8, "num_stages": 3}
_FLOAT = {"BLOCK_B": 32, "TILES": 1, "BLOCK_K": 32}, {"num_warps": 4, "num_stages": 2}
_HALF_MIX = {"BLOCK_B": 64, "BLOCK_E": 256}, {"num_warps": 8, "num_stages": 2}
_FLOAT_MIX = {"BLOCK_B": 32, "BLOCK_E": 64}, {"num_warps": 8, "num_stages": 2}
_HALF_DRAW, _FLOAT_DRAW, _DRAW_WARPS = {"BLOCK_K": 128}, {"BLOCK_K": 64}, 16

LIBRARY.define("vocab_head_triton(Tensor hidden, Tensor weight, float temperature, Tensor seed, Tensor counter, "
               "bool greedy, Tensor? embed) -> (Tensor, Tensor, Tensor, Tensor)")


def _launch(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    """token, logprob, entropy and the mixture, [B, 0] where no embed was given."""
    hidden_BD, counter_B3 = hidden_BD.contiguous(), counter_B3.contiguous()
    weight_VD = weight_VD.to(hidden_BD.dtype).contiguous()
    (B, D), V = hidden_BD.shape, weight_VD.shape[0]
    token_B, logprob_B, entropy_B, mixture_BD = out = _empty_outputs(hidden_BD, embed_VD)
    num_tiles = triton.cdiv(V, TILE_SIZE)
    stats_BSC = torch.empty(B, NUM_STATS.value, num_tiles, dtype=torch.float32, device=hidden_BD.device)
    # without a mixture nothing is kept, and any address will do
    exps_BI = stats_BSC if embed_VD is None else embed_VD.new_empty(B, num_tiles * TILE_SIZE)

    blocks, options = _FLOAT if hidden_BD.dtype == torch.float32 else _HALF
    tiles_kernel[triton.cdiv(B, blocks["BLOCK_B"]), triton.cdiv(num_tiles, blocks["TILES"])](
        hidden_BD, weight_VD, stats_BSC, exps_BI, B, V, D, num_tiles, 1.0 / temperature,
        KEEPS_EXPS=embed_VD is not None, **blocks, **options)
    draw_kernel[(B,)](
        hidden_BD, weight_VD, stats_BSC, seed, counter_B3, token_B, logprob_B, entropy_B, V, D, num_tiles,
        1.0 / temperature, GREEDY=greedy, NT=max(16, triton.next_power_of_2(num_tiles)),
        **(_FLOAT_DRAW if hidden_BD.dtype == torch.float32 else _HALF_DRAW), num_warps=_DRAW_WARPS)
    if embed_VD is not None:
        _mix(exps_BI, stats_BSC, embed_VD.contiguous(), mixture_BD)
    return out


def _mix(exps_BI: Tensor, stats_BSC: Tensor, embed_VD: Tensor, mixture_BD: Tensor) -> None:
    (B, E), V, num_tiles = mixture_BD.shape, embed_VD.shape[0], stats_BSC.shape[2]
    blocks, options = _FLOAT_MIX if embed_VD.dtype == torch.float32 else _HALF_MIX
    grid = triton.cdiv(B, blocks["BLOCK_B"]), triton.cdiv(E, blocks["BLOCK_E"])
    # a function of the sizes alone: the rounding of a row's sums does not depend on its batch
    tiles_per_split = triton.cdiv(num_tiles, triton.cdiv(_MIX_PROGRAMS, grid[1]))
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    part_SBE = torch.empty(num_splits, B, E, dtype=torch.float32, device=embed_VD.device)
    mix_kernel[*grid, num_splits](
        exps_BI, stats_BSC, embed_VD, part_SBE, B, V, E, num_tiles, tiles_per_split, **blocks, **options)
    sum_kernel[triton.cdiv(B * E, _SUM_BLOCK),](part_SBE, mixture_BD, B * E, num_splits, BLOCK=_SUM_BLOCK, num_warps=4)


def _empty_outputs(hidden_BD: Tensor, embed_VD: Tensor | None) -> tuple[Tensor, ...]:
    num_rows = hidden_BD.shape[0]
    token_B = hidden_BD.new_empty(num_rows, dtype=torch.int64)
    logprob_B, entropy_B = (hidden_BD.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    like, width = (hidden_BD, 0) if embed_VD is None else (embed_VD, embed_VD.shape[1])
    return token_B, logprob_B, entropy_B, like.new_empty(num_rows, width)


LIBRARY.impl("vocab_head_triton", _launch, "CompositeExplicitAutograd")


@torch.library.register_fake("fastlatent::vocab_head_triton", lib=LIBRARY)
def _fake_launch(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    return _empty_outputs(hidden_BD, embed_VD)


def _supports(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD) -> str | None:
    return why_not_triton(hidden_BD, weight_VD, seed, counter_B3, embed_VD)


@vocab_head.backend("triton", supports=_supports)
@torch.no_grad()
def _run(hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD):
    *row_numbers, mixture_BD = torch.ops.fastlatent.vocab_head_triton(
        hidden_BD, weight_VD, temperature, seed, counter_B3, greedy, embed_VD)
    return VocabHead(*row_numbers, None if embed_VD is None else mixture_BD)


def _aot(label: str, dtype: str, tiles: tuple[dict, dict], draw: dict, mix: tuple[dict, dict], mma: tuple[str, ...]
         ) -> tuple[Compile, ...]:
    pointers = {"hidden_ptr": dtype, "weight_ptr": dtype, "stats_ptr": "*fp32"}
    sizes = {"V": "i32", "D": "i32", "num_tiles": "i32", "inv_temperature": "fp32"}
    row_pointers = {"seed_ptr": "*i64", "counter_ptr": "*i64", "token_ptr": "*i64", "logprob_ptr": "*fp32",
                    "entropy_ptr": "*fp32"}
    mix_types = {"exps_ptr": dtype, "stats_ptr": "*fp32", "embed_ptr": dtype, "part_ptr": "*fp32",
                 **dict.fromkeys(("B", "V", "E", "num_tiles", "tiles_per_split"), "i32")}
    return (
        Compile(tiles_kernel, pointers | {"exps_ptr": dtype, "B": "i32"} | sizes, tiles[0] | {"KEEPS_EXPS": True},
                **tiles[1], label=label, unaligned=("B", "num_tiles"), requires=("LDGSTS", *mma)),
        Compile(draw_kernel, pointers | row_pointers | sizes, draw | {"GREEDY": False, "NT": 2048},
                num_warps=_DRAW_WARPS, label=label, unaligned=("num_tiles",), requires=("LDGSTS",)),
        Compile(mix_kernel, mix_types, mix[0], **mix[1], label=label, unaligned=("B", "num_tiles", "tiles_per_split"),
                requires=("LDGSTS", *mma)),
        Compile(sum_kernel, {"part_ptr": "*fp32", "mixture_ptr": dtype, "size": "i32", "num_splits": "i32"},
                {"BLOCK": _SUM_BLOCK}, label=label, unaligned=("num_splits",), requires=("LDG.E.128",)))


# the shape is the same for every number of rows
AOT = (*_aot("", "*bf16", _HALF, _HALF_DRAW, _HALF_MIX, ("HGMMA",)),
       *_aot("float32", "*fp32", _FLOAT, _FLOAT_DRAW, _FLOAT_MIX, ()))
