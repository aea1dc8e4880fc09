"""Door checks shared by the ops: cheap, on the host, and never a wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expect(name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...] = FLOATS,
           like: Tensor | None = None) -> None:
    """ValueError unless `tensor` has this shape (a letter: any size), one of `dtypes` and the device of `like`."""
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, tensor.shape, strict=True))
    if fits and tensor.dtype in dtypes and (like is None or tensor.device == like.device):
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    where = "" if like is None else f" on {like.device}"
    raise ValueError(
        f"{name}: expected a {kinds} tensor of shape [{', '.join(map(str, shape))}]{where}, got "
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}")


def expect_number(name: str, value: float, wanted: str, is_valid: bool) -> None:
    """Raise ValueError saying what was wanted unless `is_valid`."""
    if not is_valid:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def expect_noise(seed: Tensor, counter_B3: Tensor, like: Tensor) -> None:
    """Raise ValueError unless seed and counters are what `fastlatent_kernels.noise` wants, for the rows of `like`."""
    expect("seed", seed, (), (torch.int64,), like)
    expect("counter_B3", counter_B3, (like.shape[0], 3), (torch.int64,), like)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Arithmetic is float32, and float64 where the input is."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
