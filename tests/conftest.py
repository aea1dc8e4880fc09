"""What every test runs under: one torch thread, fresh memory full of NaN, Triton in its interpreter and tests that need a
GPU skipped where there is none."""

import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    # triton reads it when a kernel is decorated, and trl, too, imports triton
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill what torch.empty and its relatives return: memory read before it is written must not pass for a result."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make):
    @functools.wraps(make)
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.detach().fill_(torch.nan).requires_grad_(tensor.requires_grad)
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    return poisoned
