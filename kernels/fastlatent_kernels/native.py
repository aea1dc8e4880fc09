"""What the native CPU backends share: the namespace of their torch operators, and the reasons they cannot run."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlatent_kernels._C as _C

# registered as torch operators so that torch.compile keeps them as nodes of its graph; the module keeps the library alive
LIBRARY = torch.library.Library("fastlatent", "FRAGMENT")

DTYPES = (torch.float32, torch.bfloat16)


def why_not_cpu(*tensors: Tensor) -> str | None:
    """None where all are float32 or bfloat16 tensors on the CPU, else the sentence that refuses."""
    if all(t.device.type == "cpu" and t.dtype in DTYPES for t in tensors):
        return None
    return "native takes float32 and bfloat16 tensors on the CPU"


def row_arguments(logits_BV: Tensor, temperature: float, seed: Tensor, counter_B3: Tensor, greedy: bool, token_B: Tensor,
                  logprob_B: Tensor, entropy_B: Tensor, scratch: Tensor) -> tuple:
    """The leading arguments of every native function over rows of logits; all tensors contiguous and kept alive by the caller."""
    return (logits_BV.data_ptr(), logits_BV.dtype == torch.bfloat16, *logits_BV.shape, temperature, seed.data_ptr(),
            counter_B3.data_ptr(), greedy, token_B.data_ptr(), logprob_B.data_ptr(), entropy_B.data_ptr(), scratch.data_ptr(),
            scratch.shape[0])


def row_outputs(logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty token_B, logprob_B and entropy_B."""
    num_rows = logits_BV.shape[0]
    token_B = torch.empty(num_rows, dtype=torch.int64, device=logits_BV.device)
    return token_B, *torch.empty(2, num_rows, device=logits_BV.device).unbind()


def row_scratch(logits_BV: Tensor) -> Tensor:
    """[threads, floats]: as many threads as torch uses, at most one a row."""
    num_threads = max(1, min(torch.get_num_threads(), logits_BV.shape[0]))
    return torch.empty(num_threads, _C.scratch_floats(logits_BV.shape[1]))
