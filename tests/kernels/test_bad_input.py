"""What no op takes: dimensions of which there is nothing, although rows may be none; ids of no row of a table; what is
no tensor, or no such number."""

import importlib
import re

import pytest
import torch
from fastlatent_kernels import OPS, soft_embedding
from fastlatent_kernels.policy_gradient_head import policy_gradient_head
from test_ops import run

ROWS = {"A", "B", "N", "S", "T"}


def inputs_of(op, shape_at: int = 1) -> dict:
    cases = importlib.import_module(f"{op.__module__}.cases")
    return cases.make_inputs(cases.TEST_SHAPES[shape_at], dtype=torch.float32, device="cpu")


def letters(name: str) -> list[str]:
    """Of the dimensions in an argument's name: `bias_2D` has one of 2 D."""
    return re.findall(r"\d*[A-Z]", name.rpartition("_")[2])


def without(inputs: dict, letter: str) -> dict:
    """The same with none of `letter` in any of them."""
    out = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            for axis, dimension in enumerate(letters(name)):
                if axis < value.ndim and dimension.endswith(letter):
                    value = value.narrow(axis, 0, 0)
        out[name] = value
    return out


def cases():
    for op in OPS.values():
        found = {letter[-1] for name, value in inputs_of(op).items() if isinstance(value, torch.Tensor)
                 for letter in letters(name) if value.ndim}
        for letter in sorted(found):
            yield pytest.param(op, letter, id=f"{op.name}-{letter}")


@pytest.mark.parametrize(("op", "letter"), list(cases()))
def test_rows_may_be_none_and_nothing_else(op, letter):
    inputs = without(inputs_of(op), letter)
    if letter in ROWS:
        want = run(op, inputs, "reference")
        for backend in op.order:
            if op.why_not(backend, **inputs) is None:
                got = run(op, inputs, backend)
                assert got.keys() == want.keys()
                for name, value in got.items():  # what is there all the same is a sum over no rows
                    assert value.shape == want[name].shape and (value == 0).all(), name
        return
    with pytest.raises(ValueError, match=f"^\\w+_\\w*{letter}\\w*: expected a .* with {letter} at least 1"):
        op(**inputs)


def test_several_targets_are_at_least_one():
    inputs = inputs_of(OPS["token_logprob"])
    inputs["target_A"] = inputs["target_A"][:, None][:, :0]
    with pytest.raises(ValueError, match=r"^target_A: expected a int64 tensor of shape \[7, K\] with K at least 1"):
        OPS["token_logprob"](**inputs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_is_no_tensor_is_named(op):
    inputs = inputs_of(op)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"^{name}: expected a tensor, got list$"):
                op(**inputs | {name: value.tolist() if value.ndim else [0]})


@pytest.mark.parametrize(("op", "name", "bad"), [
    ("topk_mixture", "top_k", 1.5), ("topk_gumbel", "top_k", 2.5), ("clipped_surrogate", "kl_coef", float("nan")),
    ("policy_gradient_head", "kl_coef", float("inf")), ("clipped_surrogate", "weight_A", None)])
def test_a_number_of_the_wrong_kind_is_named(op, name, bad):
    with pytest.raises(ValueError, match=f"^{name}: expected a (whole number|finite number|tensor)"):
        OPS[op](**inputs_of(OPS[op]) | {name: bad})


@pytest.mark.parametrize("bad", [-1, 131, 2**40])
def test_a_target_that_is_no_token_is_named(bad):
    inputs = inputs_of(policy_gradient_head)
    inputs["target_A"][2] = bad
    with pytest.raises(ValueError, match=f"^target_A: expected ids from 0 to 130, got .*{bad}"):
        policy_gradient_head(**inputs)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("bad", [-1, 33, 2**40])
def test_an_id_of_no_row_is_named(backend, bad):
    inputs = inputs_of(soft_embedding)
    inputs["ids_NK"][3, 1] = bad
    with pytest.raises(ValueError, match=f"^ids_NK: expected ids from 0 to 32, got .*{bad}"):
        soft_embedding(**inputs, backend=backend)


TRACED = {"soft_embedding": ("ids_NK", lambda out: out), "hrpo_gate_decode": ("token_ids_B", lambda out: out),
          "token_logprob": ("target_A", lambda out: out[0][:, None]),
          "policy_gradient_head": ("target_A", lambda out: out.logprob_A[:, None])}
"""Each op that is given ids: the argument, and the rows of the output that they are for."""


@pytest.mark.parametrize("op", TRACED)
def test_where_nothing_can_be_raised_an_id_of_no_row_makes_its_row_nan(op):
    """In a traced call, as on a GPU."""
    torch._dynamo.reset()
    inputs, (name, rows_of) = inputs_of(OPS[op]), TRACED[op]
    num_rows = len(inputs.get("table_VD", inputs.get("weight_VD")))
    compiled = torch.compile(lambda **kw: OPS[op](**kw, backend="reference"), fullgraph=True, backend="aot_eager")
    want = rows_of(OPS[op](**inputs, backend="reference")).clone()
    ids = inputs[name].view(len(want), -1)
    ids[3, -1], ids[5, 0] = -1, num_rows
    out = rows_of(compiled(**inputs))
    assert out.isnan().all(dim=1).tolist() == [False, False, False, True, False, True, False]
    torch.testing.assert_close(out[[0, 1, 2, 4, 6]], want[[0, 1, 2, 4, 6]])
