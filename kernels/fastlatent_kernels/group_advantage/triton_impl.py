"""group_advantage in Triton: several groups a program, each in one row of registers, float64 throughout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlatent_kernels.aot import Compile
from fastlatent_kernels.group_advantage import group_advantage
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.triton_support import why_not_triton

MAX_GROUP_SIZE = 4096  # a group lies in the registers of one program


@triton.jit
def advantage_kernel(reward_ptr, mask_ptr, advantage_ptr, S, G, KIND: tl.constexpr, EPS: tl.constexpr, BS: tl.constexpr,
                     BG: tl.constexpr):
    group = tl.program_id(0) * BS + tl.arange(0, BS)[:, None]
    sample = tl.arange(0, BG)[None, :]
    offset, is_inside = group.to(tl.int64) * G + sample, (group < S) & (sample < G)
    valid = tl.load(mask_ptr + offset, mask=is_inside, other=0) != 0
    # a masked reward is not even read: it may hold anything
    reward = tl.load(reward_ptr + offset, mask=valid, other=0.0)
    count = tl.sum(valid.to(tl.float64), axis=1)[:, None]
    total = tl.sum(reward, axis=1)[:, None]
    from_mean = tl.where(valid, reward - total / tl.maximum(count, 1.0), 0.0)
    others = tl.maximum(count - 1.0, 1.0)
    if KIND == "z_score":
        std = tl.sqrt(tl.sum(from_mean * from_mean, axis=1)[:, None] / others)
        # only where no reward differs is std + EPS 0, and there the result is not used
        advantage = from_mean / tl.where(std + EPS == 0.0, 1.0, std + EPS)
    elif KIND == "leave_one_out":
        advantage = from_mean * count / others
    else:
        advantage = from_mean
    lowest = tl.min(tl.where(valid, reward, float("inf")), axis=1)[:, None]
    highest = tl.max(tl.where(valid, reward, -float("inf")), axis=1)[:, None]
    # total == total fails for a group with a NaN, which max and min may pass over; the reference gives 0 there too
    teaches = valid & (highest > lowest) & (total == total)
    tl.store(advantage_ptr + offset, tl.where(teaches, advantage, 0.0).to(tl.float32), mask=is_inside)


LIBRARY.define("group_advantage(Tensor reward, Tensor mask, str kind, float eps) -> Tensor")


def _empty_output(reward_SG, mask_SG, kind, eps):
    return reward_SG.new_empty(reward_SG.shape, dtype=torch.float32)


def _advantage(reward_SG, mask_SG, kind, eps):
    advantage_SG, (S, G) = _empty_output(reward_SG, mask_SG, kind, eps), reward_SG.shape
    blocks = _blocks(G)
    advantage_kernel[triton.cdiv(S, blocks["BS"]),](
        reward_SG.contiguous(), mask_SG.contiguous().view(torch.uint8), advantage_SG, S, G, kind, eps, **blocks)
    return advantage_SG


def _blocks(G: int) -> dict[str, int]:
    block_G = triton.next_power_of_2(G)
    return {"BS": max(1, 256 // block_G), "BG": block_G}


LIBRARY.impl("group_advantage", _advantage, "CompositeExplicitAutograd")
torch.library.register_fake("fastlatent::group_advantage", _empty_output, lib=LIBRARY)


def _supports(reward_SG, mask_SG, kind, eps) -> str | None:
    # the rewards are float64 by contract, which is no dtype of a model's tensors: the mask speaks for the device
    if (reason := why_not_triton(mask_SG)) is not None:
        return reason
    if reward_SG.shape[1] > MAX_GROUP_SIZE:
        return f"triton takes groups of at most {MAX_GROUP_SIZE}"
    return None


@group_advantage.backend("triton", supports=_supports)
@torch.no_grad()
def _run(reward_SG, mask_SG, kind, eps):
    return torch.ops.fastlatent.group_advantage(reward_SG, mask_SG, kind, eps)


_SIGNATURE = {"reward_ptr": "*fp64", "mask_ptr": "*u8", "advantage_ptr": "*fp32", "S": "i32", "G": "i32"}
AOT: tuple[Compile, ...] = tuple(
    Compile(advantage_kernel, _SIGNATURE, {"KIND": kind, "EPS": 1e-4, **_blocks(16)}, num_warps=4, label=kind)
    for kind in ("z_score", "mean_only", "leave_one_out"))
