"""A temperature as the heads take it: one number for all rows, or a tensor with one for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent_kernels.check import FLOATS, can_look, expect, expect_number

Temperature = float | Tensor


def check_temperature(temperature: Temperature, hidden_AD: Tensor) -> None:
    """ValueError unless it is above 0 and, where it is a tensor, a floating [A] beside `hidden_AD`.

    Numbers in a tensor are looked at on a CPU, and not while a call is traced; see `rows_temperature`."""
    if not isinstance(temperature, Tensor):
        expect_number("temperature", temperature, "a number above 0", temperature > 0)
        return
    expect("temperature", temperature, (hidden_AD.shape[0],), FLOATS[:2], like=hidden_AD)
    if can_look(temperature):
        least = float(temperature.detach().numpy().min())
        expect_number("temperature", least, "numbers above 0", least > 0)


def rows_temperature(temperature: Temperature, dtype: torch.dtype) -> Temperature:
    """A number as it is; a tensor in `dtype`, NaN where it is not above 0: such a row must not pass for one."""
    if not isinstance(temperature, Tensor):
        return temperature
    return torch.where(temperature > 0, temperature, torch.nan).to(dtype)


def of_rows(temperature: Temperature, rows: slice) -> Temperature:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature


def column(temperature: Temperature) -> Temperature:
    """As it divides a tensor of rows: [R] as [R, 1]."""
    return temperature[:, None] if isinstance(temperature, Tensor) else temperature


def cool(logits_RV: Tensor, temperature: Temperature) -> None:
    """Divide the rows of logits by their temperature, in place."""
    if isinstance(temperature, Tensor) or temperature != 1.0:
        logits_RV /= column(temperature)
