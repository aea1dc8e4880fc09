"""vLLM's attention on a CPU with blocks of 16 keys and values: what a group shares of its prompt are whole blocks.

Its kernels for plain vectors take multiples of 16, but its backend names multiples of 32, which those for AMX and ARM want; so
that of a prompt of 28 tokens nothing is shared.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

BLOCK_SIZE = 16


class SmallBlocks(CPUAttentionBackend):
    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE)]


def block_size(dtype: torch.dtype, head_size: int) -> int:
    """Tokens in a block for a model on this processor; where they are 16, vLLM is told of the backend above."""
    stock = CPUAttentionBackend.get_supported_kernel_block_sizes()[0].base
    if _get_attn_isa(dtype, stock, head_size) not in ("vec", "vec16"):
        return stock
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{SmallBlocks.__module__}.{SmallBlocks.__qualname__}")
    return BLOCK_SIZE
