"""What the trainer needs of an op: it compiles whole, gives what it gives eagerly and never waits for the device."""

import pytest
import torch
from fastlatent_kernels import OPS, use_backend
from fastlatent_kernels.decode_logits import decode_logits
from fastlatent_kernels.library import LIBRARY
from fastlatent_kernels.token_logprob.chunks import _accumulate
from test_ops import cases_of, is_float, refuses, run
from torch._subclasses import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = [pytest.param(op, backend, id=f"{op.name}-{backend}") for op in OPS.values()
            for backend in (*op.order, "reference")]


def inputs_of(op, shape_at: int = 1, dtype: torch.dtype = torch.float32):
    return cases_of(op).make_inputs(cases_of(op).TEST_SHAPES[shape_at], dtype=dtype, device="cpu")


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_ops_compile_without_graph_breaks(op, backend):
    inputs = inputs_of(op)
    if refuses(op, backend, "cpu", inputs):
        return
    torch._dynamo.reset()
    # aot_eager and not inductor: graph breaks and wrong tracing show in both, and no C++ compiler runs
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(run(op, inputs, backend), run(compiled, inputs, backend))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_ops_compile_on_a_gpu(op, backend, dtype):
    """There a product in half precision gives float32, by operators that a CPU has not."""
    inputs = cases_of(op).make_inputs(cases_of(op).TEST_SHAPES[1], dtype=dtype, device="cuda")
    if refuses(op, backend, "cuda", inputs):
        return
    torch._dynamo.reset()
    eager, compiled = run(op, inputs, backend), run(torch.compile(op, fullgraph=True, backend="aot_eager"), inputs, backend)
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        most = float(value.abs().max()) if value.is_floating_point() else 0.0
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=8 * torch.finfo(dtype).eps * most, equal_nan=True,
                                   msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradient_of_weights_on_a_gpu_can_be_traced():
    """Without one, on tensors without data; torch 2.11 cannot trace its own addmm with an out_dtype."""
    with FakeTensorMode():
        into = torch.zeros(300, 32, device="cuda")
        left, right = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((300, 64), (64, 32)))
        graph = make_fx(_accumulate)(into, left, right)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.fastlatent.add_product.default]


def test_generated_code_equals_the_reference():
    torch._dynamo.reset()
    op = OPS["hrpo_gate"]
    assert_same(run(op, inputs_of(op), "reference"), run(torch.compile(op, fullgraph=True), inputs_of(op), "reference"))


def test_compiled_code_follows_use_backend():
    torch._dynamo.reset()
    op, inputs = OPS["topk_mixture"], inputs_of(OPS["topk_mixture"])
    graphs = []

    def record(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda **kw: op(**kw), fullgraph=True, backend=record)
    compiled(**inputs)
    with use_backend("reference"):
        compiled(**inputs)
    assert len(graphs) == 2 and "topk_rows" in graphs[0] and "topk_rows" not in graphs[1]


class MadeInForward(TorchFunctionMode):
    """Notes what operations return without gradient, as those of a Function's forward do: a tensor that one of them
    changes in place, or casts to the dtype it has, more than once."""

    def __init__(self):
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not torch.is_grad_enabled():
            self.made += tensors_in(out)
        return out

    def times(self, tensor: torch.Tensor) -> int:
        return sum(made is tensor for made in self.made)


def tensors_in(outputs) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


def test_what_a_function_returns_was_not_changed_in_place(monkeypatch):
    """Under any torch, for compiled by torch 2.11 such a Function has gradients of 0 and says nothing
    (https://github.com/pytorch/pytorch/issues/180642)."""
    monkeypatch.undo()  # the NaNs of poisoned_memory are written in place
    functions = set()
    for op in OPS.values():
        for backend in (*op.order, "reference"):
            inputs = inputs_of(op)
            if refuses(op, backend, "cpu", inputs):
                continue
            with MadeInForward() as forward:
                outputs = op(**{name: x.requires_grad_() if is_float(x) else x for name, x in inputs.items()},
                             backend=backend)
            for x in tensors_in(outputs):
                if isinstance(x.grad_fn, BackwardCFunction):
                    assert forward.times(x) <= 1, f"{op.name} [{backend}]"
                    functions.add((type(x.grad_fn).__name__, forward.times(x)))
    assert {("TokenLogprobBackward", 1), ("_PolicyGradientHeadBackward", 1)} <= functions


CALLS: dict[str, tuple] = {}


class CallsAboveAutograd(TorchFunctionMode):
    """Notes the arguments of our operators, among them those that want a gradient."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("fastlatent."):
            CALLS[str(func).removesuffix(".default")] = copies(args)
        return func(*args, **kwargs or {})


class CallsInBackward(TorchDispatchMode):
    """Notes the others: in a backward pass there is no function mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlatent":
            CALLS.setdefault(str(func.overloadpacket), copies(args))
        return func(*args, **kwargs or {})


def copies(args: tuple) -> tuple:
    """Leaves, which want a gradient if these tensors do in the mode of the call."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(
        x.requires_grad and torch.is_grad_enabled()), args)


def test_operators_are_well_registered():
    """Schema, shapes without data, gradients and tracing of every operator that some backend of some op calls."""
    CALLS.clear()
    for op in OPS.values():
        for backend in op.order:
            if not refuses(op, backend, "cpu", inputs_of(op)):
                with CallsInBackward(), CallsAboveAutograd():
                    run(op, inputs_of(op), backend)
    in_float32 = dict(CALLS)
    for op in OPS.values():
        if "native" in op.order:  # some of its operators are there for bfloat16 alone
            with CallsInBackward(), CallsAboveAutograd():
                run(op, inputs_of(op, dtype=torch.bfloat16), "native")
    with CallsAboveAutograd():
        decode_logits(torch.randn(5, 8).bfloat16(), torch.randn(300, 8).bfloat16())  # of no op
    CALLS.update(in_float32)
    if not torch.cuda.is_available():
        keys = "CPU", "CompositeExplicitAutograd"
        assert CALLS.keys() == {name.replace("::", ".") for name in LIBRARY._op_defs if any(
            torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)}
    assert len(CALLS) > 10
    for name, args in CALLS.items():
        torch.library.opcheck(getattr(torch.ops.fastlatent, name.removeprefix("fastlatent.")).default, args)


def assert_same(eager: dict, compiled: dict) -> None:
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=2e-6, equal_nan=True,
                                   msg=lambda m, name=name: f"{name}: {m}")


class NoHostReads(TorchDispatchMode):
    """Fails on operators whose result's value or shape must come back to the host."""

    BANNED = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
              torch.ops.aten.item, torch.ops.aten.equal, torch.ops.aten._unique2, torch.ops.aten.is_nonzero}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.BANNED, f"{func} reads from the device"
        indices = args[1] if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else ()
        is_mask = [index is not None and index.dtype == torch.bool for index in indices]
        assert not any(is_mask), "boolean indexing reads from the device"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", sorted(OPS))
def test_no_reference_waits_for_the_device(name):
    inputs = inputs_of(OPS[name])
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    with NoHostReads():
        out = OPS[name](**inputs, backend="reference")
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.sum().backward(retain_graph=True)
    assert leaves


def test_the_watch_sees_a_host_read():
    with NoHostReads(), pytest.raises(AssertionError, match="reads from the device"):
        torch.ones(1).item()
    with NoHostReads(), pytest.raises(AssertionError, match="reads from the device"):
        torch.ones(3)[torch.tensor([True, False, True])]
