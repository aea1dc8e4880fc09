"""Kernel tests run Triton in its interpreter where there is no GPU: a patched one (interpreter.py)."""

import torch

if torch.cuda.is_available():
    collect_ignore = ["test_interpreter.py"]
else:
    from interpreter import install

    install()
