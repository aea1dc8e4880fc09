"""What a latent step draws: candidates, noise and scores, against a full sort in float64 and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import torch
from fastlatent_kernels.noise import STREAM_LATENT, row_gumbel
from mixtures import GRPO, LATENT_GRPO, SEED, SOFT_GRPO, counters, policy_of, rollouts_of

from fastlatent.methods import gumbel_mixture
from fastlatent.methods.gumbel_mixture import MixtureConfig


def test_the_k_best_are_those_of_a_full_sort_on_the_same_noise():
    """A hundred thousand rows; the sort knows nothing of pruning."""
    B, V, K = 100_000, 40, 4
    config = MixtureConfig(top_k=K, top_p=0.8)
    logits = 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(1))
    drawn = gumbel_mixture.draw(config, logits, False, SEED, counters(B))
    noise = row_gumbel(SEED, torch.arange(V), STREAM_LATENT, counters(B)).double().numpy().clip(-1.5, 3) + 1.5
    logprob = logits.double().numpy()
    logprob -= np.log(np.exp(logprob).sum(1, keepdims=True))
    order = np.argsort(-logprob, axis=1)
    p = np.exp(np.take_along_axis(logprob, order, 1))
    is_candidate = np.zeros((B, V), bool)
    np.put_along_axis(is_candidate, order, (np.cumsum(p, 1) - p < 0.8) | (np.arange(V) < K), axis=1)
    score = np.where(is_candidate, logprob + noise, -np.inf)
    best = np.sort(score, axis=1)[:, ::-1][:, :K]
    # a token at the very edge of the nucleus may be in for float32 and out for float64
    is_close = np.abs(drawn.score_BK.numpy() - best).max(1) < 1e-4
    assert is_close.mean() > 0.9999
    assert 2 < is_candidate.sum(1).mean() < V - 2 and (drawn.best_B != drawn.likeliest_B).float().mean() > 0.3


def test_renormalised_candidates_are_the_top_k_inside_the_nucleus():
    config = SOFT_GRPO.Config(top_k=3, top_p=0.7)
    p = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.9, 0.05, 0.03, 0.02], [0.3, 0.3, 0.2, 0.2]])
    drawn = gumbel_mixture.draw(config, p.log(), False, SEED, counters(3))
    kept = [[0.5, 0.25], [0.9], [0.3, 0.3, 0.2]]  # less than .7 before each
    for row, shares in enumerate(kept):
        ids = drawn.ids_BK[row, : len(shares)]
        noise = row_gumbel(SEED, ids, STREAM_LATENT, counters(3)[row : row + 1])[0].clamp(-1.5, 3.0)
        wanted = torch.log(torch.tensor(shares) / sum(shares) + 1e-6) + noise
        torch.testing.assert_close(drawn.score_BK[row, : len(shares)], wanted, atol=1e-5, rtol=1e-5)
        assert (drawn.score_BK[row, len(shares) :] == -torch.inf).all()
        assert drawn.best_B[row] == ids[wanted.argmax()]
        torch.testing.assert_close(drawn.logprob_BK[row, : len(shares)], torch.tensor(shares).log(), atol=1e-5, rtol=1e-5)


def test_noise_lies_in_its_interval_and_a_shift_adds_to_it():
    assert MixtureConfig().noise_bounds == (0.0, 4.5)
    assert MixtureConfig(delta=0.25).noise_bounds == (0.25, 4.75)
    assert SOFT_GRPO.Config().noise_bounds == (-1.5, 3.0)
    logits = torch.randn(500, 50, generator=torch.Generator().manual_seed(2))
    for config in (MixtureConfig(delta=0.25), SOFT_GRPO.Config()):
        drawn = gumbel_mixture.draw(config, logits, False, SEED, counters(500))
        d = gumbel_mixture.noise_of(config, drawn.score_BK, drawn.logprob_BK)
        d, (low, high) = d[drawn.score_BK > -torch.inf], config.noise_bounds
        assert low - 1e-3 <= d.min() < low + 0.3 and high - 0.01 < d.max() <= high + 1e-3


# ---- decoding -------------------------------------------------------------------------------------------------------


def test_one_token_without_noise_is_greedy_decoding():
    """K = 1: the mixture is the likeliest token's own embedding."""
    plain, latent = policy_of(GRPO), policy_of(LATENT_GRPO, top_k=1)
    ours, theirs = rollouts_of(latent, greedy=True), rollouts_of(plain, greedy=True)
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    assert any(r.trace is not None for r in ours)
    wide = rollouts_of(policy_of(LATENT_GRPO, top_k=10), greedy=True)
    assert [r.token_ids for r in wide] != [r.token_ids for r in theirs]  # else any input would do


def test_greedy_decoding_has_no_noise_and_sampling_has():
    policy = policy_of(LATENT_GRPO)
    for greedy, num_different in ((True, 1), (False, 4)):
        first = rollouts_of(policy, greedy=greedy)[:4]  # of one prompt
        assert len({tuple(r.token_ids) for r in first}) == num_different
        d = torch.cat([r.trace.logprob_N for r in first])
        assert bool((d == -1).all()) == greedy  # -d - exp(-d) at d = 0
