"""The logits of a decode step: float32 sums of bfloat16 products where the processor multiplies them, torch's elsewhere."""

import pytest
import torch
from fastlatent_kernels.decode_logits import decode_logits
from fastlatent_kernels.dispatch import use_backend
from fastlatent_kernels.token_logprob import head_logits
from fastlatent_kernels.vocab_head.native_bf16 import HAS_KERNEL


def inputs_of(B: int, D: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(B)
    return torch.randn(B, D, generator=g).bfloat16(), (3 * torch.randn(V, D, generator=g) / D**0.5).bfloat16()


# every rest of a quad and of a block of four, more than one group of 64; widths and vocabularies whole and not
@pytest.mark.parametrize(("B", "D", "V"), [(0, 8, 128), (1, 1, 1), (2, 31, 127), (3, 32, 129), (5, 64, 257), (16, 576, 1000),
                                           (64, 40, 4500), (71, 33, 4225), (131, 16, 300)])
def test_they_are_float64_s(B, D, V):
    hidden_BD, weight_VD = inputs_of(B, D, V)
    logits_BV = decode_logits(hidden_BD, weight_VD)
    assert logits_BV.dtype == torch.float32 and logits_BV.shape == (B, V)
    tolerance = {"rtol": 0, "atol": 2e-5} if HAS_KERNEL else {"rtol": 2**-7, "atol": 2**-7}  # rounded to bfloat16
    torch.testing.assert_close(logits_BV.double(), hidden_BD.double() @ weight_VD.double().t(), **tolerance)


def test_a_row_has_the_same_bits_in_any_company():
    if not HAS_KERNEL:
        return
    hidden_BD, weight_VD = inputs_of(70, 80, 9000)
    whole = decode_logits(hidden_BD, weight_VD)
    for chosen in (torch.tensor([69]), torch.arange(5, 13), torch.arange(69, -1, -3)):
        assert torch.equal(decode_logits(hidden_BD[chosen], weight_VD), whole[chosen])


def test_what_the_kernel_does_not_take_is_multiplied_by_torch():
    hidden_BD, weight_VD = (x.float() for x in inputs_of(5, 16, 300))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_VD)
    assert torch.equal(decode_logits(hidden_BD, weight_VD), head_logits(hidden_BD, weight_VD))
    assert torch.equal(decode_logits(hidden_BD, packed), head_logits(hidden_BD, packed))
    assert decode_logits(hidden_BD.double(), weight_VD.double()).dtype == torch.float64


def test_it_is_one_node_of_a_compiled_graph():
    compiled = torch.compile(decode_logits, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs_of(5, 16, 300)), decode_logits(*inputs_of(5, 16, 300)))


def test_a_forced_backend_is_not_passed_by():
    inputs = inputs_of(5, 64, 300)
    with use_backend("reference"):
        assert torch.equal(decode_logits(*inputs), head_logits(*inputs))
    with use_backend("native"):
        got = decode_logits(*inputs)
    assert torch.equal(got, decode_logits(*inputs))
    assert torch.equal(got, head_logits(*inputs)) is not HAS_KERNEL
