"""gaussian_reparam in Triton: how the kernels are launched, and the shapes they are compiled for ahead of time."""

from __future__ import annotations

import triton

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.gaussian_reparam import gaussian_reparam
from fastlatent_kernels.gaussian_reparam.operators import register
from fastlatent_kernels.gaussian_reparam.triton_kernels import backward_kernel, forward_kernel
from fastlatent_kernels.triton_support import why_not_triton


def _blocks(D: int) -> dict[str, int]:
    """About 1024 elements a program: eight a thread, which is one 16-byte load of bfloat16."""
    block_D = min(512, triton.next_power_of_2(D))
    return {"BT": max(1, min(16, 1024 // block_D)), "BD": block_D}


def _forward(inputs, z_TD, kl_T, logprob_T, variance_T) -> None:
    (T, D), blocks = inputs.mean_TD.shape, _blocks(inputs.mean_TD.shape[1])
    forward_kernel[triton.cdiv(T, blocks["BT"]),](
        inputs.mean_TD, inputs.logvar_TD, inputs.seed, inputs.counter_T3, inputs.given_TD, z_TD, kl_T, logprob_T,
        variance_T, T, inputs.free_bits, D, inputs.source, **blocks)


def _backward(inputs, gradients, d_mean_TD, d_logvar_TD) -> None:
    (T, D), blocks = inputs.mean_TD.shape, _blocks(inputs.mean_TD.shape[1])
    backward_kernel[triton.cdiv(T, blocks["BT"]),](
        *gradients, inputs.mean_TD, inputs.logvar_TD, inputs.seed, inputs.counter_T3, inputs.given_TD, d_mean_TD,
        d_logvar_TD, T, inputs.free_bits, D, inputs.source, **blocks)


def _supports(mean_TD, logvar_TD, free_bits=0.0, *, seed=None, counter_T3=None, eps_TD=None, z_TD=None) -> str | None:
    return why_not_triton(mean_TD, logvar_TD, seed, counter_T3, eps_TD, z_TD)


# the interpreter runs on a CPU
gaussian_reparam.backend("triton", supports=_supports)(
    register("triton", "CompositeExplicitAutograd", _forward, _backward))


_BF16, _FP32, _INT64 = "*bf16", "*fp32", "*i64"
_SHAPE = {"D": 1536, **_blocks(1536)}
_FORWARD = {"mean_ptr": _BF16, "logvar_ptr": _BF16, "kl_ptr": _FP32, "logprob_ptr": _FP32, "variance_ptr": _FP32,
            "T": "i32", "free_bits": "fp32"}
_BACKWARD = {"g_kl_ptr": _FP32, "g_logprob_ptr": _FP32, "g_variance_ptr": _FP32, "mean_ptr": _BF16,
             "logvar_ptr": _BF16, "d_mean_ptr": _BF16, "d_logvar_ptr": _BF16, "T": "i32", "free_bits": "fp32"}
_DRAW = {"seed_ptr": _INT64, "counter_ptr": _INT64}
_DRAWN, _GIVEN = {"given_ptr": None, "SOURCE": "noise"}, {"seed_ptr": None, "counter_ptr": None, "SOURCE": "z"}

AOT: tuple[Compile, ...] = (
    Compile(forward_kernel, _FORWARD | _DRAW | {"z_ptr": _BF16}, _SHAPE | _DRAWN, label="noise",
            requires=("LDG.E.128",)),
    Compile(forward_kernel, _FORWARD | {"given_ptr": _BF16}, _SHAPE | _GIVEN | {"z_ptr": None}, label="given z",
            requires=("LDG.E.128",)),
    Compile(backward_kernel, _BACKWARD | _DRAW | {"g_z_ptr": _BF16}, _SHAPE | _DRAWN, label="noise",
            requires=("LDG.E.128",)),
    Compile(backward_kernel, _BACKWARD | {"given_ptr": _BF16}, _SHAPE | _GIVEN | {"g_z_ptr": None}, label="given z",
            requires=("LDG.E.128",)),
)
