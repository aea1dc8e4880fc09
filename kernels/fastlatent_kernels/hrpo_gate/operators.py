"""How a backend of hrpo_gate becomes a pair of torch operators: their schema, their shapes and the derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastlatent_kernels.library import LIBRARY

_INPUTS = "Tensor u, Tensor token, Tensor mixture, Tensor bias, Tensor lamb, Tensor latent, float compat_eps"


def register(backend: str, devices: tuple[str, ...], forward: Callable[..., None], backward: Callable[..., Tensor]
             ) -> Callable[..., Tensor]:
    """Define `fastlatent::hrpo_gate_<backend>` and its backward, and return the first.

    Args:
        forward: takes contiguous tensors in the order of `hrpo_gate` and fills the output, its last argument.
        backward: takes the gradient of the output, then what `forward` takes before its last argument, then what it
            fills: the gradients of u, of token and of mixture, each of the last two None where nobody wants it. Returns
            the gradients of the two halves of the bias and of Lambda, [3, D] float32.
    """
    name = f"hrpo_gate_{backend}"
    LIBRARY.define(f"{name}({_INPUTS}) -> Tensor")
    LIBRARY.define(f"{name}_backward(Tensor grad, {_INPUTS}, bool wants_token, bool wants_mixture) "
                   "-> (Tensor, Tensor, Tensor, Tensor)")

    def run(u, token, mixture, bias, lamb, latent, compat_eps):
        out_TD = _empty(token)
        forward(*_contiguous(u, token, mixture, bias, lamb, latent), compat_eps, out_TD)
        return out_TD

    def run_backward(grad, u, token, mixture, bias, lamb, latent, compat_eps, wants_token, wants_mixture):
        du, dtoken, dmixture = _empty_gradients(u, token, mixture, wants_token, wants_mixture)
        sums_3D = backward(*_contiguous(grad, u, token, mixture, bias, lamb, latent), compat_eps, du,
                           dtoken if wants_token else None, dmixture if wants_mixture else None)
        return du, dtoken, dmixture, sums_3D

    for device in devices:
        LIBRARY.impl(name, run, device)
        LIBRARY.impl(f"{name}_backward", run_backward, device)

    @torch.library.register_fake(f"fastlatent::{name}", lib=LIBRARY)
    def _(u, token, mixture, bias, lamb, latent, compat_eps):
        return _empty(token)

    @torch.library.register_fake(f"fastlatent::{name}_backward", lib=LIBRARY)
    def _(grad, u, token, mixture, bias, lamb, latent, compat_eps, wants_token, wants_mixture):
        sums_3D = torch.empty(3, token.shape[1], dtype=torch.float32, device=token.device)
        return *_empty_gradients(u, token, mixture, wants_token, wants_mixture), sums_3D

    def differentiate(ctx, grad):
        _, wants_token, wants_mixture, *_ = ctx.needs_input_grad
        du, dtoken, dmixture, sums_3D = getattr(torch.ops.fastlatent, f"{name}_backward")(
            grad, *ctx.saved_tensors, ctx.compat_eps, wants_token, wants_mixture)
        _, _, _, bias, lamb, _ = ctx.saved_tensors
        return (du, dtoken if wants_token else None, dmixture if wants_mixture else None,
                sums_3D[:2].flatten().to(bias.dtype), sums_3D[2].to(lamb.dtype), None, None)

    torch.library.register_autograd(f"fastlatent::{name}", differentiate, setup_context=_save, lib=LIBRARY)
    return getattr(torch.ops.fastlatent, name)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.compat_eps = inputs
    ctx.save_for_backward(*tensors)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _empty_gradients(u, token, mixture, wants_token: bool, wants_mixture: bool) -> tuple[Tensor, Tensor, Tensor]:
    # an operator returns tensors only: one without elements stands for a gradient nobody wants
    return (_empty(u), _empty(token) if wants_token else token.new_empty(0),
            _empty(mixture) if wants_mixture else mixture.new_empty(0))
