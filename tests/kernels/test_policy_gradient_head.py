"""policy_gradient_head against the two ops it fuses and against float64: loss, statistics, gradients, cost, drift."""

import itertools

import pytest
import torch
from fastlatent_kernels import clipped_surrogate, token_logprob
from fastlatent_kernels.clipped_surrogate import STATS
from fastlatent_kernels.policy_gradient_head import policy_gradient_head
from watch import Watch

CLIP = dict(clip_low=0.2, clip_high=0.28)
EVERYTHING = CLIP | dict(temperature=0.7, dual_clip=1.4, kl_coef=0.2, kl_estimator="k3", entropy_coef=0.05)
OLD, REF = 3, 4  # positions among the arguments


def arguments(A=150, D=11, V=70, dtype=torch.float64, master=None):
    """Half the ratios outside the clip range, a fifth of the weights 0."""
    g = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    hidden, weight = new(A, D).to(dtype), (1.5 * new(V, D) / D**0.5).to(master or dtype)
    target = torch.randint(V, (A,), generator=g)
    logprob, _ = token_logprob(hidden.double(), weight.double(), target, 0.7)
    column = torch.float64 if dtype == torch.float64 else torch.float32
    columns = [logprob + 0.4 * new(A), logprob + 0.4 * new(A), new(A), (torch.rand(A, generator=g) < 0.8) / A]
    return [hidden.requires_grad_(), weight.requires_grad_(), target, *(c.to(column) for c in columns)]


def composed(hidden, weight, target, old, ref, advantage, token_weight, *, temperature=1.0, **options):
    logprob, entropy = token_logprob(hidden, weight, target, temperature, backend="reference")
    loss, stats = clipped_surrogate(logprob, old, ref, entropy, advantage, token_weight, backend="reference", **options)
    return loss, stats, logprob.detach(), entropy.detach()


def with_gradients(f, args, options, scale=1.0):
    out = f(*args, **options)
    return *out, *torch.autograd.grad(out[0] * scale, args[:2])


def doubles(args):
    """The same numbers in float64, leaves anew; the weight as rounded to the dtype of the hidden states."""
    rounded = [args[0].detach(), args[1].detach().to(args[0].dtype)]
    return [x.double().requires_grad_() for x in rounded] + [
        x.double() if x is not None and x.is_floating_point() else x for x in args[2:]]


VARIANTS = [(dual, kl, entropy, old) for dual, kl, entropy, old in itertools.product(
    (None, 1.4), (None, "k1", "k2", "k3"), (0.0, 0.3), (True, False))]


