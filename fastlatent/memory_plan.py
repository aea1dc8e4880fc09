"""What a run will hold in memory, told when it starts: everything whose size is known before the first prompt is read.

Activations are not in it: they grow with update.tokens_per_microbatch, and the log's perf/peak_memory_gb says what they came
to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from fastlatent_kernels.token_logprob.chunks import chunk_rows
from torch import Tensor

from fastlatent import build
from fastlatent.policy import Policy
from fastlatent.rollout.base import RolloutEngine
from fastlatent.schema import Config


@dataclass(slots=True)
class MemoryPlan:
    """Bytes, by what they are for."""

    weights: int  # the trainer's: masters, frozen base, method
    reference: int  # frozen copy; 0 where there is none
    gradients: int
    optimizer: int
    copies: int  # of the blocks' weights in the compute dtype, made by autocast and kept for the backward pass
    head: int  # most of the vocabulary head at once, beside its weight
    engine_name: str | None  # None: nothing is drawn
    engine: dict[str, int] = field(default_factory=dict)  # what the engine plans for itself; empty: it does not say
    capacity: int | None = None  # of the GPU; None on a CPU

    def lines(self) -> list[str]:
        trainer = {"weights": self.weights, "reference": self.reference, "gradients": self.gradients,
                   "optimizer": self.optimizer, "copies": self.copies, "head": self.head}
        room = "" if self.capacity is None else f", of {_shown(self.capacity)}"
        lines = [f"memory: update {_sum(trainer)}, and activations{room}"]
        if self.engine_name is not None:
            lines.append(f"memory: engine {self.engine_name} {_sum(self.engine) if self.engine else 'as its own options say'}")
        return lines


def plan(config: Config, policy: Policy, engine: RolloutEngine | None) -> MemoryPlan:
    trained = policy.trainable().values()
    planned = getattr(engine, "planned_bytes", None)
    sampling, num_requests = build.sampling_of(config), config.num_prompts * config.group_size
    return MemoryPlan(
        weights=_bytes(policy.parameters()), reference=_bytes(policy.reference_parameters()), gradients=_bytes(trained),
        # AdamW: two moments in the dtype of the weight, and a float32 count
        optimizer=sum(2 * p.nbytes + 4 for p in trained), copies=_copies_bytes(policy),
        head=_head_bytes(policy, config.update.tokens_per_microbatch),
        engine_name=config.engine.name if engine is not None else None,
        engine=planned(num_requests, config.chat.max_prompt_tokens, sampling) if planned else {},
        capacity=torch.cuda.get_device_properties(policy.device).total_memory if policy.device.type == "cuda" else None)


def _copies_bytes(policy: Policy) -> int:
    # what autocast casts are the operands of matrix products
    cast = (p for p in policy.base.model.layers.parameters() if p.ndim == 2 and p.dtype != policy.dtype)
    return sum(p.numel() for p in cast) * policy.dtype.itemsize


def _head_bytes(policy: Policy, num_rows: int) -> int:
    """The chunk's float32 logits and their gradient, the weight in the compute dtype where it is not, the weight's float32
    gradient as it is summed up, and the gradient of the hidden states."""
    weight = policy.head_weight
    V, D = weight.shape
    size, rows = policy.dtype.itemsize, chunk_rows(num_rows, V, policy.device.type == "cuda")
    copy = 0 if weight.dtype == policy.dtype else V * D * size
    return rows * V * (4 + size) + copy + (4 * V * D if weight.requires_grad else 0) + num_rows * D * size


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _sum(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {_shown(size)}" for name, size in parts.items() if size)
    return f"{_shown(sum(parts.values()))} ({listed})"


def _shown(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"
