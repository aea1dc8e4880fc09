"""No program of a Triton kernel waits for another's result: in any order they give the same bits."""

import pytest
import torch
import triton
import triton.language as tl
from fastlatent_kernels import OPS
from interpreter import backwards
from test_ops import cases_of, label, run

SHAPES = {"vocab_head": 4, "soft_embedding": 1}
"""Which of an op's test shapes has several programs for each kernel, and few enough of them; 2 where none is given."""


def cases():
    for op in OPS.values():
        if "triton" in op.order:
            shape = cases_of(op).TEST_SHAPES[SHAPES.get(op.name, 2)]
            yield pytest.param(op, shape, id=label(op, "triton", shape))


@triton.jit
def relay_kernel(x_ptr):
    """Each program hands on what the one before it wrote."""
    place = tl.program_id(0)
    tl.store(x_ptr + place + 1, tl.load(x_ptr + place) + 1.0)


def test_a_kernel_that_leans_on_the_order_is_seen():
    x, y = torch.zeros(4), torch.zeros(4)
    relay_kernel[(3,)](x)
    with backwards() as num_programs:
        relay_kernel[(3,)](y)
    assert x.tolist() == [0, 1, 2, 3] and y.tolist() == [0, 1, 1, 1] and num_programs == [3]
    relay_kernel[(3,)](y)
    assert y.tolist() == x.tolist()


@pytest.mark.parametrize(("op", "shape"), list(cases()))
def test_programs_may_run_in_any_order(op, shape):
    # half precision, whose gradients of logits are written over them in another width
    inputs = cases_of(op).make_inputs(shape, dtype=torch.bfloat16, device="cpu")
    want = run(op, inputs, "triton")
    with backwards() as num_programs:
        got = run(op, inputs, "triton")
    assert max(num_programs) > 1
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
