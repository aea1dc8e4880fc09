"""What the CUDA backends share: when they can run, and why no call takes one that was not named."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not_cuda(tensor: Tensor) -> str | None:
    """None for a tensor of the device on which a kernel would be launched, else the sentence that refuses."""
    if not tensor.is_cuda:
        return "cuda takes CUDA tensors"
    return None if tensor.get_device() == torch.cuda.current_device() else "cuda takes tensors of the current CUDA device"


def never_run(*args, **kwargs) -> str:
    """The rule of every CUDA backend so far, see `Op.backend`."""
    return "compiled, but never run on a GPU: name it to run it"
