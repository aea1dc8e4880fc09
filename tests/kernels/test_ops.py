"""Every backend of every op is about as close to float64 as the reference is in the same dtype, gradients included."""

import importlib
import inspect

import pytest
import torch
from fastlatent_kernels import OPS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
# backend and device. With a GPU, Triton compiles, and then takes nothing else; CUDA units take few dtypes and widths
REFUSALS = {("native", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")}
if torch.cuda.is_available():
    REFUSALS.add(("triton", "cpu"))


def cases_of(op):
    return importlib.import_module(f"{op.__module__}.cases")


def label(op, backend, shape, *rest) -> str:
    return "-".join(map(str, (op.name, backend, *(f"{k}{v}" for k, v in shape.items()), *rest)))


def takes_a_minute(backend: str, shape: dict[str, int]) -> bool:
    """Whether Triton's interpreter would, as such a shape says of itself; every other backend takes it."""
    return backend == "triton" and not shape.get("interpret", 1) and not torch.cuda.is_available()


def cases():
    for op in OPS.values():
        for shape in cases_of(op).TEST_SHAPES:
            for dtype in DTYPES:
                for backend in (*op.order, "reference"):
                    if takes_a_minute(backend, shape):
                        continue
                    yield pytest.param(op, shape, backend, dtype, id=label(op, backend, shape, dtype))


def backends(shape_at: int = 1):
    """Every op and backend once, at one of the op's test shapes."""
    for op in OPS.values():
        shape = cases_of(op).TEST_SHAPES[shape_at]
        for backend in (*op.order, "reference"):
            yield pytest.param(op, shape, backend, id=label(op, backend, shape))


def run(op, inputs, backend) -> dict[str, torch.Tensor]:
    """Outputs by name, and the gradient of every floating input for a fixed random cotangent."""
    leaves = {name: value.clone().requires_grad_() if is_float(value) else value for name, value in inputs.items()}
    outputs = named(op(**leaves, backend=backend))
    generator = torch.Generator().manual_seed(1)
    weighted = [(out.double() * torch.randn(out.shape, generator=generator).to(out.device)).sum()
                for out in outputs.values() if is_float(out) and out.requires_grad]
    if weighted:
        sum(weighted).backward()
    result = {name: out.detach() for name, out in outputs.items()}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if is_float(leaf) and leaf.grad is not None}
    return result | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def named(outputs) -> dict[str, torch.Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    names = getattr(outputs, "_fields", [f"output {i}" for i in range(len(outputs))])
    return {name: out for name, out in zip(names, outputs, strict=True) if out is not None}


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


SATURATED = {"logits_BV", "hidden_BD", "hidden_AD"}


def signature_of(case) -> set[str]:
    return set(inspect.signature(case.values[0]).parameters)


def saturated(inputs: dict) -> dict:
    """Logits +-80 instead of the inputs' logits, one-hot in the first row; hidden states that lead to such logits."""
    inputs = dict(inputs)
    if "logits_BV" in inputs:
        logits_BV = inputs["logits_BV"]
        inputs["logits_BV"] = torch.where(logits_BV.isfinite(), logits_BV.sign().nan_to_num() * 80, logits_BV)
        inputs["logits_BV"][0, 1:] = -80
        inputs["logits_BV"][0, 0] = 80
    for name in ("hidden_BD", "hidden_AD"):
        if name in inputs:
            inputs[name] = inputs[name] * 12
    return inputs


def refuses(op, backend, device, inputs) -> bool:
    reason = op.why_not(backend, **inputs)
    assert reason is None or (backend, device) in REFUSALS, f"{op.name} [{backend}]: {reason}"
    return reason is not None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "shape", "backend", "dtype"), list(cases()))
def test_backend_is_as_close_to_float64_as_the_reference(op, shape, backend, dtype, device):
    inputs = cases_of(op).make_inputs(shape, dtype=dtype, device=device)
    if not refuses(op, backend, device, inputs):
        assert_close_to_float64(op, inputs, backend, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "shape", "backend"), [
    case for case in backends() if case.values[2] != "reference" and SATURATED & signature_of(case)])
def test_saturated_inputs_keep_the_error_rule(op, shape, backend, dtype, device):
    """Logits of +-80, and rows where one token has all the mass."""
    inputs = saturated(cases_of(op).make_inputs(shape, dtype=dtype, device=device))
    if not refuses(op, backend, device, inputs):
        assert_close_to_float64(op, inputs, backend, dtype, scale=80)


