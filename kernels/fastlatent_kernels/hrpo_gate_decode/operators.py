"""How a backend of hrpo_gate_decode becomes a torch operator that writes its output in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastlatent_kernels.library import LIBRARY


def register(backend: str, devices: tuple[str, ...], run: Callable[..., None]) -> Callable[..., None]:
    """Define `fastlatent::hrpo_gate_decode_<backend>` and return it; `run` takes its arguments and fills `out`."""
    name = f"hrpo_gate_decode_{backend}"
    LIBRARY.define(f"{name}(Tensor token_ids, Tensor mixture, Tensor table, Tensor weight, Tensor bias, Tensor lamb, "
                   "Tensor latent, Tensor(a!) out, float compat_eps) -> ()")
    for device in devices:
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fastlatent::{name}", lambda *arguments: None, lib=LIBRARY)
    return getattr(torch.ops.fastlatent, name)
