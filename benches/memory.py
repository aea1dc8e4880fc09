"""How much memory a piece of work needs on top of what was held when it began."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

PROC = Path("/proc/self")


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Most memory held at once while `work` runs, less what was held before; None where the system does not tell.

    With a GPU in use it is torch's allocated device memory, else the resident memory of the process. Nothing should be
    timed meanwhile: memory is handed back to the system first, and faulting it in again costs.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        # free pages that the allocator keeps would hide what the work asks for
        ctypes.CDLL(None).malloc_trim(0)
        (PROC / "clear_refs").write_text("5")  # the peak starts anew from here, see proc_pid_clear_refs(5)
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
