"""What the native CPU backends share: what they take, and how a row kernel is called."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlatent_kernels._C as _C
from fastlatent_kernels.structs import fill

DTYPES = (torch.float32, torch.bfloat16)


def why_not_cpu(*tensors: Tensor) -> str | None:
    """None where all are float32 or bfloat16 tensors on the CPU, else the sentence that refuses."""
    if all(t.device.type == "cpu" and t.dtype in DTYPES for t in tensors):
        return None
    return "native takes float32 and bfloat16 tensors on the CPU"


def empty_rows(logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty token_B, logprob_B and entropy_B; storages of their own, for outputs of an operator may not alias."""
    num_rows, device = logits_BV.shape[0], logits_BV.device
    token_B = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprob_B, entropy_B = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    return token_B, logprob_B, entropy_B


def run_rows(kernel, arguments, isa: str, *, logits: Tensor, temperature: float, counter: Tensor, **fields) -> None:
    """Fill the struct `arguments` (csrc/structs.h) and run `kernel` on it.

    Args:
        isa: instruction set, one of `_C.isas()`; "" takes the best.
        fields: members of the struct by name; of a tensor, which must be contiguous, the address.
    """
    logits, counter = logits.contiguous(), counter.contiguous()
    num_rows, vocab_size = logits.shape
    num_threads = max(1, min(torch.get_num_threads(), num_rows))
    scratch = torch.empty(num_threads, _C.scratch_floats(vocab_size), dtype=torch.float32)
    fields |= {"logits": logits, "logits_bf16": logits.dtype == torch.bfloat16, "rows": num_rows, "vocab": vocab_size,
               "inv_temperature": 1.0 / temperature, "counter": counter, "scratch": scratch, "threads": num_threads}
    fill(arguments, fields)
    kernel(arguments, isa)
