"""Kernel tests run Triton in its interpreter where there is no GPU: a patched one (interpreter.py).

Where there is one Triton compiles, for test_ops.py and test_triton_support.py, and takes no CPU tensors: the files that
give it such are left out. TRITON_INTERPRET=1 runs all of them there too.
"""

import os

import torch

if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0":
    collect_ignore = [f"test_{name}.py" for name in (
        "advantage", "gate", "gate_decode", "gaussian_noise", "gaussian_reparam", "interpreter", "not_a_number",
        "policy_gradient_triton", "program_order", "soft_embedding", "token_logprob", "topk_gumbel", "topk_mixture",
        "vocab_head_triton")]
else:
    from interpreter import install

    install()
