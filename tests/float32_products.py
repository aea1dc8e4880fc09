"""What tests/test_vllm_start.py runs in a process of its own: how a Triton kernel that does not say so multiplies float32 on a
Hopper GPU, for which it is compiled here."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a_ptr, b_ptr, out_ptr):
    place = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))  # as vLLM's attention writes it


if __name__ == "__main__":
    source = ASTSource(product, dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32"))
    print("tf32" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
