"""soft_embedding by hand: repeated ids, ids nobody names, either gradient alone, ids that are none, native twins."""

import math

import pytest
import torch
from fastlatent_kernels import soft_embedding

BACKENDS = ["reference", "native", "triton"]


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_and_gradients_worked_by_hand(backend, index_dtype):
    ids = torch.tensor([[2, 0, 2], [1, 1, 0]], dtype=index_dtype)
    weight = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]], requires_grad=True)
    table = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [math.nan, math.inf]], requires_grad=True)
    out = soft_embedding(ids, weight, table, backend=backend)
    assert out.tolist() == [[14.0, 140.0], [0.0, 0.0]]
    out.backward(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert weight.grad.tolist() == [[3.0, 1.0, 3.0], [40.0, 40.0, 20.0]]
    # id 0: 2 * (1, 0) - 1 * (0, 2); id 1: 0.5 * (0, 2); id 2: 4 * (1, 0); id 3 is never named
    assert table.grad.tolist() == [[2.0, -2.0], [0.0, 1.0], [4.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("wanted", ["weight", "table"])
def test_either_gradient_alone_is_that_of_both(backend, wanted):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (5, 21), generator=generator)
    leaves = {"weight": torch.randn(5, 21, generator=generator).bfloat16().requires_grad_(),
              "table": torch.randn(9, 35, generator=generator).bfloat16().requires_grad_()}
    cotangent = torch.randn(5, 35, generator=generator).bfloat16()
    both = torch.autograd.grad(soft_embedding(ids, *leaves.values(), backend=backend), [*leaves.values()], cotangent)
    for name in leaves.keys() - {wanted}:
        leaves[name] = leaves[name].detach()
    out = soft_embedding(ids, *leaves.values(), backend=backend)
    (alone,) = torch.autograd.grad(out, leaves[wanted], cotangent)
    assert alone.dtype == torch.bfloat16 and torch.equal(alone, both[["weight", "table"].index(wanted)])


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_native_names_ids_that_are_none(bad):
    ids, weight, table = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), torch.ones(7, 4)
    ids[1, 2] = bad
    with pytest.raises(ValueError, match="^ids_NK: expected ids from 0 to 6, got .*" + str(bad)):
        soft_embedding(ids, weight, table, backend="native")


def test_triton_gives_nan_for_ids_that_are_none_and_reads_no_foreign_memory():
    ids, weight = torch.zeros(6, 3, dtype=torch.int64), torch.ones(6, 3, requires_grad=True)
    table = torch.ones(7, 4, requires_grad=True)
    ids[1, 2], ids[3, 0], ids[5, 1] = -1, 7, 2**40
    out = soft_embedding(ids, weight, table, backend="triton")
    assert out.isnan().all(dim=1).tolist() == [False, True, False, True, False, True]
    assert (out[::2] == 3).all()
    out[::2].sum().backward()
    assert table.grad[:, 0].tolist() == [9.0] + 6 * [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_kernels_agree_on_every_instruction_set_and_number_of_threads(dtype):
    import fastlatent_kernels._C as _C
    from fastlatent_kernels.soft_embedding import native_impl as native

    generator = torch.Generator().manual_seed(1)
    N, K, V, D = 40, 11, 60, 131
    ids, weight = torch.randint(V, (N, K), generator=generator), torch.randn(N, K, generator=generator)
    table, grad = (torch.randn(rows, D, generator=generator).to(dtype) for rows in (V, N))
    id_P, place_P = ids.flatten().sort(stable=True)
    begin_U = torch.searchsorted(id_P, torch.arange(V + 1))
    rows = table[ids].double()
    wants = (torch.einsum("nk,nkd->nd", weight.double(), rows), torch.einsum("nd,nkd->nk", grad.double(), rows),
             torch.zeros(V, D, dtype=torch.float64).index_add(
                 0, ids.flatten(), (weight.double()[:, :, None] * grad.double()[:, None]).flatten(0, 1)))
    for isa in _C.isas():
        threaded = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            try:
                got = torch.empty(N, D, dtype=dtype), torch.empty(N, K), torch.empty(V, D, dtype=dtype)
                native.forward(ids, weight, table, got[0], isa=isa)
                native.weight_gradient(grad, ids, table, got[1], isa=isa)
                native.table_gradient(grad, weight, place_P, begin_U, got[2], isa=isa)
            finally:
                torch.set_num_threads(1)
            threaded.append(got)
        assert all(torch.equal(a, b) for a, b in zip(*threaded, strict=True))
        for value, want in zip(got, wants, strict=True):
            tolerance = 2 * torch.finfo(value.dtype).eps + 1e-6
            torch.testing.assert_close(value.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())
