"""The bfloat16 head that multiplies pairs itself: float32 logits from float64's own, the same bits in every company.

On a processor it does not take, `native` is the other path, which test_ops.py and test_sampling.py hold to its contract.
"""

import ctypes
import math
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastlatent_kernels import vocab_head
from fastlatent_kernels.noise import STREAM_ID, STREAM_TILE, row_gumbel
from fastlatent_kernels.vocab_head.native_bf16 import HAS_KERNEL, takes

SEED = torch.tensor(2**50 + 11)
TIED = None


def inputs_of(B: int, D: int, V: int, E: int | None, seed: int = 0) -> dict[str, object]:
    """`E` columns of an embedding of its own, or TIED."""
    g = torch.Generator().manual_seed(seed)
    weight_VD = (3 * torch.randn(V, D, generator=g) / D**0.5).bfloat16()
    rows = torch.arange(B)
    return {"hidden_BD": torch.randn(B, D, generator=g).bfloat16(), "weight_VD": weight_VD, "temperature": 0.7, "seed": SEED,
            "counter_B3": torch.stack([rows % 97, 5 + rows, 65536 + rows % 3], dim=1), "greedy": False,
            "embed_VD": weight_VD if E is TIED else torch.randn(V, E, generator=g).bfloat16()}


def exact(inputs: dict[str, object]) -> tuple[torch.Tensor, ...]:
    """Token, log-probability, entropy and mixture in float64, drawn tile by tile."""
    logits_BV = inputs["hidden_BD"].double() @ inputs["weight_VD"].double().t() / inputs["temperature"]
    logprob_BV = logits_BV.log_softmax(1)
    p_BV = logprob_BV.exp()
    token_B = logits_BV.argmax(1)
    if not inputs["greedy"]:
        tiles = logits_BV.split(128, dim=1)
        mass_BC = torch.stack([tile.logsumexp(1) for tile in tiles], dim=1)
        noise_BC = row_gumbel(SEED, torch.arange(len(tiles)), STREAM_TILE, inputs["counter_B3"])
        noise_BV = row_gumbel(SEED, torch.arange(logits_BV.shape[1]), STREAM_ID, inputs["counter_B3"])
        begin_B = (mass_BC + noise_BC).argmax(1) * 128
        inside_BV = (torch.arange(logits_BV.shape[1]) // 128 * 128)[None] == begin_B[:, None]
        token_B = (logits_BV + noise_BV).masked_fill(~inside_BV, -math.inf).argmax(1)
    mixture_BE = p_BV / p_BV.norm(dim=1, keepdim=True) @ inputs["embed_VD"].double()
    return token_B, logprob_BV.gather(1, token_B[:, None])[:, 0], -(p_BV * logprob_BV).sum(1), mixture_BE


# rows: every rest of a quad, of a block of two and of four quads, more than one group of 64; widths: below, at and past
# whole chunks of 8; columns: one, two and three groups of 32, whole and not, after panels of three and without;
# vocabularies: less than a tile, whole tiles, an odd last one, more than one tile in each of the 32 splits, and more than 16,
# whose noise is drawn together
@pytest.mark.parametrize(("B", "D", "V", "E"), [
    (1, 1, 1, 1), (2, 31, 127, TIED), (3, 32, 128, 33), (4, 33, 300, TIED), (5, 64, 257, 100), (6, 96, 640, 200),
    (7, 576, 1000, TIED), (64, 40, 4500, TIED), (71, 32, 4225, 390), (131, 16, 300, 64), (10, 70, 513, 90),
    (13, 200, 1000, 161), (9, 8, 131000, 16), (20, 24, 700, 130), (15, 24, 700, 40)])
@pytest.mark.parametrize("greedy", [False, True])
def test_it_is_float64_s_but_for_float32_sums_and_one_rounding_of_p(B, D, V, E, greedy):
    inputs = inputs_of(B, D, V, E) | {"greedy": greedy}
    if not HAS_KERNEL:
        return
    out, (token_B, logprob_B, entropy_B, mixture_BE) = vocab_head(**inputs, backend="native"), exact(inputs)
    assert torch.equal(out.token_B, token_B)
    # logits rounded to bfloat16 would be off by 1e-2
    torch.testing.assert_close(out.logprob_B, logprob_B.float(), rtol=0, atol=2e-5)
    torch.testing.assert_close(out.entropy_B, entropy_B.float(), rtol=0, atol=2e-5)
    assert out.mixture_BD.shape == mixture_BE.shape and out.mixture_BD.dtype == torch.bfloat16
    torch.testing.assert_close(out.mixture_BD.double(), mixture_BE, rtol=2**-8, atol=2**-9 * mixture_BE.abs().max().item())
    bare = vocab_head(**inputs | {"embed_VD": None}, backend="native")
    assert bare.mixture_BD is None
    assert all(torch.equal(a, b) for a, b in zip(bare[:3], out[:3], strict=True))


def test_a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads():
    if not HAS_KERNEL:
        return
    inputs = inputs_of(70, 80, 9000, 72)
    whole = vocab_head(**inputs, backend="native")
    for chosen in (torch.randperm(70, generator=torch.Generator().manual_seed(1)), torch.tensor([69]), torch.arange(5, 13)):
        part = vocab_head(**inputs | {name: inputs[name][chosen] for name in ("hidden_BD", "counter_B3")}, backend="native")
        assert all(torch.equal(a, b[chosen]) for a, b in zip(part, whole, strict=True))
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(vocab_head(**inputs, backend="native"), whole, strict=True))
    finally:
        torch.set_num_threads(1)


