"""Where code of ours makes the host wait for the device while vLLM draws: in a step, and between one and the next."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode

from benches.steps import Operators

TO_HOST = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
"""No operators, or none whose name says that somebody waits; `benches.steps` sees the others."""
FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy)
"""Before the host may go on, a GPU has to have read its numbers."""


class Crossings(TorchFunctionMode):
    """Where our code asks for a device's numbers, or makes tensors of the host's."""

    def __init__(self):
        super().__init__()
        self.to_host: list[str] = []
        self.from_host: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        module = sys._getframe(1).f_globals.get("__name__", "")
        if function in TO_HOST and module.startswith("fastlatent."):  # the kernels look where there is a CPU, and only there
            self.to_host.append(f"{function.__name__} in {module}")
        if function in FROM_HOST and module.startswith("fastlatent"):
            self.from_host.append(f"{function.__name__} in {module}")
        return function(*args, **(kwargs or {}))


@dataclass(slots=True)
class Watched:
    operators: Operators = field(default_factory=Operators)
    crossings: Crossings = field(default_factory=Crossings)
    num_steps: int = 0
    num_ended: int = 0  # completions that ended while others went on

    @property
    def waits(self) -> list[str]:
        return self.operators.own_syncs_seen + self.crossings.to_host


@contextmanager
def watched(engine) -> Iterator[Watched]:
    """Watch a draw of a vLLM engine from its first step on, until no completion is left to go on."""
    out, stock, open_now = Watched(), engine.engine.step, ExitStack()

    def step():
        if not out.num_steps:
            open_now.enter_context(out.operators)
            open_now.enter_context(out.crossings)
        outputs = stock()
        out.num_steps += 1
        if engine.engine.has_unfinished_requests():
            out.num_ended += sum(output.finished for output in outputs)
        else:
            open_now.close()
        return outputs

    engine.engine.step = step
    try:
        yield out
    finally:
        open_now.close()
        engine.engine.step = stock
