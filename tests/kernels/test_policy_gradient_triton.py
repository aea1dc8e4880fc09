"""The surrogate and the two heads in Triton: every option against float64, rows of several blocks, broken and extreme
rows, and what torch's machinery asks of an operator."""

import importlib
import itertools

import pytest
import torch
from fastlatent_kernels import clipped_surrogate, token_logprob
from fastlatent_kernels.clipped_surrogate import STATS
from fastlatent_kernels.policy_gradient_head import policy_gradient_head

CLIP = dict(clip_low=0.2, clip_high=0.28)
EVERYTHING = CLIP | dict(dual_clip=1.4, kl_coef=0.2, kl_estimator="k3", entropy_coef=0.3)
VARIANTS = [(dual, kl, entropy, old) for dual, kl, entropy, old in itertools.product(
    (None, 1.4), (None, "k1", "k2", "k3"), (0.0, 0.3), (True, False))]
DTYPES = [torch.float32, torch.bfloat16]


def columns(A, g):
    """logprob, old, ref, entropy, advantage, weight; half the ratios outside the clip range."""
    new = lambda scale: scale * torch.randn(A, generator=g)
    logprob = -new(2.0).abs()
    return [logprob, logprob + new(0.5), logprob + new(0.5), new(1.0).abs(), new(1.0),
            torch.rand(A, generator=g) * (torch.rand(A, generator=g) < 0.8) / A]


