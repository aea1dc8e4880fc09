"""Triton's interpreter as a backend for CPUs, so that vLLM's second model runner, whose kernels are Triton's, runs without a
GPU.

Import before vllm, in a process of its own.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends  # noqa: E402


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


backends.setdefault("cpu", SimpleNamespace(driver=_Driver, compiler=None))