@pytest.mark.parametrize(("dual_clip", "kl", "entropy_coef", "has_old"), VARIANTS)
def test_every_variant_is_the_two_ops_it_fuses(dual_clip, kl, entropy_coef, has_old):
    options = CLIP | dict(temperature=0.7, dual_clip=dual_clip, kl_coef=0.2 if kl else 0.0, kl_estimator=kl or "k3",
                          entropy_coef=entropy_coef)
    args = arguments()
    args[OLD], args[REF] = args[OLD] if has_old else None, args[REF] if kl else None
    got, want = with_gradients(policy_gradient_head, args, options), with_gradients(composed, args, options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert want[-1].abs().max() > 1e-3
    stats = dict(zip(STATS, got[1].tolist(), strict=True))
    assert (min(stats["clip_low"], stats["clip_high"]) > 3) == has_old
    assert (stats["dual_clipped"] > 3) == (has_old and dual_clip is not None)


@pytest.mark.parametrize("master", [None, torch.float32], ids=["one dtype", "float32 master"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_close_to_float64_as_the_composition(dtype, master):
    """bfloat16 hidden states round the logits and their gradients alike in both."""
    args = arguments(dtype=dtype, master=master)
    got, near = (with_gradients(f, args, EVERYTHING) for f in (policy_gradient_head, composed))
    exact = with_gradients(composed, doubles(args), EVERYTHING)
    names = ("loss", "stats", "logprob", "entropy", "hidden", "weight")
    for name, a, b, truth in zip(names, got, near, exact, strict=True):
        assert a.dtype == b.dtype, name
        allowed = 2 * (b.double() - truth).abs().max() + 4 * torch.finfo(a.dtype).eps * truth.abs().max()
        assert (a.double() - truth).abs().max() <= allowed, name
        if dtype == torch.float32:
            assert (a - b).norm() <= 1e-6 * b.norm(), name


def test_gradients_are_finite_differences_of_the_loss():
    args = arguments(A=6, D=3, V=9)
    loss = lambda hidden, weight: policy_gradient_head(hidden, weight, *args[2:], **EVERYTHING).loss
    assert torch.autograd.gradcheck(loss, tuple(args[:2]))


def test_backward_scales_what_forward_made_each_time_it_is_called():
    args = arguments()
    out = policy_gradient_head(*args, **EVERYTHING)
    once = torch.autograd.grad(out.loss, args[:2], retain_graph=True)
    thrice = torch.autograd.grad(-3 * out.loss, args[:2], retain_graph=True)
    again = torch.autograd.grad(out.loss, args[:2])
    for a, b, c in zip(once, thrice, again, strict=True):
        torch.testing.assert_close(-3 * a, b)
        assert torch.equal(a, c)
    assert not any(x.requires_grad for x in (out.stats, out.logprob_A, out.entropy_A))


def test_a_second_derivative_is_refused():
    args = arguments(A=6)
    loss = policy_gradient_head(*args, **EVERYTHING).loss
    gradient, = torch.autograd.grad(loss.square(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tokens_of_no_weight_count_nowhere():
    args = arguments(A=90)
    keep = args[-1] != 0
    assert 0 < keep.sum() < 90
    fewer = [args[0].detach()[keep].requires_grad_(), args[1], *(x[keep] for x in args[2:])]
    got, want = (with_gradients(policy_gradient_head, x, EVERYTHING) for x in (args, fewer))
    for a, b in zip((got[0], got[1], got[4][keep], got[5]), (want[0], want[1], want[4], want[5]), strict=True):
        torch.testing.assert_close(a, b)
    assert not got[4][~keep].any() and got[2].isfinite().all()
    args[-1] = torch.zeros_like(args[-1])
    loss, stats, _, _, *gradients = with_gradients(policy_gradient_head, args, EVERYTHING)
    assert not any(x.any() for x in (loss, stats, *gradients))


def test_frozen_weights_or_hidden_states_get_no_gradient():
    args = arguments()
    want = torch.autograd.grad(composed(*args, **EVERYTHING)[0], args[:2])
    for i in range(2):
        frozen = [x.detach() if j == 1 - i else x for j, x in enumerate(args[:2])] + args[2:]
        grad, = torch.autograd.grad(policy_gradient_head(*frozen, **EVERYTHING).loss, args[i])
        torch.testing.assert_close(grad, want[i])


def test_no_rows_are_fine():
    args = arguments(A=0)
    out = with_gradients(policy_gradient_head, args, EVERYTHING)
    assert out[0] == 0 and not out[1].any() and out[2].shape == out[3].shape == (0,) and not out[5].any()


@pytest.mark.parametrize("A", [512, 1500])
def test_nothing_of_a_quarter_of_the_logits_ever_exists(A):
    args = arguments(A, 8, 1000, torch.float32)
    with Watch() as watch:
        policy_gradient_head(*args, **EVERYTHING, backend="reference").loss.backward()
    assert 0 < watch.largest < A * 1000 / 4


def test_three_products_learn_and_one_only_looks():
    args = arguments(64, 8, 40, torch.float32)  # one chunk
    counts = []
    for needs in ((True, True), (True, False), (False, False)):
        hidden, weight = (x.detach().requires_grad_(need) for x, need in zip(args, needs, strict=False))
        with Watch() as watch:
            loss = policy_gradient_head(hidden, weight, *args[2:], **EVERYTHING, backend="reference").loss
            if loss.requires_grad:
                loss.backward()
        counts.append(watch.products)
    with Watch() as watch, torch.no_grad():
        policy_gradient_head(*args, **EVERYTHING, backend="reference")
    assert (*counts, watch.products) == (3, 2, 1, 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fifty_steps_leave_no_bias_of_the_entropy(device):
    """Float32 masters under bfloat16 products, against float64 throughout: with no signal but noise, the entropies of
    the two policies stay together, and their difference has no direction."""
    A, D, V = 192, 16, 64
    start = arguments(A, D, V, torch.float32)
    entropies = []
    for dtype in (torch.bfloat16, torch.float64):
        master_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        master = start[1].detach().to(device, master_dtype).requires_grad_()
        generator, trace = torch.Generator().manual_seed(1), []
        for _ in range(50):
            hidden = torch.randn(A, D, generator=generator).bfloat16().to(device, dtype)
            target = torch.randint(V, (A,), generator=generator).to(device)
            advantage = torch.randn(A, generator=generator).to(device, master_dtype)
            out = policy_gradient_head(hidden, master, target, None, None, advantage, torch.full_like(advantage, 1 / A),
                                       **CLIP, entropy_coef=0.01)
            gradient, = torch.autograd.grad(out.loss, master)
            master = (master - 2.0 * gradient).detach().requires_grad_()
            trace.append(out.entropy_A.mean().double().cpu())
        entropies.append(torch.stack(trace))
    moved, drift = (entropies[1] - entropies[1][0]).abs().max(), entropies[0] - entropies[1]
    assert moved > 0.02
    assert drift[-10:].mean().abs() < 0.02 * moved


def test_wrong_arguments_are_named():
    args = arguments(A=4, dtype=torch.float32)
    for i, value, message in ((2, args[2].int(), "target_A: expected a int64 tensor"),
                              (2, args[2][:, None], r"target_A: expected a int64 tensor of shape \[4\]"),
                              (OLD, args[OLD][:3], r"old_logprob_A: expected a .* of shape \[4\] on cpu, got .* \[3\]"),
                              (1, args[1][:, :3], "weight_VD: expected")):
        wrong = [value if j == i else x for j, x in enumerate(args)]
        with pytest.raises(ValueError, match=f"^{message}"):
            policy_gradient_head(*wrong, **CLIP)
    with pytest.raises(ValueError, match="^temperature: expected a number above 0, got 0"):
        policy_gradient_head(*args, **CLIP, temperature=0)
    args[REF] = None
    with pytest.raises(ValueError, match="^ref_logprob_A: expected a tensor because kl_coef is not 0"):
        policy_gradient_head(*args, **CLIP, kl_coef=0.1)


def test_it_compiles_whole_and_equals_eager():
    torch._dynamo.reset()
    args = arguments(A=150, dtype=torch.float32)
    compiled = torch.compile(policy_gradient_head, fullgraph=True, backend="aot_eager")
    results = (with_gradients(f, args, EVERYTHING) for f in (compiled, policy_gradient_head))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
