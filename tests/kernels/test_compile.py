"""What decode needs of an op: it compiles whole, gives what it gives eagerly, and never waits for the device."""

import importlib

import pytest
import torch
from fastlatent_kernels import OPS, use_backend
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = {"vocab_head": {"B": 6, "D": 16, "V": 300, "mixture": 1},
          "topk_mixture": {"B": 6, "V": 300, "K": 20, "top_p": 0.8},
          "hrpo_gate": {"T": 6, "D": 16}, "soft_embedding": {"N": 6, "K": 4, "V": 50, "D": 16}}


def inputs_of(name, shape):
    cases = importlib.import_module(f"{OPS[name].__module__}.cases")
    return cases.make_inputs(shape, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", SHAPES)
def test_decode_ops_compile_without_graph_breaks(name, backend):
    torch._dynamo.reset()
    op, inputs = OPS[name], inputs_of(name, SHAPES[name])
    with use_backend(backend):
        eager = op(**inputs)
        # aot_eager and not inductor: graph breaks and wrong tracing show in both, and no C++ compiler runs
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(**inputs)
    assert_same(eager, compiled)


def test_generated_code_equals_the_reference():
    torch._dynamo.reset()
    op, inputs = OPS["hrpo_gate"], inputs_of("hrpo_gate", SHAPES["hrpo_gate"])
    with use_backend("reference"):
        assert_same(op(**inputs), torch.compile(op, fullgraph=True)(**inputs))


def test_compiled_code_follows_use_backend():
    torch._dynamo.reset()
    op, inputs = OPS["topk_mixture"], inputs_of("topk_mixture", SHAPES["topk_mixture"])
    graphs = []

    def record(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda **kw: op(**kw), fullgraph=True, backend=record)
    compiled(**inputs)
    with use_backend("reference"):
        compiled(**inputs)
    assert len(graphs) == 2 and "topk_rows" in graphs[0] and "topk_rows" not in graphs[1]


@pytest.mark.parametrize("unit_p_dtype", [None, torch.bfloat16])
def test_native_operators_are_well_registered(unit_p_dtype):
    inputs = inputs_of("topk_mixture", SHAPES["topk_mixture"])
    assert OPS["topk_mixture"].chosen(**inputs) == "native" and OPS["vocab_head"].why_not(
        "native", **inputs_of("vocab_head", SHAPES["vocab_head"])) is None  # both load their operators
    logits, seed, counter = inputs["logits_BV"], inputs["seed"], inputs["counter_B3"]
    torch.library.opcheck(torch.ops.fastlatent.topk_rows.default, (logits, 0.7, 20, 0.8, seed, counter, False))
    torch.library.opcheck(torch.ops.fastlatent.vocab_rows.default, (logits, 0.7, seed, counter, False, unit_p_dtype))


def assert_same(eager, compiled):
    eager, compiled = ((x,) if isinstance(x, torch.Tensor) else x for x in (eager, compiled))
    assert type(eager) is type(compiled)
    for a, b in zip(eager, compiled, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-6)
        else:
            assert torch.equal(a, b)


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
    cases = importlib.import_module(f"{OPS[name].__module__}.cases")
    inputs = inputs_of(name, cases.TEST_SHAPES[1])
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
