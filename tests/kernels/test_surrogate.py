"""The policy loss: every variant's gradient against a formula written out in float64, and against trl's GRPO loss."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from fastlatent_kernels import clipped_surrogate
from fastlatent_kernels.clipped_surrogate import STATS

CLIP = dict(clip_low=0.2, clip_high=0.28)


def columns(A=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    new = lambda scale: scale * torch.randn(A, generator=g, dtype=torch.float64)
    logprob = -new(2.0).abs()
    return dict(logprob=logprob.requires_grad_(), old=logprob.detach() + new(0.5), ref=logprob.detach() + new(0.5),
                entropy=new(1.0).abs().requires_grad_(), advantage=new(1.0),
                weight=torch.rand(A, generator=g, dtype=torch.float64) * (torch.rand(A, generator=g) < 0.8))


def token_by_token(c, clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, has_old, has_ref):
    """The loss as a loop over tokens with the cases spelt out, and its statistics."""
    loss, stats = torch.zeros((), dtype=torch.float64), dict.fromkeys(STATS, 0.0)
    names = ("logprob", "old", "ref", "entropy", "advantage", "weight")
    for lp, old, ref, entropy, advantage, weight in zip(*(c[name] for name in names), strict=True):
        if weight == 0:
            continue
        log_ratio = lp - (old if has_old else lp.detach())
        ratio = log_ratio.exp()
        is_low = bool(advantage < 0 and ratio < 1 - clip_low)
        is_high = bool(advantage > 0 and ratio > 1 + clip_high)
        is_dual = bool(dual_clip is not None and advantage < 0 and ratio > dual_clip)
        bound = 1 - clip_low if is_low else 1 + clip_high if is_high else dual_clip if is_dual else None
        policy = -(ratio if bound is None else bound) * advantage
        kl = torch.zeros(())
        if has_ref:
            kl = {"k1": lp - ref, "k2": (lp - ref) ** 2 / 2, "k3": (ref - lp).exp() - (ref - lp) - 1}[kl_estimator]
        loss = loss + weight * (policy + kl_coef * kl - entropy_coef * entropy)
        token = dict(count=1, policy_loss=weight * policy, kl=kl, entropy=entropy, clip_low=is_low, clip_high=is_high,
                     dual_clipped=is_dual, ratio=ratio, approx_kl=ratio - 1 - log_ratio, log_ratio_abs=log_ratio.abs())
        stats = {name: stats[name] + float(torch.as_tensor(token[name]).detach()) for name in STATS}
    return loss, stats


VARIANTS = [(dual, kl, entropy, old, ref) for dual, kl, entropy, old, ref in itertools.product(
    (None, 1.4), (None, "k1", "k2", "k3"), (0.0, 0.3), (True, False), (True, False)) if ref or kl is None]


@pytest.mark.parametrize(("dual_clip", "kl", "entropy_coef", "has_old", "has_ref"), VARIANTS)
def test_every_variant_is_the_formula_written_out(dual_clip, kl, entropy_coef, has_old, has_ref):
    options = CLIP | dict(dual_clip=dual_clip, kl_coef=0.0 if kl is None else 0.2, kl_estimator=kl or "k3",
                          entropy_coef=entropy_coef)
    c = columns(120)
    want, want_stats = token_by_token(c, **options, has_old=has_old, has_ref=has_ref)
    got = clipped_surrogate(c["logprob"], c["old"] if has_old else None, c["ref"] if has_ref else None, c["entropy"],
                            c["advantage"], c["weight"], **options)
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.stats, torch.tensor([want_stats[name] for name in STATS], dtype=torch.float64))
    leaves = (c["logprob"], c["entropy"])
    for a, b in zip(torch.autograd.grad(got.loss, leaves, allow_unused=True), torch.autograd.grad(want, leaves),
                    strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-11, atol=1e-13)
    if has_old:
        reached = ["clip_low", "clip_high"] + (["dual_clipped"] if dual_clip else [])
        assert all(want_stats[name] > 3 for name in reached)
    else:
        assert want_stats["ratio"] == want_stats["count"] > 0


@pytest.mark.parametrize(("beta", "delta", "entropy_coef", "has_old"), [
    (0.0, None, 0.0, True), (0.1, None, 0.0, True), (0.0, 1.5, 0.0, True), (0.1, 1.5, 0.02, True),
    (0.1, None, 0.02, False)])
def test_loss_and_gradient_equal_trl_s(beta, delta, entropy_coef, has_old):
    """trl's two-sided clip bounds the ratio; above 1 + clip_high that is the dual clip."""
    from trl import GRPOTrainer
    S, L = 6, 20
    c = columns(S * L)
    grid = lambda name: c[name].view(S, L)
    mask, advantage_S = (grid("weight") > 0).double(), grid("advantage")[:, 0]
    num_tokens = mask.sum()
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, loss_type="dapo", epsilon_low=CLIP["clip_low"],
        epsilon_high=CLIP["clip_high"], use_vllm=False,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False), model=SimpleNamespace(training=False),
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=entropy_coef != 0, use_adaptive_entropy=False,
        entropy_coef=entropy_coef, _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (grid("logprob"), grid("entropy"), None))
    batch = dict(prompt_ids=torch.zeros(S, 1), prompt_mask=torch.ones(S, 1), completion_ids=torch.zeros(S, L),
                 completion_mask=mask, advantages=advantage_S, ref_per_token_logps=grid("ref"),
                 num_items_in_batch=num_tokens)
    if has_old:
        batch["old_per_token_logps"] = grid("old")
    theirs = GRPOTrainer._compute_loss(trainer, None, batch)
    ours = clipped_surrogate(
        c["logprob"], c["old"] if has_old else None, c["ref"] if beta else None, c["entropy"],
        advantage_S.repeat_interleave(L), mask.flatten() / num_tokens, **CLIP, dual_clip=delta,
        kl_coef=beta, entropy_coef=entropy_coef)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-12, atol=0)
    leaves = (c["logprob"], c["entropy"])
    for a, b in zip(*(torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (ours.loss, theirs)),
                    strict=True):
        torch.testing.assert_close(*(torch.zeros(S * L, dtype=torch.float64) if x is None else x for x in (a, b)),
                                   rtol=1e-11, atol=1e-15)
    stats, metrics = dict(zip(STATS, (ours.stats / num_tokens).tolist(), strict=True)), trainer._metrics["eval"]
    for name, metric in (("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean"),
                         ("entropy", "entropy")):
        assert stats[name] == pytest.approx(metrics[metric][0], rel=1e-6)


