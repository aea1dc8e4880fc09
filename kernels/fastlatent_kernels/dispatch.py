"""One op, several implementations: choose one per call, and be able to say why.

An op is a plain torch function marked with `@op`. Its body is the reference: readable, correct on any device, and what
every other implementation is tested against. `<op>/<name>_impl.py` registers a backend, a faster implementation of the
whole op.

The choice has two questions for each backend, in order: can it run this call (`why_not`), and does it pay
(`passed_over`), by rule or by what `measured.py` knows? A backend named by the caller is asked only the first.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastlatent_kernels import measured

OPS: dict[str, Op] = {}
"""Every op by name; tests and benchmarks iterate over it."""

OPTIONAL_PACKAGES = ("triton", "fastlatent_kernels._C", "fastlatent_kernels._cuda")

# a plain global and no ContextVar: torch.compile guards on it, so compiled code follows use_backend
_forced: str | None = os.environ.get("FASTLATENT_BACKEND") or None


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this call."""

    def __init__(self, op: str, backend: str, reason: str):
        super().__init__(f"{op}: {reason}")
        self.backend, self.reason = backend, reason


class Op:
    """A dispatching callable around a reference function."""

    def __init__(self, reference: Callable, backends: tuple[str, ...], check: Callable[..., None] | None):
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.order = backends  # fastest first; the reference is always last
        self._check = check
        self._impls: dict[str, Callable] = {"reference": reference}
        self._supports: dict[str, Callable[..., str | None]] = {}
        self._rules: dict[str, Callable[..., str | None]] = {}
        self.measured = measured.TABLE.get(self.name, {})
        self._first = next(iter(inspect.signature(reference).parameters))
        OPS[self.name] = self

    def backend(self, name: str, *, supports: Callable[..., str | None],
                rule: Callable[..., str | None] | None = None) -> Callable[[Callable], Callable]:
        """Register an implementation.

        Args:
            supports: called with the op's arguments; returns None, or the sentence that says why it cannot run.
            rule: called likewise where it can; returns None, or the sentence that says why only a caller who names it
                gets it. What was measured to be slow needs no rule.
        """

        def register(impl: Callable) -> Callable:
            self._impls[name], self._supports[name] = impl, supports
            if rule is not None:
                self._rules[name] = rule
            return impl

        return register

    def why_not(self, name: str, *args, **kwargs) -> str | None:
        """None when `name` can run this call, else one sentence saying why it cannot."""
        if name == "reference":
            return None
        if name not in self.order:
            return f"{name} is no backend of it (it has {', '.join((*self.order, 'reference'))})"
        missing = _load(f"{self.__module__}.{name}_impl")
        return missing if missing is not None else self._supports[name](*args, **kwargs)

    def passed_over(self, name: str, *args, **kwargs) -> str | None:
        """None when the automatic choice takes `name`, which can run this call, else one sentence saying why not."""
        reason = self.by_rule(name, *args, **kwargs)
        if reason is not None or not self.measured:
            return reason
        first = args[0] if args else kwargs[self._first]
        known = self.measured.get((name, first.device.type))
        # asked only where the answer counts: torch.compile would guard on the rows
        if known is None or not known.is_ever_slower:
            return None
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        is_half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors)
        return known.slower(first.shape[0], learns, is_half)

    def by_rule(self, name: str, *args, **kwargs) -> str | None:
        """None unless a rule, whatever was measured, keeps the automatic choice from `name`: else its sentence."""
        if name == "triton" and _is_interpreted():
            return "its interpreter is for tests: name it to run it"
        return self._rules[name](*args, **kwargs) if name in self._rules else None

    def chosen(self, *args, **kwargs) -> str:
        """Name of the backend this call would use; raises as the call itself would."""
        if self._check is not None:
            self._check(*args, **kwargs)
        if _forced is not None:
            return self._named(_forced, *args, **kwargs)
        for name in self.order:
            if self.why_not(name, *args, **kwargs) is None and self.passed_over(name, *args, **kwargs) is None:
                return name
        return "reference"

    def __call__(self, *args, backend: str | None = None, **kwargs):
        """Run the op: on `backend` if named here or by `use_backend`, else on the first that can and that pays."""
        if backend is None:
            name = self.chosen(*args, **kwargs)
        else:
            if self._check is not None:
                self._check(*args, **kwargs)
            name = self._named(backend, *args, **kwargs)
        return self._impls[name](*args, **kwargs)

    def _named(self, name: str, *args, **kwargs) -> str:
        # asked for by name: never silently replaced
        reason = self.why_not(name, *args, **kwargs)
        if reason is not None:
            raise BackendUnavailable(self.name, name, reason)
        return name


def op(*, backends: tuple[str, ...] = (), check: Callable[..., None] | None = None) -> Callable[[Callable], Op]:
    """Mark a torch function as an op whose backends live beside it in `<name>_impl.py`, fastest first.

    Args:
        check: called with the op's arguments before any backend; raises ValueError naming the argument that is wrong.
    """
    return lambda reference: Op(reference, backends, check)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on one backend; an op that cannot raises. None is the automatic choice.

    Holds for the whole process, not for one thread."""
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def allows(name: str) -> bool:
    """Whether the caller of no op in particular may use this backend: none was forced, or this one."""
    return _forced in (None, name)


_loaded: dict[str, str | None] = {}


@torch.compiler.assume_constant_result  # an import cannot be traced, and its outcome does not change
def _load(module: str) -> str | None:
    """Import a backend module, which registers itself; the reason where its optional package is absent."""
    if module not in _loaded:
        try:
            importlib.import_module(module)
            _loaded[module] = None
        except ModuleNotFoundError as error:
            # only the optional package itself may be absent; any other failure is a bug and travels
            if error.name not in OPTIONAL_PACKAGES:
                raise
            _loaded[module] = f"{error.name} is not installed"
    return _loaded[module]


@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter; asked only once a Triton backend has been imported."""
    from fastlatent_kernels.triton_support import INTERPRETED

    return INTERPRETED
