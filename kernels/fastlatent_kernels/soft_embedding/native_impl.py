"""soft_embedding on a CPU: the rows are summed where they lie, in float32, and never gathered into a tensor."""

from __future__ import annotations

import torch

import fastlatent_kernels._C as _C
from fastlatent_kernels.check import expect_ids
from fastlatent_kernels.native import why_not_cpu
from fastlatent_kernels.soft_embedding import soft_embedding
from fastlatent_kernels.soft_embedding.operators import register
from fastlatent_kernels.structs import fill

_ELEMENTS_PER_THREAD = 1 << 14  # below that, waking a thread costs more than it saves


def forward(ids_NK, weight_NK, table_VD, out_ND, isa: str = "") -> None:
    """Fill `out_ND`; ValueError for ids that name no row of the table."""
    expect_ids("ids_NK", ids_NK, len(table_VD))
    _call(_C.soft_embedding, isa, ids_NK.numel(), ids=ids_NK.long(), weight=weight_NK.float(), table=table_VD,
          out=out_ND, rows=len(ids_NK), mixed=ids_NK.shape[1], width=table_VD.shape[1],
          is_bf16=table_VD.dtype == torch.bfloat16)


def weight_gradient(grad_ND, ids_NK, table_VD, dweight_NK, isa: str = "") -> None:
    """Fill `dweight_NK`."""
    out_NK = torch.empty(dweight_NK.shape, dtype=torch.float32)
    _call(_C.soft_embedding_weight_gradient, isa, ids_NK.numel(), ids=ids_NK.long(), table=table_VD, grad=grad_ND,
          out=out_NK, rows=len(ids_NK), mixed=ids_NK.shape[1], width=table_VD.shape[1],
          is_bf16=table_VD.dtype == torch.bfloat16)
    dweight_NK.copy_(out_NK)


def table_gradient(grad_ND, weight_NK, place_P, begin_U, dtable_VD, isa: str = "") -> None:
    """Fill `dtable_VD`."""
    _call(_C.soft_embedding_table_gradient, isa, place_P.numel() + len(dtable_VD), weight=weight_NK.float(),
          grad=grad_ND, place=place_P, begin=begin_U, out=dtable_VD, vocab=len(dtable_VD), mixed=weight_NK.shape[1],
          width=dtable_VD.shape[1], is_bf16=dtable_VD.dtype == torch.bfloat16)


def _call(kernel, isa: str, num_rows: int, *, width: int, **fields) -> None:
    """Fill the struct (csrc/structs.h) and run `kernel` on it, which reads or writes `num_rows` rows of `width`."""
    arguments = _C.SoftEmbedding()
    threads = max(1, min(torch.get_num_threads(), num_rows * width // _ELEMENTS_PER_THREAD))
    fields |= {"width": width, "threads": threads, "scratch": torch.empty(threads, width, dtype=torch.float32)}
    fill(arguments, fields)
    kernel(arguments, isa)


_embed = register("native", ("CPU",), forward, weight_gradient, table_gradient)


def _supports(ids_NK, weight_NK, table_VD) -> str | None:
    return why_not_cpu(weight_NK, table_VD)


@soft_embedding.backend("native", supports=_supports)
def _run(ids_NK, weight_NK, table_VD):
    return _embed(ids_NK, weight_NK, table_VD)
