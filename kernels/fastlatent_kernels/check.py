"""Door checks shared by the ops: cheap, on the host, and never a wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS = frozenset("ABNST")
"""Letters of a dimension that may be empty; of every other there is at least one."""


def expect(name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...] = FLOATS,
           like: Tensor | None = None) -> None:
    """ValueError unless `tensor` has this shape (a letter: any size, 0 for those of `ROWS` alone), one of `dtypes` and
    the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    fits = tensor.ndim == len(shape) and all(
        (have > 0 or want in ROWS) if isinstance(want, str) else want == have
        for want, have in zip(shape, tensor.shape, strict=True))
    if fits and tensor.dtype in dtypes and (like is None or tensor.device == like.device):
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    empty = "".join(f" with {want} at least 1" for want, have in zip(shape, tensor.shape, strict=False)
                    if have == 0 and isinstance(want, str) and want not in ROWS)
    where = "" if like is None else f" on {like.device}"
    raise ValueError(
        f"{name}: expected a {kinds} tensor of shape [{', '.join(map(str, shape))}]{empty}{where}, got "
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}")


def expect_number(name: str, value: float, wanted: str, is_valid: bool) -> None:
    """Raise ValueError saying what was wanted unless `is_valid`."""
    if not is_valid:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def expect_top_k(top_k: int, vocab_size: int, limit: int) -> None:
    """Raise ValueError unless so many of a vocabulary can be kept."""
    most = min(limit, vocab_size)
    expect_number("top_k", top_k, f"a whole number from 1 to {most}", isinstance(top_k, int) and 1 <= top_k <= most)


def expect_ids(name: str, ids: Tensor, num_ids: int) -> None:
    """ValueError where `ids` on a CPU name something outside 0 .. num_ids - 1.

    Not asked on a GPU, which would have to be waited for, nor while a call is traced: there an op makes what such an id
    leads to NaN."""
    if not can_look(ids):
        return
    values = ids.numpy()
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= num_ids:
        raise ValueError(f"{name}: expected ids from 0 to {num_ids - 1}, got {least} to {most}")


def can_look(tensor: Tensor) -> bool:
    """Whether its numbers are there to be checked: by numpy, which reads host memory and can read nothing else."""
    return (tensor.is_cpu and tensor.numel() > 0 and not torch.compiler.is_compiling()
            and not isinstance(tensor, FakeTensor))


def expect_noise(seed: Tensor, counter_B3: Tensor, like: Tensor) -> None:
    """Raise ValueError unless seed and counters are what `fastlatent_kernels.noise` wants, for the rows of `like`."""
    expect("seed", seed, (), (torch.int64,), like)
    expect("counter_B3", counter_B3, (like.shape[0], 3), (torch.int64,), like)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Arithmetic is float32, and float64 where the input is."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
