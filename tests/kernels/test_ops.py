"""Every backend of every op is about as close to float64 as the reference is in the same dtype, gradients included."""

import importlib

import pytest
import torch
from fastlatent_kernels import OPS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]


def cases():
    for op in OPS.values():
        module = importlib.import_module(f"{op.__module__}.cases")
        for shape in module.TEST_SHAPES:
            for dtype in DTYPES:
                for backend in (*op.order, "reference"):
                    size = "-".join(f"{k}{v}" for k, v in shape.items())
                    yield pytest.param(op, module, shape, backend, dtype, id=f"{op.name}-{backend}-{size}-{dtype}")


def run(op, inputs, backend) -> dict[str, torch.Tensor]:
    """Outputs by name, and the gradient of every floating input for a fixed random cotangent."""
    leaves = {name: value.clone().requires_grad_() if is_float(value) else value for name, value in inputs.items()}
    outputs = op(**leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    names = getattr(outputs, "_fields", [f"output {i}" for i in range(len(outputs))])
    named = {name: out for name, out in zip(names, outputs, strict=True) if out is not None}
    generator = torch.Generator().manual_seed(1)
    weighted = [(out.double() * torch.randn(out.shape, generator=generator).to(out.device)).sum()
                for out in named.values() if is_float(out) and out.requires_grad]
    if weighted:
        sum(weighted).backward()
    result = {name: out.detach() for name, out in named.items()}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if is_float(leaf) and leaf.grad is not None}
    return result | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "module", "shape", "backend", "dtype"), list(cases()))
def test_backend_is_as_close_to_float64_as_the_reference(op, module, shape, backend, dtype, device):
    inputs = module.make_inputs(shape, dtype=dtype, device=device)
    if (reason := op.why_not(backend, **inputs)) is not None:
        assert (backend, device) == ("native", "cuda"), reason  # the only refusal there is
        return
    got, plain = run(op, inputs, backend), run(op, inputs, "reference")
    doubles = {name: value.double() if is_float(value) else value for name, value in inputs.items()}
    exact = run(op, doubles, "reference")
    assert got.keys() == plain.keys() == exact.keys()
    alike = same_token_rows(got, plain, exact)
    for name, value in got.items():
        if not value.is_floating_point():
            assert torch.equal(value, plain[name]), f"{name} differs from the reference's"
            continue
        assert value.dtype == plain[name].dtype and value.shape == exact[name].shape
        value, near, truth = (x[name].double() for x in (got, plain, exact))
        if alike is not None:
            value, near, truth = value[alike], near[alike], truth[alike]
        largest = truth.abs().max().clamp(min=1)
        rounding = (torch.finfo(got[name].dtype).eps + 4 * torch.finfo(torch.float32).eps) * largest
        if backend == "reference":  # against itself only a bound from outside says something
            allowed = 24 * max(torch.finfo(dtype).eps, torch.finfo(got[name].dtype).eps) * largest
        else:
            allowed = 2 * (near - truth).abs().max() + rounding
        error = (value - truth).abs().max()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def same_token_rows(got, plain, exact):
    """Rows whose token float64 draws too: rounding may decide a near tie between two tokens, but seldom."""
    if "token_B" not in got:
        return None
    assert torch.equal(got["token_B"], plain["token_B"])
    alike = got["token_B"] == exact["token_B"]
    assert alike.float().mean() > 0.6
    return alike


def test_every_op_with_a_backend_has_it_here():
    """A backend that fails to build must not pass for one that is absent."""
    for op in OPS.values():
        cases = importlib.import_module(f"{op.__module__}.cases")
        inputs = cases.make_inputs(cases.TEST_SHAPES[1], dtype=torch.float32, device="cpu")
        for backend in op.order:
            reason = op.why_not(backend, **inputs)
            assert reason is None, f"{op.name} [{backend}]: {reason}"
