"""Every backend of the gate against numbers worked by hand and float64, and where it becomes the plain token."""

import math

import pytest
import torch
from fastlatent_kernels import hrpo_gate, soft_embedding
from fastlatent_kernels.hrpo_gate import gate_decay
from fastlatent_kernels.hrpo_gate.cases import make_inputs
from torch.library import opcheck

BACKENDS = ["reference", "native", "triton"]
FUSED = ["native", "triton"]


def by_hand(u_r, u_i, token, mixture, bias_r, bias_i, lam, eps=0.0):
    """The formula with Python floats, one channel."""
    r, i = 1 / (1 + math.exp(-(u_r + bias_r))), 1 / (1 + math.exp(-(u_i + bias_i)))
    log_a = -8 * math.log1p(math.exp(-lam)) * r
    return math.exp(log_a) * token + math.sqrt(-math.expm1(2 * log_a) + eps) * i * mixture


def test_gate_equals_the_formula_worked_by_hand():
    u, token, mixture = [[0.5, -1.0, 2.0, 0.25]], [[1.5, -2.0]], [[0.75, 3.0]]
    bias, lam = [0.1, -0.2, 0.3, 0.4], [6.68, 2.0]
    for eps in (0.0, 1e-8, 1e-2):
        want = [by_hand(u[0][d], u[0][2 + d], token[0][d], mixture[0][d], bias[d], bias[2 + d], lam[d], eps)
                for d in range(2)]
        args = [torch.tensor(x, dtype=torch.float64) for x in (u, token, mixture, bias, lam)]
        got = hrpo_gate(*args, torch.tensor([True]), eps)
        torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64), rtol=1e-13, atol=0)
    # Lambda = -log(0.99^(-1/8) - 1) makes a = 0.99 where r = 1, and a = sqrt(0.99) where r = 1/2
    lam = torch.tensor([-math.log(0.99 ** (-1 / 8) - 1)], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert gate_decay(zero + 50, zero[0], lam).item() == pytest.approx(0.99, abs=1e-12)
    assert gate_decay(zero, zero[0], lam).item() == pytest.approx(math.sqrt(0.99), abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_that_are_not_latent_are_the_token_bit_for_bit(backend):
    torch.manual_seed(0)
    token = torch.randn(6, 8).bfloat16()
    latent = torch.tensor([True, False, True, False, False, True])
    out = hrpo_gate(torch.randn(6, 16).bfloat16(), token, torch.randn(6, 8).bfloat16(), torch.randn(16), torch.randn(8),
                    latent, backend=backend)
    assert torch.equal(out[~latent], token[~latent]) and not torch.equal(out[latent], token[latent])


@pytest.mark.parametrize(("u_shift", "lam"), [(0.0, 200.0), (-200.0, 5.0), (0.0, 90.0)],
                         ids=["lambda", "r", "subnormal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_decay_is_exactly_the_token_with_finite_gradients(u_shift, lam, backend):
    torch.manual_seed(0)
    u, token, mixture = torch.randn(5, 16) + u_shift, torch.randn(5, 8), torch.randn(5, 8)
    leaves = [x.requires_grad_() for x in (u, token, mixture, torch.zeros(16), torch.full((8,), lam))]
    out = hrpo_gate(*leaves, torch.ones(5, dtype=torch.bool), backend=backend)
    assert torch.equal(out, token)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert torch.equal(token.grad, torch.ones(5, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_near_no_decay_are_those_of_float64(backend):
    """Where a is within 1e-7 of 1, 1 - a * a would be noise in float32."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, 8), torch.randn(3, 4), torch.randn(3, 4), torch.randn(8),
              torch.tensor([15.0, 20.0, 30.0, 60.0])]
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        runs_on = backend if dtype == torch.float32 else "reference"
        hrpo_gate(*leaves, torch.ones(3, dtype=torch.bool), backend=runs_on).sum().backward()
        grads.append([leaf.grad.double() for leaf in leaves])
    for single, double in zip(*grads, strict=True):
        torch.testing.assert_close(single, double, rtol=3e-6, atol=1e-7)
    assert (grads[0][4] != 0).all()


def test_gate_gradients_pass_gradcheck():
    torch.manual_seed(0)
    leaves = [torch.randn(*size, dtype=torch.float64, requires_grad=True)
              for size in ((3, 8), (3, 4), (3, 4), (8,), (4,))]
    latent = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda *x: hrpo_gate(*x, latent), leaves)


def gradients(inputs, backend, wanted=("u_T2D", "token_TD", "mixture_TD", "bias_2D", "lambda_D")):
    """Output, then the gradients of `wanted` for a fixed cotangent."""
    leaves = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in wanted}
    out = hrpo_gate(**leaves, backend=backend)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(leaves[name].grad for name in wanted)]


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_nobody_wants_are_left_out_and_change_nothing(backend):
    """The update takes the mixture as a constant, and the table too where it is frozen."""
    inputs = make_inputs({"T": 9, "D": 20}, dtype=torch.float32, device="cpu")
    _, du, dtoken, _, dbias, dlambda = gradients(inputs, backend)
    for wanted, want in {("u_T2D", "token_TD", "bias_2D", "lambda_D"): (du, dtoken, dbias, dlambda),
                         ("u_T2D", "bias_2D", "lambda_D"): (du, dbias, dlambda)}.items():
        for got, expected in zip(gradients(inputs, backend, wanted)[1:], want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", FUSED)
def test_strides_do_not_matter(backend):
    inputs = make_inputs({"T": 6, "D": 10}, dtype=torch.bfloat16, device="cpu")
    apart = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in inputs.items()}
    assert not apart["u_T2D"].is_contiguous()
    for got, want in zip(gradients(apart, backend), gradients(inputs, backend), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", FUSED)
def test_no_rows_are_no_error(backend):
    inputs = make_inputs({"T": 0, "D": 10}, dtype=torch.float32, device="cpu")
    out, du, *_, dbias, dlambda = gradients(inputs, backend)
    assert out.shape == (0, 10) and du.shape == (0, 20) and not dbias.any() and not dlambda.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["u_T2D", "bias_2D", "lambda_D"])
def test_a_nan_is_not_swallowed(name, backend):
    inputs = make_inputs({"T": 3, "D": 5}, dtype=torch.float32, device="cpu") | {"latent_T": torch.ones(3).bool()}
    inputs[name][..., 2] = torch.nan
    out = hrpo_gate(**inputs, backend=backend)
    assert out[:, 2].isnan().all() and out[:, :2].isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
def test_gate_operators_are_well_registered_and_compile(backend):
    inputs = make_inputs({"T": 6, "D": 10}, dtype=torch.float32, device="cpu") | {"compat_eps": 1e-8}
    assert hrpo_gate.why_not(backend, **inputs) is None  # loads the operators
    leaves = [value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
              for value in inputs.values()]
    operator = getattr(torch.ops.fastlatent, f"hrpo_gate_{backend}").default
    opcheck(operator, leaves)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: hrpo_gate(*x, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), hrpo_gate(*leaves, backend=backend))


def test_every_instruction_set_is_the_same_gate_whatever_the_threads(monkeypatch):
    from fastlatent_kernels import _C
    from fastlatent_kernels.hrpo_gate import native_impl

    inputs = make_inputs({"T": 200, "D": 200}, dtype=torch.float32, device="cpu")
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = gradients(doubles, "reference")
    one_thread = gradients(inputs, "native")
    call = native_impl._call
    for isa in _C.isas():
        monkeypatch.setattr(native_impl, "_call", lambda kernel, arguments, _, isa=isa, **fields: call(
            kernel, arguments, isa, **fields))
        for got, want in zip(gradients(inputs, "native"), exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * max(1, want.abs().max().item()))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for got, want in zip(gradients(inputs, "native"), one_thread, strict=True):
        assert torch.equal(got, want)


def test_soft_embedding_is_a_dense_product_with_the_mixture():
    torch.manual_seed(0)
    table = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    ids, weight = torch.randint(50, (700, 6)), torch.rand(700, 6, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(700, 50, dtype=torch.float64).scatter_add(1, ids, weight) @ table
    out = soft_embedding(ids, weight, table)
    torch.testing.assert_close(out, dense)
    direction = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, (weight, table), direction),
                         torch.autograd.grad(dense, (weight, table), direction), strict=True):
        torch.testing.assert_close(got, want)


def test_arguments_that_do_not_fit_are_named():
    good = dict(u_T2D=torch.zeros(2, 6), token_TD=torch.zeros(2, 3), mixture_TD=torch.zeros(2, 3),
                bias_2D=torch.zeros(6), lambda_D=torch.zeros(3), latent_T=torch.ones(2, dtype=torch.bool))
    hrpo_gate(**good)
    for name, bad in {"u_T2D": torch.zeros(2, 3), "mixture_TD": torch.zeros(3, 2),
                      "lambda_D": torch.zeros(3).bfloat16(), "latent_T": torch.ones(2)}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a .* got {str(bad.dtype)[6:]}"):
            hrpo_gate(**good | {name: bad})
    with pytest.raises(ValueError, match="^compat_eps: expected a number >= 0, got -1"):
        hrpo_gate(**good, compat_eps=-1)
