"""The one-pass vocabulary head, which takes a Hopper GPU and has never met one: its layout and arithmetic on a CPU
(vocab_head_emulation.cpp), what it refuses, and the test that would run it."""

import ctypes
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from aot_report import nvcc_version
from fastlatent_kernels import BackendUnavailable, vocab_head
from fastlatent_kernels.noise import STREAM_ID, STREAM_LATENT, STREAM_TILE, uniform
from test_vocab_head_bf16 import TIED, exact, inputs_of

needs_module = pytest.mark.skipif(nvcc_version() is None, reason="needs nvcc: without it the module is not built")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("head") / "emulation.so"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler, Path(__file__).with_name("vocab_head_emulation.cpp"), "-o", built], check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture
def emulated(library):
    """Token, log-probability, entropy, and the mixture before it is rounded, by so many clusters."""

    def run(inputs: dict[str, object], clusters: int = 3) -> tuple[torch.Tensor, ...]:
        hidden_BD, weight_VD, counter_B3 = (inputs[name] for name in ("hidden_BD", "weight_VD", "counter_B3"))
        (B, D), V = hidden_BD.shape, weight_VD.shape[0]
        out = (torch.full((B,), -1), *(torch.full(shape, torch.nan) for shape in ((B,), (B,), (B, D))))
        at = lambda tensor: ctypes.c_void_p(tensor.data_ptr())
        library.vocab_head(
            ctypes.c_int64(D), at(hidden_BD), at(weight_VD), ctypes.c_int64(B), ctypes.c_int64(V),
            ctypes.c_float(1 / inputs["temperature"]), ctypes.c_int64(inputs["seed"].item()), at(counter_B3),
            int(inputs["greedy"]), ctypes.c_int64(min(clusters, -(-V // 128))), *map(at, out))
        return out

    return run


def assert_exact(got: tuple[torch.Tensor, ...], inputs: dict[str, object], atol: float = 2e-5) -> None:
    (token_B, logprob_B, entropy_B, mixture_BD), want = got, exact(inputs)
    assert torch.equal(token_B, want[0])
    torch.testing.assert_close(logprob_B, want[1].float(), rtol=0, atol=atol)
    torch.testing.assert_close(entropy_B, want[2].float(), rtol=0, atol=atol)
    # each p is rounded to bfloat16 once
    torch.testing.assert_close(mixture_BD.double(), want[3], rtol=2**-8, atol=2**-9 * want[3].abs().max().item())


# vocabularies: below a tile, one id past it, whole tiles, an odd last one, more tiles than there are stages
@pytest.mark.parametrize(("B", "D", "V", "clusters"), [
    (1, 896, 1, 1), (5, 896, 127, 1), (64, 896, 1000, 1), (16, 1536, 129, 2), (17, 1536, 700, 1), (64, 1536, 640, 4),
    (3, 2048, 300, 3), (33, 2048, 450, 2)])
@pytest.mark.parametrize("greedy", [False, True])
def test_it_is_float64_s_but_for_float32_sums_and_one_rounding_of_p(emulated, B, D, V, clusters, greedy):
    inputs = inputs_of(B, D, V, TIED) | {"greedy": greedy}
    assert_exact(emulated(inputs, clusters), inputs)


def test_tokens_are_the_reference_s_and_not_the_likeliest(emulated):
    inputs = inputs_of(64, 896, 900, TIED, seed=3)
    plain = {name: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    want = vocab_head(**plain, backend="reference")
    token_B = emulated(inputs)[0]
    assert torch.equal(token_B, want.token_B) and len(token_B.unique()) > 30
    other = emulated(inputs | {"counter_B3": inputs["counter_B3"] + 1})[0]
    assert (other != token_B).float().mean() > 0.5


def test_a_row_has_the_same_bits_in_any_company(emulated):
    inputs = inputs_of(64, 896, 500, TIED)
    whole = emulated(inputs)
    for chosen in (torch.randperm(64, generator=torch.Generator().manual_seed(1)), torch.tensor([63]), torch.arange(5, 22)):
        part = emulated(inputs | {name: inputs[name][chosen] for name in ("hidden_BD", "counter_B3")})
        assert all(torch.equal(a, b[chosen]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("D", [896, 2048])
def test_clusters_agree_with_one(emulated, D):
    """Their parts are sums relative to largest logits of their own."""
    inputs = inputs_of(9, D, 1100, TIED, seed=1)
    one = emulated(inputs, 1)
    for clusters in (2, 5, 9):
        many = emulated(inputs, clusters)
        assert torch.equal(many[0], one[0])
        for got, want in zip(many[1:3], one[1:3], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        torch.testing.assert_close(many[3], one[3], rtol=2**-8, atol=2**-8 * one[3].abs().max().item())


@pytest.mark.parametrize("clusters", [1, 4])
def test_a_row_whose_largest_logits_come_last_forgets_nothing(emulated, clusters):
    """Each tile outweighs all before it by e^40, or is outweighed by it, so that sums and mixture are brought down again
    and again."""
    V, step = 2000, 28
    inputs = inputs_of(3, 896, V, TIED)
    inputs["hidden_BD"] = torch.eye(3, 896).bfloat16() * torch.tensor([[1], [-1], [1]])
    ids = torch.arange(V)
    weight_VD = torch.zeros(V, 896)
    weight_VD[:, 0], weight_VD[:, 1], weight_VD[:, 2] = ids // 128 * step, ids // 128 * step, ids % 8
    weight_VD[:, 3:] = torch.randn(V, 893, generator=torch.Generator().manual_seed(2))
    inputs["weight_VD"] = inputs["embed_VD"] = weight_VD.bfloat16()
    assert_exact(emulated(inputs, clusters), inputs, atol=1e-3)  # of logits near 600


def test_greedy_takes_the_lowest_of_equal_ids(emulated):
    inputs = inputs_of(4, 896, 300, TIED) | {"greedy": True, "hidden_BD": torch.eye(4, 896).bfloat16()}
    weight_VD = torch.zeros(300, 896)
    for row, ids in enumerate(([299, 140, 150], [127, 128], [5, 256], [])):
        weight_VD[ids, row] = 2.5
    inputs["weight_VD"] = inputs["embed_VD"] = weight_VD.bfloat16()
    for clusters in (1, 2, 3):
        assert emulated(inputs, clusters)[0].tolist() == [140, 127, 5, 0]


def test_saturated_logits_are_one_token_and_a_diverged_model_is_seen(emulated):
    inputs = inputs_of(3, 896, 200, TIED)
    weight_VD = -80 * torch.ones(200, 896)
    weight_VD[torch.tensor([0, 130, 199]), torch.arange(3)] = 80
    inputs |= {"hidden_BD": torch.eye(3, 896).bfloat16(), "weight_VD": weight_VD.bfloat16()}
    token_B, logprob_B, entropy_B, mixture_BD = emulated(inputs)
    assert token_B.tolist() == [0, 130, 199] and (logprob_B == 0).all() and (entropy_B == 0).all()
    assert torch.equal(mixture_BD, inputs["weight_VD"][token_B].float())
    inputs["hidden_BD"][1] = torch.nan
    token_B, logprob_B, *_ = emulated(inputs)
    assert token_B[[0, 2]].tolist() == [0, 199] and 0 <= token_B[1] < 200 and logprob_B.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("stream", [STREAM_TILE, STREAM_ID, STREAM_LATENT])
def test_noise_is_the_contract_s_bit_for_bit(library, stream):
    seed, counter_3 = torch.tensor(-3 - 2**40), torch.tensor([2**31 + 1, 2**32 - 1, 65536 * 7 + 3])
    out = torch.empty(500)
    library.uniforms(ctypes.c_int64(seed.item()), ctypes.c_void_p(counter_3.data_ptr()), stream, 500,
                     ctypes.c_void_p(out.data_ptr()))
    position, prompt, sample_word = counter_3
    assert torch.equal(out, uniform(seed, torch.arange(500) * 2654435761, position, stream, prompt, sample_word))


def test_clusters_share_every_tile_of_a_vocabulary(library):
    library.begin_of.restype = ctypes.c_int64
    for V in (1, 128, 129, 49152, 151936, 262144):
        num_tiles = -(-V // 128)
        for clusters in {1, min(7, num_tiles), min(32, num_tiles), min(33, num_tiles)}:
            begin = [library.begin_of(*map(ctypes.c_int64, (c, clusters, V))) for c in range(clusters + 1)]
            sizes = [b - a for a, b in zip(begin, begin[1:], strict=False)]
            assert begin[0] == 0 and begin[-1] == num_tiles and 1 <= min(sizes) and max(sizes) - min(sizes) <= 1


@needs_module
def test_the_backend_says_what_it_cannot_take():
    from fastlatent_kernels.vocab_head.cuda_impl import why_not_inputs

    inputs = inputs_of(2, 896, 50, TIED)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="^vocab_head: cuda takes CUDA tensors$"):
            vocab_head(**inputs, backend="cuda")
    hidden_BD, weight_VD = inputs["hidden_BD"], inputs["weight_VD"]
    assert why_not_inputs(hidden_BD, weight_VD, weight_VD) is None
    wide, many = torch.zeros(50, 576).bfloat16(), torch.empty(1).bfloat16().expand(2**18 + 1, 896)
    gaps = torch.zeros(50, 2 * 896).bfloat16()[:, ::2]
    for args, said in (((hidden_BD, weight_VD, None), "the embedding too, the very same tensor; triton takes others"),
                       ((hidden_BD, weight_VD, weight_VD.clone()), "the embedding too, the very same tensor"),
                       ((hidden_BD.float(), weight_VD, weight_VD), "bfloat16 hidden states and weights"),
                       ((wide[:3], wide, wide), "widths 896, 1536 and 2048, not 576; triton takes any, in two passes"),
                       ((hidden_BD[:1].expand(65, 896), weight_VD, weight_VD), "1 to 64 rows, not 65; triton takes any"),
                       ((hidden_BD[:0], weight_VD, weight_VD), "1 to 64 rows, not 0"),
                       ((hidden_BD, many, many), "up to 262144 ids, not 262145"),
                       ((hidden_BD, gaps, gaps), "contiguous weights")):
        assert said in why_not_inputs(*args)
    assert vocab_head.passed_over("cuda", **inputs) == "compiled, but never run on a GPU: name it to run it"


@needs_module
def test_the_launch_fills_the_struct_and_the_launcher_checks_it(monkeypatch):
    from fastlatent_kernels.vocab_head import cuda_impl

    module, inputs, launched = cuda_impl._cuda, inputs_of(5, 1536, 300, TIED), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    # the real struct refuses a field it has not, and a value of another type
    fake = SimpleNamespace(OnePassHead=module.OnePassHead, one_pass_clusters=lambda width, device: 33,
                           one_pass_head=lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(cuda_impl, "_cuda", fake)
    cuda_impl._clusters_at_once.cache_clear()
    args = [inputs[name] for name in ("hidden_BD", "weight_VD", "temperature", "seed", "counter_B3", "greedy")]
    try:
        token_B, logprob_B, entropy_B, mixture_BD = cuda_impl._launch(*args)
        with pytest.raises(ValueError, match="^weight_VD: expected an address that is a multiple of 16, got 0x"):
            cuda_impl._launch(args[0], torch.zeros(300 * 1536 + 1).bfloat16()[1:].view(300, 1536), *args[2:])
    finally:
        cuda_impl._clusters_at_once.cache_clear()
    assert token_B.shape == logprob_B.shape == entropy_B.shape == (5,) and mixture_BD.shape == (5, 1536)
    ((arguments, stream, _),) = launched
    assert (arguments.rows, arguments.vocab, arguments.width, arguments.greedy, stream) == (5, 300, 1536, False, 7)
    assert arguments.clusters == 3  # tiles of 128 ids
    assert arguments.inv_temperature == pytest.approx(1 / 0.7)
    for name, bad, said in (("rows", 65, "rows: expected 1 to 64"), ("vocab", 2**18 + 1, "vocab: expected 1 to 262144"),
                            ("clusters", 4, "clusters: expected 1 to one a tile"), ("hidden", 8, "hidden, weight: expected")):
        changed = module.OnePassHead()
        for field in ("rows", "vocab", "width", "clusters"):
            setattr(changed, field, getattr(arguments, field))
        setattr(changed, name, bad)
        with pytest.raises(RuntimeError, match=f"^{said}"):
            module.one_pass_head(changed, 0, 0)
    with pytest.raises(RuntimeError, match="CUDA|width"):
        module.one_pass_clusters(100, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "D", "V"), [
    (1, 896, 1), (5, 896, 127), (64, 896, 151936), (1, 1536, 151936), (17, 1536, 5001), (64, 1536, 151936), (64, 2048, 262144)])
@pytest.mark.parametrize("greedy", [False, True])
def test_on_a_hopper_gpu(B, D, V, greedy):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    inputs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs_of(B, D, V, TIED).items()}
    inputs |= {"embed_VD": inputs["weight_VD"], "greedy": greedy}
    out, plain = (vocab_head(**inputs, backend=backend) for backend in ("cuda", "triton"))
    again = vocab_head(**inputs, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    assert (out.token_B == plain.token_B).float().mean() >= 0.98  # two scores may differ by less than the rounding
    same = out.token_B == plain.token_B
    torch.testing.assert_close(out.logprob_B[same], plain.logprob_B[same], rtol=0, atol=5e-5)
    torch.testing.assert_close(out.entropy_B, plain.entropy_B, rtol=0, atol=5e-5)
    most = plain.mixture_BD.float().abs().max().item()
    torch.testing.assert_close(out.mixture_BD.float(), plain.mixture_BD.float(), rtol=2**-7, atol=2**-8 * most)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: vocab_head(**kw, backend="cuda"), fullgraph=True, backend="aot_eager")(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(out, compiled, strict=True))