def test_extreme_ratios_and_dead_tokens_stay_finite():
    logprob = torch.tensor([-1.0, -200.0, -torch.inf], requires_grad=True)
    old, advantage = torch.tensor([-300.0, -1.0, -1.0]), torch.tensor([-1.0, 1.0, 1.0])
    out = clipped_surrogate(logprob, old, old, torch.zeros(3), advantage, torch.tensor([0.5, 0.5, 0.0]), **CLIP,
                            kl_coef=0.1)
    out.loss.backward()
    assert out.loss.isfinite() and out.stats.isfinite().all() and logprob.grad.isfinite().all() and out.stats[0] == 2
    assert logprob.grad[2] == 0


def test_options_that_do_not_fit_are_named():
    c = columns(4)
    args = (c["logprob"], None, None, c["entropy"], c["advantage"], c["weight"])
    for options, message in ((dict(kl_coef=0.1), "ref_logprob_A: expected a tensor because kl_coef is not 0"),
                             (dict(dual_clip=1.0), "dual_clip: expected None or a number above 1, got 1.0"),
                             (dict(kl_estimator="k4"), "kl_estimator: expected k1, k2, k3, got 'k4'"),
                             (dict(clip_low=1.5), r"clip_low: expected a number in \[0, 1\], got 1.5")):
        with pytest.raises(ValueError, match=f"^{message}"):
            clipped_surrogate(*args, **CLIP | options)
