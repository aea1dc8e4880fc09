"""Linear layers whose float32 weights are laid out for oneDNN's CPU GEMM once per weight update, not once per product.

A decode step multiplies a few rows with every weight of the model. For 64 rows of SmolLM2-135M, on two cores with AVX2, these
products took 133 ms a step in place of 180. It costs a second copy of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


class PrepackedLinear(nn.Module):
    """Stands in for `linear`, with the same parameters under the same names; forward only.

    `pack` has to follow every change of the weight: until then the layer multiplies with the old one.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: Tensor | None = None

    def pack(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepack(model: nn.Module) -> list[PrepackedLinear]:
    """Replace every linear layer of `model`, in place; the layers to `pack` when weights have arrived."""
    layers = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                layers.append(PrepackedLinear(child))
                setattr(parent, name, layers[-1])
    return layers
