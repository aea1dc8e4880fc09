"""How the plain structs that compiled kernels take (csrc/structs.h, csrc/cuda/*.h) are filled from Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def fill(arguments: Any, fields: Mapping[str, Any]) -> None:
    """Set members of the struct by name: of a tensor the address, of None nothing, which leaves the null it starts with.

    The struct holds no tensor: `fields` has to outlive the call of the kernel.
    """
    for name, value in fields.items():
        if value is not None:
            setattr(arguments, name, value.data_ptr() if isinstance(value, Tensor) else value)
