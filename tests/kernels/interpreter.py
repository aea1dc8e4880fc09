"""Makes Triton's interpreter, in which the kernels run where there is no GPU, treat bfloat16 as a GPU does.

The interpreter of triton 3.6 keeps bfloat16 as 16-bit integers: `tl.dot` multiplies the bits, arithmetic and sums add
them (triton#11584), and a store truncates where a GPU rounds to nearest even. Here dots take the values, stores round,
and whatever else would compute with bits raises. Loops up to a scalar tensor lean on a conversion that numpy 2.4
removed (triton#9171). `tl.maximum` and `tl.minimum` of NaN and a number give the number, as a GPU does.

Programs run one after the other here, and side by side on a GPU: `backwards` gives what leans on their order away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def install() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "fastlatent_patched", False):
        return
    builder.fastlatent_patched = True
    builder.create_dot = _dot_of_values(builder.create_dot)
    builder.cast_impl = _cast_that_rounds(builder.cast_impl)
    builder.binary_op = _no_bits(builder.binary_op)
    builder.create_fma = _no_bits(builder.create_fma)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.ReduceScanOpInterface.apply = _no_bits(interpreter.ReduceScanOpInterface.apply)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


@contextmanager
def backwards() -> Iterator[list[int]]:
    """Run the programs of every launch in the block last to first; yields how many each launch has had."""
    builder, num_programs = interpreter.InterpreterBuilder, []
    forward = builder.set_grid_idx

    def set_grid_idx(self, *at):
        if not any(at):
            num_programs.append(prod(self.grid_dim))
        forward(self, *(size - 1 - place for size, place in zip(self.grid_dim, at, strict=True)))

    builder.set_grid_idx = set_grid_idx
    try:
        yield num_programs
    finally:
        builder.set_grid_idx = forward


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_bfloat16(value) -> bool:
    return getattr(getattr(value, "dtype", None), "scalar", None) == tl.bfloat16


def _dot_of_values(dot):
    def create_dot(self, a, b, *rest):
        a, b = (TensorHandle(to_float32(x.data), tl.float32) if _is_bfloat16(x) else x for x in (a, b))
        return dot(self, a, b, *rest)

    return create_dot


def _cast_that_rounds(cast):
    def cast_impl(self, source, to):
        if _is_bfloat16(source) and to.scalar == tl.float32:
            return TensorHandle(to_float32(source.data), tl.float32)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, to)

    return cast_impl


def _no_bits(operation):
    def checked(self, *arguments):
        values = [x for given in arguments for x in (given if isinstance(given, tuple) else (given,))]
        if any(map(_is_bfloat16, values)):
            raise TypeError("bfloat16 arithmetic in the interpreter works on bits: .to(tl.float32) after the load")
        return operation(self, *arguments)

    return checked


def _with_index(patch_lang_tensor):
    def patched(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(())))

    return patched
