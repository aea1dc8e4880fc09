"""The implementations measured beside each other in one case: eager and compiled reference, our backends, rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException

from benches.kernels_cases import Case
from benches.kernels_clock import Work
from benches.kernels_rivals import RIVALS, Refused, Rival

EAGER, COMPILE = "eager", "torch.compile"

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative difference of a rival's result that is the same but for rounding."""


class Lineup(NamedTuple):
    works: dict[str, dict[str, Work]]  # direction -> variant -> what is timed
    refused: dict[str, str]  # variant -> why it is not timed


def lineup(case: Case, backends: Sequence[str], has_compiled: bool = True) -> Lineup:
    """Every variant of `case`, run once in each of its directions; `backends` are those of ours to ask."""
    makers: dict[str, Callable[[], dict[str, Work]]] = {EAGER: partial(_works, case, case.op.reference)}
    if has_compiled:
        makers[COMPILE] = partial(_works, case, _compiled(case))
    makers |= {name: partial(_ours, case, name) for name in backends}
    makers |= {name: partial(_rival, case, make) for name, make in RIVALS.get(case.op.name, {}).items()}
    out = Lineup({direction: {} for direction in case.directions}, {})
    for name, make in makers.items():
        try:
            works = make()
            for work in works.values():
                work.run(work.state())  # what a first call compiles and allocates is not timed
        except torch.OutOfMemoryError:
            out.refused[name] = "out of memory"
        except (Refused, TorchDynamoException) as error:
            out.refused[name] = str(error).splitlines()[0]
        else:
            for direction, work in works.items():
                out.works[direction][name] = work
    return out


def _works(case: Case, implementation: Callable[..., Any]) -> dict[str, Work]:
    call = lambda: case.picked(implementation(**case.inputs))
    return {direction: case.work(call, direction) for direction in case.directions}


def _compiled(case: Case) -> Callable[..., Any]:
    torch._dynamo.reset()  # each case anew: after some recompilations dynamo would quietly run eagerly
    # a function of its own, for dynamo knows what it has compiled by its code
    return torch.compile(lambda **inputs: case.op.reference(**inputs), dynamic=False)


def _ours(case: Case, backend: str) -> dict[str, Work]:
    reason = case.op.why_not(backend, **case.inputs)
    if reason is not None:
        raise Refused(reason)
    if backend == "triton":
        from fastlatent_kernels.triton_support import INTERPRETED  # imports triton, which need not be installed

        if INTERPRETED:
            raise Refused("interpreted (TRITON_INTERPRET=1), which is no measurement")
    return _works(case, partial(case.op, backend=backend))


def _rival(case: Case, make: Callable[[dict[str, Any]], Rival]) -> dict[str, Work]:
    rival = make(case.inputs)
    if not rival.is_checked:
        return {"both": Work(lambda _: rival.call())}
    want = case.picked(case.op.reference(**case.inputs | rival.options))[0].detach().float()
    difference = float((rival.call().detach() - want).norm() / want.norm())
    if not difference <= TOLERANCE[case.dtype]:
        raise Refused(f"it gives something else than the reference: the relative difference is {difference:.2g}")
    call = lambda: (rival.call(),)
    return {direction: case.work(call, direction) for direction in case.directions}
