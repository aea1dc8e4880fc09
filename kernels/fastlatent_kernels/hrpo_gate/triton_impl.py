"""hrpo_gate in Triton: one pass over u, token and mixture forward, one backward, arithmetic in float32.

Both kernels move 5 and up to 9 values an element and are bound by memory; the exponentials come second, which is why
sqrt(1 - a^2) reuses a where that does not cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.hrpo_gate import DECAY_SCALE, hrpo_gate
from fastlatent_kernels.hrpo_gate.operators import register
from fastlatent_kernels.triton_support import sigmoid, softplus, why_not_triton

_MOST_PARTIALS = 256  # rows of partial sums; a function of T alone, so that sums do not depend on the device


@triton.jit
def complement(log_a, a, compat_eps):
    """s = sqrt(1 - a^2 + compat_eps) and 1 / s, both 0 where it would be a pole: a = 1 without compat_eps."""
    y = -2.0 * log_a
    # 1 - exp(-y) by its series: 1 - a * a would cancel there
    series = y * (1.0 - y * 0.5 * (1.0 - y * (1.0 / 3) * (1.0 - y * 0.25 * (1.0 - y * 0.2 * (
        1.0 - y * (1.0 / 6) * (1.0 - y * (1.0 / 7) * (1.0 - y * 0.125)))))))
    square = tl.where(y < 0.5, series, 1.0 - a * a) + compat_eps
    smallest = 2.3509887e-38  # twice the smallest normal float32: the reference's limit for log a
    inv_s = tl.where(square < smallest, 0.0, tl.rsqrt(tl.maximum(square, smallest)))
    return square * inv_s, inv_s


@triton.jit
def gated(u_r, u_i, token, mixture, log_scale, compat_eps):
    """The gate of one block, from pre-activations with their bias; log_scale = -c softplus(-Lambda)."""
    log_a = log_scale * sigmoid(u_r)
    a = tl.exp(log_a)
    s, _ = complement(log_a, a, compat_eps)
    return a * token + s * (sigmoid(u_i) * mixture)


@triton.jit
def _forward_kernel(u_ptr, token_ptr, mixture_ptr, bias_ptr, lambda_ptr, latent_ptr, out_ptr, T, D, compat_eps,
                    SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < D
    inside = (row < T)[:, None] & is_column[None, :]
    latent = tl.load(latent_ptr + row, mask=row < T, other=0)[:, None] != 0
    live = inside & latent  # the other rows read nothing but the token
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    at_u = at + row.to(tl.int64)[:, None] * D
    token = tl.load(token_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mixture = tl.load(mixture_ptr + at, mask=live, other=0.0).to(tl.float32)
    u_r = tl.load(u_ptr + at_u, mask=live, other=0.0).to(tl.float32)
    u_i = tl.load(u_ptr + at_u + D, mask=live, other=0.0).to(tl.float32)
    bias_r = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    bias_i = tl.load(bias_ptr + D + column, mask=is_column, other=0.0).to(tl.float32)
    lamb = tl.load(lambda_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    log_scale = -SCALE * softplus(-lamb)
    out = gated(u_r + bias_r[None, :], u_i + bias_i[None, :], token, mixture, log_scale[None, :], compat_eps)
    tl.store(out_ptr + at, tl.where(latent, out, token).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_ptr, u_ptr, token_ptr, mixture_ptr, bias_ptr, lambda_ptr, latent_ptr,
                     du_ptr, dtoken_ptr, dmixture_ptr, partial_ptr, T, D, rows_per_program, compat_eps,
                     SCALE: tl.constexpr, WANTS_TOKEN: tl.constexpr, WANTS_MIXTURE: tl.constexpr,
                     BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """partial [programs, 3, D]: this program's sums of the gradients of bias_r, bias_i and Lambda."""
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < D
    bias_r = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    bias_i = tl.load(bias_ptr + D + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    lamb = tl.load(lambda_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    log_scale = (-SCALE * softplus(-lamb))[None, :]
    # summed over rows after the loop: a sum inside it would make its warps wait for each other
    sum_r = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    sum_i = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    sum_scale = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    begin = tl.program_id(0) * rows_per_program
    for step in range(0, rows_per_program, BLOCK_T):
        row = begin + step + tl.arange(0, BLOCK_T)
        inside = (row < T)[:, None] & is_column[None, :]
        latent = tl.load(latent_ptr + row, mask=row < T, other=0)[:, None] != 0
        live = inside & latent
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        at_u = at + row.to(tl.int64)[:, None] * D
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        token = tl.load(token_ptr + at, mask=live, other=0.0).to(tl.float32)
        mixture = tl.load(mixture_ptr + at, mask=live, other=0.0).to(tl.float32)
        r = sigmoid(tl.load(u_ptr + at_u, mask=live, other=0.0).to(tl.float32) + bias_r)
        i = sigmoid(tl.load(u_ptr + at_u + D, mask=live, other=0.0).to(tl.float32) + bias_i)
        log_a = log_scale * r
        a = tl.exp(log_a)
        s, inv_s = complement(log_a, a, compat_eps)
        gate_grad = tl.where(latent, grad, 0.0)
        # ds / dlog a = -a^2 / s: a pole at a = 1, where the gradients of u and Lambda have another factor 0
        dlog_a = gate_grad * (a * token - a * a * inv_s * (i * mixture))
        du_r = dlog_a * log_a * (1.0 - r)
        du_i = gate_grad * s * mixture * i * (1.0 - i)
        tl.store(du_ptr + at_u, du_r.to(du_ptr.dtype.element_ty), mask=inside)
        tl.store(du_ptr + at_u + D, du_i.to(du_ptr.dtype.element_ty), mask=inside)
        if WANTS_TOKEN:
            dtoken = tl.where(latent, grad * a, grad)
            tl.store(dtoken_ptr + at, dtoken.to(dtoken_ptr.dtype.element_ty), mask=inside)
        if WANTS_MIXTURE:
            tl.store(dmixture_ptr + at, (gate_grad * s * i).to(dmixture_ptr.dtype.element_ty), mask=inside)
        sum_r += du_r
        sum_i += du_i
        sum_scale += dlog_a * r
    into = partial_ptr + tl.program_id(0) * 3 * D + column
    tl.store(into, tl.sum(sum_r, axis=0), mask=is_column)
    tl.store(into + D, tl.sum(sum_i, axis=0), mask=is_column)
    # d(-c softplus(-Lambda)) / dLambda = c sigmoid(-Lambda)
    tl.store(into + 2 * D, tl.sum(sum_scale, axis=0) * SCALE * sigmoid(-lamb), mask=is_column)


def _forward(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps, out_TD) -> None:
    T, D = token_TD.shape
    BLOCK_T, BLOCK_D = _blocks(T, D, elements=2048)
    _forward_kernel[triton.cdiv(T, BLOCK_T), triton.cdiv(D, BLOCK_D)](
        u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, out_TD, T, D, compat_eps,
        SCALE=DECAY_SCALE, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D)


def _backward(grad_TD, u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps,
              du_T2D, dtoken_TD, dmixture_TD) -> Tensor:
    T, D = token_TD.shape
    BLOCK_T, BLOCK_D = _blocks(T, D, elements=1024)
    num_blocks = max(1, triton.cdiv(T, BLOCK_T))
    rows_per_program = triton.cdiv(num_blocks, _MOST_PARTIALS) * BLOCK_T
    num_programs = triton.cdiv(T, rows_per_program)
    partial_P3D = torch.empty(num_programs, 3, D, dtype=torch.float32, device=token_TD.device)
    _backward_kernel[num_programs, triton.cdiv(D, BLOCK_D)](
        grad_TD, u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, du_T2D, dtoken_TD, dmixture_TD, partial_P3D,
        T, D, rows_per_program, compat_eps, SCALE=DECAY_SCALE, WANTS_TOKEN=dtoken_TD is not None,
        WANTS_MIXTURE=dmixture_TD is not None, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D)
    return partial_P3D.sum(0)


def _blocks(T: int, D: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a block of at most `elements`; the columns leave as few lanes idle as they can."""
    if D <= 128:
        width = triton.next_power_of_2(D)
    else:
        width = min((512, 256, 128), key=lambda columns: (triton.cdiv(D, columns) * columns, -columns))
    return min(elements // width, 16, triton.next_power_of_2(max(1, T))), width


_gate = register("triton", ("CPU", "CUDA"), _forward, _backward)


def _supports(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps=0.0) -> str | None:
    return why_not_triton(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T)


@hrpo_gate.backend("triton", supports=_supports)
def _run(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps=0.0):
    return _gate(u_T2D, token_TD, mixture_TD, bias_2D, lambda_D, latent_T, compat_eps)


_TYPES = {"u_ptr": "*bf16", "token_ptr": "*bf16", "mixture_ptr": "*bf16", "bias_ptr": "*fp32", "lambda_ptr": "*fp32",
          "latent_ptr": "*i1"}
_SIZES = {"T": "i32", "D": "i32", "compat_eps": "fp32"}

AOT = (
    Compile(_forward_kernel, _TYPES | {"out_ptr": "*bf16"} | _SIZES,
            {"SCALE": DECAY_SCALE, "BLOCK_T": 4, "BLOCK_D": 512}, requires=("LDG.E.128", "STG.E.128")),
    Compile(_backward_kernel,
            _TYPES | {"grad_ptr": "*bf16", "du_ptr": "*bf16", "dtoken_ptr": "*bf16", "dmixture_ptr": "*bf16",
                      "partial_ptr": "*fp32", "rows_per_program": "i32"} | _SIZES,
            {"SCALE": DECAY_SCALE, "WANTS_TOKEN": True, "WANTS_MIXTURE": True, "BLOCK_T": 2, "BLOCK_D": 512},
            requires=("LDG.E.128", "STG.E.128")),
)
