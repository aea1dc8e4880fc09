"""The attention of short segments on a CPU: torch's forward to the bit, and gradients as near to float64's as torch's are."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastlatent.models import short_attention

SCALING = 0.3


def inputs(S: int, heads: int, key_heads: int, L: int, K: int) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of what comes out, strided as packed ones are."""
    torch.manual_seed(S * L + K)
    return [torch.randn(S, n, h, 16).to(torch.bfloat16).transpose(1, 2)
            for n, h in ((L, heads), (K, key_heads), (K, key_heads), (L, heads))]


def with_torch(query, key, value, visible, grad, dtype) -> list[torch.Tensor]:
    """Output and gradients by torch's own attention, its key heads repeated."""
    query, key, value = (x.to(dtype).detach().requires_grad_() for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    mask = None if visible is None else visible[:, None]
    out = scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=mask, is_causal=mask is None,
        scale=SCALING)
    return [out, *torch.autograd.grad(out, (query, key, value), grad.to(dtype))]


def prefixed(S: int, L: int, P: int) -> torch.Tensor:
    """A prefix of another length for each segment, one without, and what came before within it."""
    prefix = torch.arange(P) < torch.randint(0, P + 1, (S, 1)).index_fill_(0, torch.tensor([0]), 0)
    return torch.cat([prefix[:, None].expand(S, L, P), torch.ones(S, L, L, dtype=torch.bool).tril()], dim=2)


@pytest.mark.parametrize("heads, key_heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("S, L, P", [(1, 1, 0), (5, 33, 0), (3, 128, 0), (5, 20, 41)])
def test_gradients_are_as_near_to_float64_as_those_of_torch(heads, key_heads, S, L, P):
    query, key, value, grad = inputs(S, heads, key_heads, L, P + L)
    visible = prefixed(S, L, P) if P else None
    assert short_attention.is_faster(query, key)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = short_attention.attend(*leaves, visible, SCALING)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    torchs = with_torch(query, key, value, visible, grad, torch.bfloat16)
    exact = with_torch(query, key, value, visible, grad, torch.float64)
    assert torch.equal(out, torchs[0])
    for name, mine, theirs, true in zip(("out", "query", "key", "value"), got, torchs, exact, strict=True):
        error, allowed = ((x.double() - true).abs().max() for x in (mine, theirs))
        assert error <= 1.5 * allowed + torch.finfo(torch.bfloat16).eps * true.abs().max() / 8, name


def test_a_backward_under_autocast_as_a_compiled_one_is_traced_gives_the_same():
    *leaves, grad = inputs(5, 6, 2, 33, 33)
    leaves = [x.requires_grad_() for x in leaves]

    def gradients(is_autocast: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            return torch.autograd.grad(short_attention.attend(*leaves, None, SCALING), leaves, grad)

    assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.parametrize("dtype, keys", [(torch.float32, 8), (torch.bfloat16, short_attention.MOST_KEYS + 1)])
def test_what_torch_does_as_fast_is_left_to_it(dtype, keys):
    assert not short_attention.is_faster(torch.empty(1, 1, keys, 16, dtype=dtype), torch.empty(1, 1, keys, 16, dtype=dtype))
