"""How a backend of gaussian_reparam becomes a pair of torch operators, forward and backward, tied by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlatent_kernels.gaussian_reparam import GaussianReparam
from fastlatent_kernels.library import LIBRARY

_SCHEMA = "Tensor mean, Tensor logvar, float free_bits, Tensor? seed, Tensor? counter, Tensor? eps, Tensor? z"


class Inputs(NamedTuple):
    """What both kernels read, contiguous."""

    mean_TD: Tensor
    logvar_TD: Tensor
    free_bits: float
    seed: Tensor | None
    counter_T3: Tensor | None
    given_TD: Tensor | None  # eps or z
    source: str  # "noise", "eps" or "z"


class Gradients(NamedTuple):
    """Of the outputs, contiguous; None for one that nobody uses, and for a given z, which is a constant."""

    z_TD: Tensor | None
    kl_T: Tensor | None
    logprob_T: Tensor | None
    variance_T: Tensor | None


def register(backend: str, dispatch_key: str, forward: Callable[..., None], backward: Callable[..., None]) -> Callable:
    """Define `fastlatent::gaussian_reparam_<backend>` and its backward; return the op that calls them.

    Args:
        forward: (Inputs, z_TD or None where z is given, kl_T, logprob_T, variance_T); fills the last four.
        backward: (Inputs, Gradients, d_mean_TD, d_logvar_TD); fills the last two.
    """
    name = f"gaussian_reparam_{backend}"
    LIBRARY.define(f"{name}({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")
    LIBRARY.define(f"{name}_backward(Tensor? g_z, Tensor? g_kl, Tensor? g_logprob, Tensor? g_variance, {_SCHEMA}) "
                   "-> (Tensor, Tensor)")

    def run_forward(*arguments):
        inputs, out = _inputs(*arguments), _empty_outputs(*arguments)
        forward(inputs, None if inputs.source == "z" else out[0], *out[1:])
        return out

    def run_backward(g_z, g_kl, g_logprob, g_variance, *arguments):
        inputs = _inputs(*arguments)
        incoming = Gradients(None if inputs.source == "z" else g_z, g_kl, g_logprob, g_variance)
        d_mean_TD, d_logvar_TD = torch.empty_like(inputs.mean_TD), torch.empty_like(inputs.logvar_TD)
        backward(inputs, Gradients(*(None if g is None else g.contiguous() for g in incoming)), d_mean_TD, d_logvar_TD)
        return d_mean_TD, d_logvar_TD

    def differentiate(ctx, *gradients):
        operator = getattr(torch.ops.fastlatent, f"{name}_backward")
        mean_TD, logvar_TD, *noise = ctx.saved_tensors
        return *operator(*gradients, mean_TD, logvar_TD, ctx.free_bits, *noise), None, None, None, None, None

    LIBRARY.impl(name, run_forward, dispatch_key)
    LIBRARY.impl(f"{name}_backward", run_backward, dispatch_key)
    torch.library.register_fake(f"fastlatent::{name}", _empty_outputs, lib=LIBRARY)
    torch.library.register_fake(f"fastlatent::{name}_backward", _empty_gradients, lib=LIBRARY)
    torch.library.register_autograd(f"fastlatent::{name}", differentiate, setup_context=_save, lib=LIBRARY)

    def run(mean_TD, logvar_TD, free_bits=0.0, *, seed=None, counter_T3=None, eps_TD=None, z_TD=None):
        operator = getattr(torch.ops.fastlatent, name)
        out = GaussianReparam(*operator(mean_TD, logvar_TD, free_bits, seed, counter_T3, eps_TD, z_TD))
        return out if z_TD is None else out._replace(z_TD=z_TD.detach())

    return run


def _inputs(mean_TD, logvar_TD, free_bits, seed, counter_T3, eps_TD, z_TD) -> Inputs:
    source = "noise" if seed is not None else "eps" if eps_TD is not None else "z"
    given_TD = eps_TD if z_TD is None else z_TD
    mean_TD, logvar_TD, counter_T3, given_TD = (
        None if x is None else x.contiguous() for x in (mean_TD, logvar_TD, counter_T3, given_TD))
    return Inputs(mean_TD, logvar_TD, free_bits, seed, counter_T3, given_TD, source)


def _empty_outputs(mean_TD, logvar_TD, free_bits, seed, counter_T3, eps_TD, z_TD):
    T, D = mean_TD.shape
    # a given z is not written again
    z_TD = mean_TD.new_empty((T, D) if z_TD is None else (0,))
    return z_TD, *(torch.empty(T, device=mean_TD.device, dtype=torch.float32) for _ in range(3))


def _empty_gradients(g_z, g_kl, g_logprob, g_variance, mean_TD, logvar_TD, *rest):
    return mean_TD.new_empty(mean_TD.shape), logvar_TD.new_empty(logvar_TD.shape)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # an output that nobody uses costs no memory and no load
    mean_TD, logvar_TD, ctx.free_bits, *noise = inputs
    ctx.save_for_backward(mean_TD, logvar_TD, *noise)