def assert_close_to_float64(op, inputs, backend, dtype, scale: float = 1) -> None:
    """The error rule; `scale` is how large the numbers are whose float32 rounding no output can be free of."""
    got, plain = run(op, inputs, backend), run(op, inputs, "reference")
    doubles = {name: value.double() if is_float(value) else value for name, value in inputs.items()}
    exact = run(op, doubles, "reference")
    assert got.keys() == plain.keys() == exact.keys()
    alike = same_token_rows(got, plain, exact, dtype)
    for name, value in got.items():
        if name == "token_B":
            continue
        if not value.is_floating_point():
            assert torch.equal(value, plain[name]), f"{name} differs from the reference's"
            continue
        assert value.dtype == plain[name].dtype and value.shape == exact[name].shape
        value, near, truth = (x[name].double() for x in (got, plain, exact))
        if alike is not None:
            value, near, truth = value[alike], near[alike], truth[alike]
        is_number = truth.isfinite()  # -inf is the log-probability of what is forbidden
        assert torch.equal(value[~is_number], truth[~is_number]), name
        value, near, truth = value[is_number], near[is_number], truth[is_number]
        if truth.numel() == 0:
            continue
        largest = truth.abs().max().clamp(min=1)
        single = torch.finfo(torch.float32).eps * largest.clamp(min=scale)
        rounding = torch.finfo(got[name].dtype).eps * largest + 4 * single
        if backend == "reference":  # against itself only a bound from outside says something
            allowed = 24 * max(torch.finfo(dtype).eps, torch.finfo(got[name].dtype).eps) * largest
        else:
            allowed = 2 * (near - truth).abs().max() + rounding
        error = (value - truth).abs().max()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def same_token_rows(got, plain, exact, dtype):
    """Rows for which backend, reference and float64 draw one token.

    Rounding may decide a near tie between two tokens. In float32 a backend's token is the reference's; in half precision,
    where it need not round its logits as the reference does, the reference's or float64's.
    """
    if "token_B" not in got:
        return None
    ours, plains, exacts = got["token_B"], plain["token_B"], exact["token_B"]
    assert bool(((ours == plains) | ((ours == exacts) & (dtype != torch.float32))).all())
    alike = (ours == plains) & (ours == exacts)
    assert alike.float().mean() > 0.6
    return alike


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "shape", "backend"), list(backends(2)))
def test_a_row_does_not_depend_on_the_others(op, shape, backend, device):
    """What a row gives is the same in another order, among fewer rows and beside itself."""
    inputs = cases_of(op).make_inputs(shape, dtype=torch.float32, device=device)
    if refuses(op, backend, device, inputs):
        return
    letter, num_rows = next(iter(shape.items()))
    chosen = torch.randint(num_rows, (num_rows // 2,), generator=torch.Generator().manual_seed(0)).to(device)
    fewer = {name: value[chosen] if has_rows(name, value, letter) else value for name, value in inputs.items()}
    assert sum(value is not inputs[name] for name, value in fewer.items()) > 0
    whole, part = named(op(**inputs, backend=backend)), named(op(**fewer, backend=backend))
    for name, value in part.items():
        if value.ndim and value.shape[0] == len(chosen):  # the others are sums over the rows
            # a library's product may add in another order where the rows are fewer
            torch.testing.assert_close(value, whole[name][chosen], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "shape", "backend"), list(backends()))
def test_strides_change_nothing_or_are_refused_by_name(op, shape, backend, device):
    inputs = cases_of(op).make_inputs(shape, dtype=torch.float32, device=device)
    if refuses(op, backend, device, inputs):
        return
    strided = {name: with_gaps(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    want, got = run(op, inputs, backend), None
    while got is None:
        try:
            got = run(op, strided, backend)
        except ValueError as error:
            name = str(error).partition(":")[0]
            assert not strided[name].is_contiguous(), error
            strided[name] = inputs[name]
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with NaN, or another value, between each two."""
    if tensor.ndim == 0:
        return tensor
    gap = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else tensor.flatten()[0].item())
    return torch.stack([tensor, gap], dim=-1)[..., 0]


def has_rows(name: str, value, letter: str) -> bool:
    return isinstance(value, torch.Tensor) and "_" in name and name.rpartition("_")[2].startswith(letter)
