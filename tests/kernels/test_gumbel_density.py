"""The surrogate density of recorded scores, against numbers worked by hand and derivatives in float64."""

import math

import pytest
import torch
from fastlatent_kernels.topk_gumbel.density import gumbel_log_density, kept_logprob, mixture_weights

LOGPROB = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -3.0, -2.5]], dtype=torch.float64)
NOISE = torch.tensor([[0.0, 1.0, 4.5], [-1.0, 0.5, 2.0]], dtype=torch.float64)
SCORE = LOGPROB + NOISE


def slopes(**options) -> torch.Tensor:
    logprob = LOGPROB.clone().requires_grad_()
    gumbel_log_density(SCORE, logprob, **options).sum().backward()
    return logprob.grad


def test_the_density_is_the_mean_of_three_gumbel_densities():
    # -d - exp(-d): d = 0 gives -1, 1 gives -1.36788, 4.5 gives -4.51111, -1 gives -1.71828, 0.5 gives -1.10653, 2 gives
    # -2.13534
    wanted = torch.tensor([(-1 - 1.3678794 - 4.5111090) / 3, (-1.7182818 - 1.1065307 - 2.1353353) / 3], dtype=torch.float64)
    torch.testing.assert_close(gumbel_log_density(SCORE, LOGPROB), wanted, atol=1e-7, rtol=0)
    gumbel = torch.distributions.Gumbel(torch.zeros((), dtype=torch.float64), 1.0)
    torch.testing.assert_close(gumbel_log_density(SCORE, LOGPROB), gumbel.log_prob(NOISE).mean(1))


def test_the_slope_is_positive_where_noise_is_and_bounded_where_told():
    torch.testing.assert_close(slopes(), (1 - torch.exp(-NOISE)) / 3)
    assert slopes()[1, 0] == pytest.approx(-1.7182818 / 3)
    bounded = slopes(bounded_N=torch.tensor([True, True]))
    assert bounded[1, 0] == pytest.approx(-0.6321206 / 3)  # exp(-1) - 1: the sign stays, the size is below 1
    bounded[1, 0] = slopes()[1, 0]
    torch.testing.assert_close(bounded, slopes())  # nothing else has changed
    torch.testing.assert_close(slopes(bounded_N=torch.tensor([True, False])), slopes())


def test_the_bound_keeps_values():
    both = torch.tensor([True, True])
    assert torch.equal(gumbel_log_density(SCORE, LOGPROB, bounded_N=both), gumbel_log_density(SCORE, LOGPROB))


@pytest.mark.parametrize("options", [{}, {"bounds": (-1.5, 3.0)}, {"logprob_floor": -2.7}])
def test_gradients_in_float64(options):
    logprob = LOGPROB.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gumbel_log_density(SCORE, x, **options), logprob)
    assert torch.autograd.gradcheck(lambda x: gumbel_log_density(SCORE, kept_logprob(x, SCORE), **options), logprob)


def test_bounds_clamp_the_noise_and_stop_its_gradient():
    clamped = gumbel_log_density(SCORE, LOGPROB, bounds=(-0.5, 3.0))
    d = NOISE.clamp(-0.5, 3.0)
    torch.testing.assert_close(clamped, (-d - torch.exp(-d)).mean(1))
    slope = slopes(bounds=(-0.5, 3.0))
    assert slope[0, 2] == slope[1, 0] == 0 and slope[0, 1] != 0


def test_a_floor_and_an_empty_place_leave_the_mean():
    floored = gumbel_log_density(SCORE, LOGPROB, logprob_floor=-2.7)
    assert floored[0] == pytest.approx((-1 - 1.3678794) / 2) and floored[1] == pytest.approx((-1.7182818 - 2.1353353) / 2)
    score = SCORE.clone()
    score[0, 2] = -torch.inf
    assert gumbel_log_density(score, LOGPROB)[0] == pytest.approx((-1 - 1.3678794) / 2)
    logprob = LOGPROB.clone().requires_grad_()
    gumbel_log_density(score, kept_logprob(logprob, score)).sum().backward()
    assert logprob.grad.isfinite().all() and logprob.grad[0, 2] == 0


def test_kept_ids_hold_all_the_mass():
    score = SCORE.clone()
    score[0, 2] = -torch.inf
    kept = kept_logprob(LOGPROB, score)
    assert float(kept[0, :2].exp().sum()) == pytest.approx(1) == float(kept[1].exp().sum())
    assert kept[0, 0] == pytest.approx(-math.log1p(math.exp(-1)))  # of exp(-1) and exp(-2)


def test_weights_are_a_softmax_at_their_temperature():
    score = torch.tensor([[0.0, math.log(3.0), -torch.inf]])
    torch.testing.assert_close(mixture_weights(score, 1.0), torch.tensor([[0.25, 0.75, 0.0]]))
    torch.testing.assert_close(mixture_weights(score, 0.5), torch.tensor([[0.1, 0.9, 0.0]]))
