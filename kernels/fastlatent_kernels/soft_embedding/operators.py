"""How a backend of soft_embedding becomes a pair of torch operators: their schema, their shapes and the derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlatent_kernels.library import LIBRARY


def register(backend: str, devices: tuple[str, ...], forward: Callable[..., None], weight_gradient: Callable[..., None],
             table_gradient: Callable[..., None]) -> Callable[..., Tensor]:
    """Define `fastlatent::soft_embedding_<backend>` and its backward, and return the first.

    All three functions take contiguous tensors and fill the last of them.

    Args:
        forward: ids_NK, weight_NK, table_VD, out_ND.
        weight_gradient: grad_ND, ids_NK, table_VD, dweight_NK.
        table_gradient: grad_ND, weight_NK, place_P, begin_U, dtable_VD. place_P are the places n * K + k in the order
            of their ids, and those of id v are place_P[begin_U[v]:begin_U[v + 1]]: every row of the table has one
            owner, which adds in one order.
    """
    name = f"soft_embedding_{backend}"
    LIBRARY.define(f"{name}(Tensor ids, Tensor weight, Tensor table) -> Tensor")
    LIBRARY.define(f"{name}_backward(Tensor grad, Tensor ids, Tensor weight, Tensor table, bool wants_weight, "
                   "bool wants_table) -> (Tensor, Tensor)")

    def run(ids_NK, weight_NK, table_VD):
        out_ND = _empty_out(ids_NK, weight_NK, table_VD)
        forward(ids_NK.contiguous(), weight_NK.contiguous(), table_VD.contiguous(), out_ND)
        return out_ND

    def run_backward(grad_ND, ids_NK, weight_NK, table_VD, wants_weight, wants_table):
        grad_ND, ids_NK, weight_NK = grad_ND.contiguous(), ids_NK.contiguous(), weight_NK.contiguous()
        dweight_NK, dtable_VD = gradients = _empty_gradients(weight_NK, table_VD, wants_weight, wants_table)
        if wants_weight:
            weight_gradient(grad_ND, ids_NK, table_VD.contiguous(), dweight_NK)
        if wants_table:
            id_P, place_P = ids_NK.flatten().sort(stable=True)
            begin_U = torch.searchsorted(id_P, torch.arange(len(table_VD) + 1, dtype=id_P.dtype, device=id_P.device))
            table_gradient(grad_ND, weight_NK, place_P, begin_U, dtable_VD)
        return gradients

    for device in devices:
        LIBRARY.impl(name, run, device)
        LIBRARY.impl(f"{name}_backward", run_backward, device)
    torch.library.register_fake(f"fastlatent::{name}", _empty_out, lib=LIBRARY)

    @torch.library.register_fake(f"fastlatent::{name}_backward", lib=LIBRARY)
    def _(grad_ND, ids_NK, weight_NK, table_VD, wants_weight, wants_table):
        return _empty_gradients(weight_NK, table_VD, wants_weight, wants_table)

    def differentiate(ctx, grad_ND):
        _, wants_weight, wants_table = ctx.needs_input_grad
        dweight_NK, dtable_VD = getattr(torch.ops.fastlatent, f"{name}_backward")(
            grad_ND, *ctx.saved_tensors, wants_weight, wants_table)
        return None, dweight_NK if wants_weight else None, dtable_VD if wants_table else None

    torch.library.register_autograd(f"fastlatent::{name}", differentiate, setup_context=_save, lib=LIBRARY)
    return getattr(torch.ops.fastlatent, name)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _empty_out(ids_NK, weight_NK, table_VD) -> Tensor:
    return table_VD.new_empty(len(ids_NK), table_VD.shape[1])


def _empty_gradients(weight_NK, table_VD, wants_weight: bool, wants_table: bool) -> tuple[Tensor, Tensor]:
    # an operator returns tensors only: one without elements stands for a gradient nobody wants
    return (weight_NK.new_empty(weight_NK.shape if wants_weight else 0),
            table_VD.new_empty(table_VD.shape if wants_table else 0))
