"""What is measured of an op: its benchmark shapes, its inputs, and what a forward and a backward pass must do at least.

Everything is found from the op and its `cases.py`: which inputs get a gradient is what the reference gives one to. A
backward pass moves at least what the forward pass does (the inputs again, cotangents as large as the outputs) and the
gradients, and takes two GEMMs for each one of the forward pass; that of an op whose reference multiplies nothing there,
because its forward pass has made the gradients, only scales them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from fastlatent_kernels.dispatch import Op
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benches.kernels_clock import Work
from benches.kernels_roofline import Ceilings

MODELS = {
    "smollm2-135m": (576, 49152), "smollm2-1.7b": (2048, 49152), "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936), "qwen2.5-3b": (2048, 151936), "llama-3.2-1b": (2048, 128256)}
"""Width and vocabulary that `--model` puts in place of D and V in every shape that has them."""

DIRECTIONS = ("forward", "backward", "both")

Call = Callable[[], tuple[Tensor, ...]]  # an implementation on a case's inputs, giving what `Case.picked` picks


@dataclass(frozen=True, slots=True)
class Case:
    op: Op
    shape: dict[str, Any]
    dtype: torch.dtype
    inputs: dict[str, Any]  # those with a gradient are leaves
    differentiable: tuple[int, ...]  # places of the outputs that have a gradient
    cotangents: tuple[Tensor, ...]  # of these
    is_fused: bool  # its forward pass makes the gradients

    @property
    def leaves(self) -> list[Tensor]:
        return [value for value in self.inputs.values() if isinstance(value, Tensor) and value.requires_grad]

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if self.differentiable else DIRECTIONS[:1]

    def picked(self, outputs: Any) -> tuple[Tensor, ...]:
        """Of an op's outputs those with a gradient; all of an op without."""
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(outputs[i] for i in self.differentiable) if self.differentiable else outputs

    def work(self, call: Call, direction: str) -> Work:
        """`call` in one direction; a forward pass keeps what its backward pass will need, as in training."""
        if direction == "forward":
            return Work(lambda _: call())
        if direction == "backward":
            return Work(self._gradients, call)
        return Work(lambda _: self._gradients(call()))

    def _gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        # a rival may return the first outputs only
        return torch.autograd.grad(outputs, self.leaves, self.cotangents[:len(outputs)], allow_unused=True)

    def bytes_moved(self, direction: str) -> int:
        """Least traffic of a pass."""
        forward, gradients = module(self.op).bytes_moved(self.shape, self.dtype), sum(x.nbytes for x in self.leaves)
        if self.is_fused:
            return {"forward": forward, "backward": 2 * gradients, "both": forward}[direction]
        return {"forward": forward, "backward": forward + gradients, "both": 2 * forward + gradients}[direction]

    def flops(self, direction: str) -> int:
        """Operations of the GEMMs of a pass; 0 for an op without."""
        passes = {"forward": 1, "backward": 0, "both": 1} if self.is_fused else {"forward": 1, "backward": 2, "both": 3}
        return passes[direction] * forward_flops(self.op, self.shape)


def module(op: Op) -> ModuleType:
    return importlib.import_module(f"{op.__module__}.cases")


def shapes(op: Op, model: str | None, quick: bool) -> list[dict[str, Any]]:
    """The shapes to measure: the op's own, at a model's sizes where one is named; a test's for `quick`."""
    if quick:
        return [module(op).TEST_SHAPES[1]]
    width, vocab = MODELS[model] if model is not None else (None, None)
    sizes = {} if model is None else {"D": width, "V": vocab}
    found = [{key: sizes.get(key, value) for key, value in shape.items()} for shape in module(op).BENCH_SHAPES]
    return [shape for i, shape in enumerate(found) if shape not in found[:i]]


def rows(shape: Mapping[str, Any]) -> int:
    """Of its sizes the first: tokens, rows of a decode step, or groups."""
    return next(iter(shape.values()))


def make(op: Op, shape: dict[str, Any], dtype: torch.dtype, device: str) -> Case:
    """Inputs on the device, those that the reference gives a gradient to as leaves, and cotangents for its outputs."""
    inputs = module(op).make_inputs(shape, dtype=dtype, device=device)
    leaves = [value.requires_grad_() for value in inputs.values() if _is_float(value)]
    outputs = op.reference(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # not requires_grad: an output may be an input, written in place without gradient
    places = tuple(i for i, out in enumerate(outputs) if _is_float(out) and out.grad_fn is not None)
    if not places:
        for leaf in leaves:
            leaf.requires_grad_(False)
        return Case(op, shape, dtype, inputs, (), (), False)
    live = [outputs[i] for i in places]
    cotangents = tuple(_cotangent(out) for out in live)
    with FlopCounterMode(display=False) as counter:
        gradients = torch.autograd.grad(live, leaves, cotangents, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.requires_grad_(gradient is not None)
    is_fused = forward_flops(op, shape) > 0 and counter.get_total_flops() == 0
    return Case(op, shape, dtype, inputs, places, cotangents, is_fused)


def _cotangent(out: Tensor) -> Tensor:
    """That of a loss is 1, as in training."""
    return torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out)


def floor_s(op: Op, shape: Mapping[str, Any], dtype: torch.dtype, limits: Ceilings) -> float:
    """Least seconds of a forward pass."""
    return limits.floor_s(module(op).bytes_moved(shape, dtype), forward_flops(op, shape))


def forward_flops(op: Op, shape: Mapping[str, Any]) -> int:
    count = getattr(module(op), "flops", None)
    return 0 if count is None else count(shape)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
