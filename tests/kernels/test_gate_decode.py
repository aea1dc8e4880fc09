"""hrpo_gate_decode is what the trainer's replay computes: the composition of gather, product and hrpo_gate."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fastlatent_kernels import hrpo_gate, hrpo_gate_decode, use_backend
from fastlatent_kernels.hrpo_gate_decode.cases import make_inputs
from torch.library import opcheck
from torch.nn.functional import embedding, linear

from fastlatent.methods.base import ModelInfo
from fastlatent.methods.hrpo import HRPO

BACKENDS = ["reference", "native", "triton"]


def inputs_of(dtype=torch.float32, B=9, D=32, V=50, **changes):
    return make_inputs({"B": B, "D": D, "V": V}, dtype=dtype, device="cpu") | changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_decode_is_the_replay_bit_for_bit(backend, dtype):
    x = inputs_of(dtype, compat_eps=1e-8)
    token_BD = embedding(x["token_ids_B"], x["table_VD"])
    u_B2D = linear(token_BD, x["weight_2DD"])
    gate = (x["bias_2D"], x["lambda_D"], x["latent_B"], 1e-8)
    want = hrpo_gate(u_B2D, token_BD, x["mixture_BD"], *gate, backend=backend)
    assert torch.equal(hrpo_gate_decode(**x, backend=backend), want)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_decode_is_the_methods_embed_bit_for_bit(backend):
    table = torch.nn.Embedding(50, 32, dtype=torch.bfloat16)
    method = HRPO(HRPO.Config(r_min=0.5, r_max=0.9), ModelInfo(32, 50, torch.bfloat16, embedding_is_frozen=True), table)
    x = inputs_of(torch.bfloat16)
    with use_backend(backend), torch.no_grad():
        want = method.embed(x["token_ids_B"], x["latent_B"], {"mixture": x["mixture_BD"]})
        out = hrpo_gate_decode(x["token_ids_B"], x["mixture_BD"], table.weight, method.gate_weight, method.gate_bias,
                               method.gate_lambda, x["latent_B"], x["out_BD"], method.config.compat_eps)
    assert torch.equal(out, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_buffer_is_written_and_nothing_beside_it(backend):
    buffer = torch.full((14, 32), 7.0)
    x = inputs_of(out_BD=buffer[2:11])
    out = hrpo_gate_decode(**x, backend=backend)
    assert out is x["out_BD"] and (buffer[:2] == 7).all() and (buffer[11:] == 7).all() and not (buffer[2:11] == 7).any()
    plain = ~x["latent_B"]
    assert torch.equal(out[plain], x["table_VD"][x["token_ids_B"][plain]]) and plain.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_neighbours(backend):
    x = inputs_of(B=40, D=48)
    whole = hrpo_gate_decode(**x, backend=backend).clone()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for rows in (order, order[:21]):
        part = {name: value[rows] if name.endswith(("_B", "_BD")) else value for name, value in x.items()}
        torch.testing.assert_close(hrpo_gate_decode(**part, backend=backend), whole[rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_decay_is_exactly_the_token(backend):
    x = inputs_of(torch.bfloat16, lambda_D=torch.full((32,), 200.0))
    assert torch.equal(hrpo_gate_decode(**x, backend=backend), x["table_VD"][x["token_ids_B"]])


def test_an_id_outside_the_table_is_an_error_and_a_row_of_nan_where_none_can_be_raised():
    x = inputs_of()
    x["token_ids_B"][1], x["token_ids_B"][4] = 50, -1
    out = hrpo_gate_decode(**x, backend="triton")
    assert out.isnan().any(dim=1).nonzero()[:, 0].tolist() == [1, 4] and out[1].isnan().all() and out[4].isnan().all()
    for backend in ("reference", "native"):
        with pytest.raises(ValueError, match="^token_ids_B: expected ids from 0 to 49, got -1 to 50"):
            hrpo_gate_decode(**x, backend=backend)


def test_triton_rounds_weights_in_float32_to_the_table_and_writes_any_dtype():
    x = inputs_of(torch.bfloat16)
    wide = x | {"weight_2DD": x["weight_2DD"].float(), "out_BD": x["out_BD"].float()}
    torch.testing.assert_close(hrpo_gate_decode(**wide, backend="triton").bfloat16(),
                               hrpo_gate_decode(**x, backend="triton"), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_decode_operator_is_well_registered_and_compiles(backend):
    x = inputs_of()
    want = hrpo_gate_decode(**x, backend=backend).clone()
    opcheck(getattr(torch.ops.fastlatent, f"hrpo_gate_decode_{backend}").default, (*x.values(), 0.0))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: hrpo_gate_decode(**kw, backend=backend), fullgraph=True, backend="aot_eager")
    x["out_BD"] = torch.full_like(want, torch.nan)
    assert torch.equal(compiled(**x), want) and torch.equal(x["out_BD"], want)


def test_arguments_that_do_not_fit_are_named():
    for name, bad in {"token_ids_B": torch.zeros(9, dtype=torch.int32), "mixture_BD": torch.zeros(9, 32).bfloat16(),
                      "weight_2DD": torch.zeros(32, 32), "lambda_D": torch.zeros(32).bfloat16(),
                      "latent_B": torch.ones(9), "out_BD": torch.zeros(8, 32)}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a .* got {str(bad.dtype)[6:]}"):
            hrpo_gate_decode(**inputs_of() | {name: bad})
    with pytest.raises(ValueError, match=r"^out_BD: expected a contiguous tensor, got strides \[1, 9\]"):
        hrpo_gate_decode(**inputs_of(out_BD=torch.zeros(32, 9).t()))


def test_the_cuda_kernels_layout_and_arithmetic_on_a_cpu(tmp_path):
    """Not the kernel itself, which takes a GPU: the header it is made of, around the PTX ISA's own tables."""
    source, program = Path(__file__).with_name("gate_tile_emulation.cpp"), tmp_path / "emulation"
    subprocess.run(["g++", "-std=c++17", "-O1", "-ffp-contract=off", source, "-o", program], check=True)
    torch.manual_seed(0)
    at_the_edge = torch.tensor([[0.3, -0.2, 200, 1.5, 2, 0], [-200, 1, 5, 1.5, 2, 0], [0.3, 0.1, 4, 1.5, 2, 1e-2]]).T
    cases = torch.cat([torch.randn(6, 200) * torch.tensor([[2.0], [2], [8], [1], [1], [0]]), at_the_edge], dim=1)
    text = "\n".join(" ".join(f"{x:.9g}" for x in case) for case in cases.T.tolist())
    worst, *gates = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout.split()
    assert float(worst) == 0  # small whole numbers: every sum is exact
    for case, got in zip(cases.T.double(), gates, strict=True):
        u_r, u_i, lam, token, mixture, eps = case.view(6, 1, 1)
        want = hrpo_gate(torch.cat([u_r, u_i], dim=1), token, mixture, torch.zeros(2).double(), lam[0],
                         torch.ones(1).bool(), eps.item(), backend="reference")
        assert float(got) == pytest.approx(want.item(), abs=2e-6)
    assert [float(got) for got in gates[-3:-1]] == [1.5, 1.5]  # a = 1 is the token exactly


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc: without it the module is not built")
def test_the_cuda_backend_says_what_it_cannot_take():
    module = importlib.import_module("fastlatent_kernels._cuda")
    importlib.import_module("fastlatent_kernels.hrpo_gate_decode.cuda_impl")
    supports = hrpo_gate_decode._supports["cuda"]
    assert supports(**inputs_of()) == "cuda takes CUDA tensors"
    arguments = module.HrpoGateDecode()
    arguments.width, arguments.rows = 48, 1
    with pytest.raises(RuntimeError, match="^width: expected a multiple of 32"):
        module.hrpo_gate_decode(arguments, 0, 0)
    arguments.width, arguments.table = 64, 8
    with pytest.raises(RuntimeError, match="^table, weight: expected addresses that are multiples of 16"):
        module.hrpo_gate_decode(arguments, 0, 0)