def head_inputs(A=9, D=16, V=200, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(A, D, generator=g).to(dtype), (2 * torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    target = torch.randint(V, (A,), generator=g)
    logprob = token_logprob(hidden, weight, target, 0.7, backend="reference")[0]
    _, old, ref, _, advantage, token_weight = columns(A, g)
    return [hidden, weight, target, logprob + old * 0.2, logprob + ref * 0.2, advantage, token_weight]


def run(f, inputs, num_leaves, **options):
    """Outputs, then the gradients of the first leaves for the first output (or the sum of two log-prob outputs)."""
    inputs = [x if x is None or not x.is_floating_point() else x.detach().requires_grad_() for x in inputs]
    out = f(*inputs, **options)
    loss = out[0] if out[0].ndim == 0 else (out[0] - 0.3 * out[1]).sum()
    leaves = [x for x in inputs[:num_leaves] if x is not None]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [x.detach() for x in out] + [torch.zeros_like(x) if g is None else g
                                        for g, x in zip(gradients, leaves, strict=True)]


def doubled(inputs):
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]


def assert_as_good(f, inputs, num_leaves, **options):
    """Triton's distance from float64 is at most twice the reference's and some roundings; returns what Triton gave."""
    got = run(f, inputs, num_leaves, **options, backend="triton")
    near = run(f, inputs, num_leaves, **options, backend="reference")
    exact = run(f, doubled(inputs), num_leaves, **options, backend="reference")
    for i, (a, b, truth) in enumerate(zip(got, near, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        rounding = 8 * torch.finfo(a.dtype).eps * truth.abs().max().clamp(min=0.01)
        allowed = 2 * (b.double() - truth).abs().max() + rounding
        assert (a.double() - truth).abs().max() <= allowed, f"output {i}"
    return got


@pytest.mark.parametrize(("dual_clip", "kl", "entropy_coef", "has_old"), VARIANTS)
@pytest.mark.parametrize("op", ["surrogate", "head"])
def test_every_variant_is_the_reference_s(op, dual_clip, kl, entropy_coef, has_old):
    options = CLIP | dict(dual_clip=dual_clip, kl_coef=0.2 if kl else 0.0, kl_estimator=kl or "k3",
                          entropy_coef=entropy_coef)
    if op == "surrogate":
        f, inputs, leaves, (old, ref) = clipped_surrogate, columns(120, torch.Generator().manual_seed(0)), 4, (1, 2)
    else:
        f, inputs, leaves, (old, ref) = policy_gradient_head, head_inputs(), 2, (3, 4)
        options["temperature"] = 0.7
    inputs[old], inputs[ref] = inputs[old] if has_old else None, inputs[ref] if kl else None
    got = assert_as_good(f, inputs, leaves, **options)
    assert all(x.isfinite().all() for x in got) and got[1][0] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_many_blocks(dtype, monkeypatch):
    """The gradient of a row overwrites its own logits block by block, in half the width for bfloat16."""
    for op in (policy_gradient_head, token_logprob):
        module = importlib.import_module(f"{op.__module__}.triton_impl")
        monkeypatch.setattr(module, "block_size", lambda vocab_size: 32)
    inputs = head_inputs(dtype=dtype)
    assert_as_good(policy_gradient_head, inputs, 2, **EVERYTHING, temperature=0.7)
    assert_as_good(token_logprob, inputs[:3], 2, temperature=0.7)


def test_saturated_logits_keep_their_digits():
    """Logits of +-80: a one-hot row, an even row, a target of no mass."""
    weight = torch.eye(4).repeat(1, 5)[:, :16] * 80
    hidden = torch.zeros(4, 16)
    hidden[0, 0], hidden[1], hidden[2, 1], hidden[3, 3] = 1.0, 0.25, -1.0, 0.5
    target = torch.tensor([0, 2, 1, 0])
    logprob, entropy, *gradients = assert_as_good(token_logprob, [hidden, weight, target], 2, temperature=1.0)
    assert logprob[0] == 0 and logprob[3] < -30 and entropy[0] < 1e-6
    assert all(g.isfinite().all() for g in gradients)


def test_a_broken_log_probability_shows_in_the_loss():
    """The trainer skips a step whose loss is not finite: clamping a NaN away would hide it."""
    for i in range(3):
        inputs = columns(8, torch.Generator().manual_seed(0))
        inputs[5] = torch.full((8,), 0.1)
        inputs[i] = inputs[i].clone()
        inputs[i][3] = torch.nan
        assert clipped_surrogate(*inputs, **EVERYTHING, backend="triton").loss.isnan()
        inputs[5][3] = 0.0
        out = clipped_surrogate(*inputs, **EVERYTHING, backend="triton")
        assert out.loss.isfinite() and out.stats.isfinite().all()
    inputs = head_inputs()
    inputs[-1] = torch.full((9,), 0.1)
    inputs[0][2, 1] = torch.nan
    assert policy_gradient_head(*inputs, **EVERYTHING, backend="triton").loss.isnan()


def test_an_id_outside_the_vocabulary_has_no_log_probability():
    """Told by a NaN: an error would wait for the device."""
    inputs = head_inputs()
    inputs[2][:2] = torch.tensor([200, -1])
    inputs[-1] = torch.full((9,), 0.1)
    logprob, _ = token_logprob(*inputs[:3], backend="triton")
    assert logprob[:2].isnan().all() and logprob[2:].isfinite().all()
    assert policy_gradient_head(*inputs, **EVERYTHING, backend="triton").loss.isnan()


def test_far_ratios_are_bounded_as_in_the_reference():
    logprob, old = torch.tensor([-1.0, -200.0, -3.0, -30.0]), torch.tensor([-300.0, -1.0, -23.5, -1.0])
    inputs = [logprob, old, old.flip(0), torch.zeros(4), torch.tensor([-1.0, 1.0, -1.0, -1.0]), torch.full((4,), 0.25)]
    got = assert_as_good(clipped_surrogate, inputs, 1, **CLIP, kl_coef=0.1)
    assert all(x.isfinite().all() for x in got)


def test_statistics_count_tokens_and_not_weights():
    inputs = columns(2500, torch.Generator().manual_seed(1))  # three programs, the last one ragged
    stats = clipped_surrogate(*inputs, **EVERYTHING, backend="triton").stats
    assert stats[STATS.index("count")] == (inputs[5] != 0).sum()
    assert_as_good(clipped_surrogate, inputs, 4, **EVERYTHING)


def test_no_tokens_are_fine():
    none = [x[:0] for x in columns(4, torch.Generator())]
    out = clipped_surrogate(*none, **EVERYTHING, backend="triton")
    assert out.loss == 0 and not out.stats.any()
    inputs = head_inputs()
    empty = [x if i == 1 else x[:0] for i, x in enumerate(inputs)]
    for f, options in ((policy_gradient_head, EVERYTHING), (token_logprob, {})):
        args = empty if f is policy_gradient_head else empty[:3]
        *_, grad_weight = run(f, args, 2, **options, backend="triton")
        assert not grad_weight.any()


def test_strided_columns_give_what_contiguous_ones_give():
    inputs = columns(64, torch.Generator().manual_seed(0))
    strided = list(torch.stack(inputs, dim=1).unbind(dim=1))
    for a, b in zip(run(clipped_surrogate, inputs, 4, **EVERYTHING, backend="triton"),
                    run(clipped_surrogate, strided, 4, **EVERYTHING, backend="triton"), strict=True):
        assert torch.equal(a, b)
    inputs = head_inputs()
    other = [inputs[0].t().contiguous().t(), inputs[1].t().contiguous().t(), *torch.stack(inputs[2:3], 1).unbind(1),
             *torch.stack(inputs[3:], 1).unbind(1)]
    for a, b in zip(run(policy_gradient_head, inputs, 2, **EVERYTHING, backend="triton"),
                    run(policy_gradient_head, other, 2, **EVERYTHING, backend="triton"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["surrogate", "logprob", "head"])
def test_ops_compile_whole_and_equal_eager(op, dtype):
    torch._dynamo.reset()
    f, inputs, leaves, options = {
        "surrogate": (clipped_surrogate, columns(20, torch.Generator().manual_seed(0)), 1, EVERYTHING),
        "logprob": (token_logprob, head_inputs(dtype=dtype)[:3], 2, {}),
        "head": (policy_gradient_head, head_inputs(dtype=dtype), 2, EVERYTHING)}[op]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, leaves, **options, backend="triton"),
                    run(f, inputs, leaves, **options, backend="triton"), strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_well_registered():
    inputs = head_inputs()
    for f, args in ((clipped_surrogate, columns(4, torch.Generator())), (policy_gradient_head, inputs)):
        assert f.why_not("triton", *args, **EVERYTHING) is None  # loads its operators
    names = torch.ops.fastlatent
    options = (0.2, 0.28, 1.4, 0.2, "k3", 0.3)
    logprob, *rest = columns(20, torch.Generator().manual_seed(0))
    torch.library.opcheck(names.surrogate_sums.default, (logprob.requires_grad_(), *rest, *options))
    logits, (target, *given) = torch.randn(5, 40), (x[:5] for x in inputs[2:])
    target %= 40
    temperature = torch.full((5,), 0.7)
    torch.library.opcheck(names.read_logit_rows.default, (logits, target, temperature))
    lse, entropy = torch.logsumexp(logits / 0.7, dim=1), torch.rand(5)
    torch.library.opcheck(names.grad_logit_rows.default,
                          (logits, target, lse, entropy, torch.randn(5), torch.randn(5), temperature, torch.float32))
    for old, grad_dtype in ((given[0], torch.float32), (None, None)):
        torch.library.opcheck(names.loss_logit_rows.default,
                              (logits, target, old, *given[1:], 0.7, *options, grad_dtype))
