"""What has to be known of a Triton kernel to compile it ahead of time, for a GPU that is not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compile:
    """One kernel at its production shape."""

    kernel: Any  # triton.JITFunction
    signature: dict[str, str]  # argument -> "*bf16", "*fp32", "i32", "fp32" ...; constexpr arguments are left out
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""  # tells entries of one kernel apart
    requires: tuple[str, ...] = ()  # what the SASS for sm_90a must hold, as in ("HGMMA",)
    unaligned: tuple[str, ...] = field(default=())  # arguments that are not multiples of 16 (pointers: 16-byte aligned)

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.kernel.__name__, self.label)))