def test_threads_do_not_disturb_each_other():
    """Each keeps its scratch from call to call."""
    if not HAS_KERNEL:
        return
    inputs = [inputs_of(B, 64, 3000, 64, seed=B) for B in (3, 9)]
    want = [vocab_head(**i, backend="native") for i in inputs]
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda turn: vocab_head(**inputs[turn % 2], backend="native"), range(200)))
    for turn, out in enumerate(outs):
        assert all(torch.equal(a, b) for a, b in zip(out, want[turn % 2], strict=True))


def test_a_row_whose_largest_logits_come_last_forgets_nothing():
    """Each tile outweighs all before it by e^40, so that every split's sums are brought down again and again."""
    if not HAS_KERNEL:
        return
    V, step = 5000, 40 * 0.7
    inputs = inputs_of(3, 2, V, 48)
    inputs["hidden_BD"] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).bfloat16()
    # small whole numbers, exact in bfloat16: rising and falling by tile, and by id for the last row
    ids = torch.arange(V)
    inputs["weight_VD"] = torch.stack([(ids // 128) * step // 1, (ids % 8).float()], dim=1).bfloat16()
    out, (token_B, logprob_B, entropy_B, mixture_BE) = vocab_head(**inputs, backend="native"), exact(inputs)
    assert torch.equal(out.token_B, token_B) and len(token_B.unique()) == 3
    torch.testing.assert_close(out.logprob_B, logprob_B.float(), rtol=0, atol=1e-3)  # of logits near 1,500
    torch.testing.assert_close(out.entropy_B, entropy_B.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(out.mixture_BD.double(), mixture_BE, rtol=2**-8, atol=2**-9 * mixture_BE.abs().max().item())


@pytest.mark.parametrize("greedy", [False, True])
def test_a_nan_shows_in_its_row_and_in_no_other_of_its_quad(greedy):
    if not HAS_KERNEL:
        return
    inputs = inputs_of(4, 32, 9000, 40) | {"greedy": greedy}
    want = vocab_head(**inputs, backend="native")
    inputs["hidden_BD"] = inputs["hidden_BD"].clone()
    inputs["hidden_BD"][1, 5] = torch.nan
    out, others = vocab_head(**inputs, backend="native"), torch.tensor([0, 2, 3])
    assert 0 <= out.token_B[1] < 9000 and out.logprob_B[1].isnan() and out.entropy_B[1].isnan()
    assert out.mixture_BD[1].isnan().all()
    assert all(torch.equal(a[others], b[others]) for a, b in zip(out, want, strict=True))


def test_one_logit_that_is_nan_shows():
    if not HAS_KERNEL:
        return
    inputs = inputs_of(3, 32, 9000, 40)
    inputs["weight_VD"][4321, 7] = torch.nan
    out = vocab_head(**inputs, backend="native")
    assert out.logprob_B.isnan().all() and out.entropy_B.isnan().all() and out.mixture_BD.isnan().all()


def test_equal_logits_give_a_greedy_row_the_first_of_them():
    """Within a tile, in two tiles of a split, and in two splits."""
    if not HAS_KERNEL:
        return
    inputs = inputs_of(3, 3, 9000, 8) | {"greedy": True, "hidden_BD": torch.eye(3).bfloat16()}
    inputs["weight_VD"] = torch.zeros(9000, 3).bfloat16()
    for row, ids in enumerate(((70, 75), (3 * 256 + 100, 3 * 256 + 130), (400, 8999))):
        inputs["weight_VD"][list(ids), row] = 1.0
    assert vocab_head(**inputs, backend="native").token_B.tolist() == [70, 868, 400]


def before_a_forbidden_page(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose next byte may not be read: who does ends the process."""
    size = tensor.numel() * tensor.element_size()
    allowed = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, allowed + mmap.PAGESIZE)
    forbidden = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + allowed
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=allowed - size)
    return copy.view(tensor.shape).copy_(tensor)


# widths and columns that end within a chunk and a group, after whole ones and not; odd vocabularies, whose last id has no pair
@pytest.mark.parametrize(("B", "D", "V", "E"), [(1, 9, 129, 1), (3, 31, 127, 33), (6, 8, 1, 70), (18, 33, 385, 127)])
def test_it_reads_nothing_past_the_end_of_a_matrix(B, D, V, E):
    if not HAS_KERNEL:
        return
    inputs = inputs_of(B, D, V, E)
    guarded = inputs | {name: before_a_forbidden_page(inputs[name]) for name in ("hidden_BD", "weight_VD", "embed_VD")}
    out, want = vocab_head(**guarded, backend="native"), vocab_head(**inputs, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


def test_what_it_does_not_take_goes_the_other_way():
    """Weights with gaps, or of another type."""
    inputs = inputs_of(6, 64, 1000, 40)
    want = vocab_head(**inputs, backend="native")
    gaps = torch.stack([inputs["weight_VD"], torch.full_like(inputs["weight_VD"], torch.nan)], dim=2)[:, :, 0]
    for change in ({"weight_VD": gaps}, {"weight_VD": inputs["weight_VD"].float()},
                   {"embed_VD": inputs["embed_VD"].float()}):
        changed = inputs | change
        assert not takes(changed["hidden_BD"], changed["weight_VD"], changed["embed_VD"])
        out = vocab_head(**changed, backend="native")
        torch.testing.assert_close(out.entropy_B, want.entropy_B, rtol=0, atol=0.05)
        torch.testing.assert_close(out.mixture_BD.float(), want.mixture_BD.float(), rtol=0, atol=0.15)
