from __future__ import annotations

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_audit.methods import levelled
from nc_audit.methods.known_swaps import noise_posterior
from nc_audit.methods.levelled import levelled_posterior


def mixture(rate: float, num: int, gap: float, spread: float = 1.0, seed: int = 0):
    """Scores of given pairs and of swaps, which pairs are noise, and the true probability of each."""
    g = torch.Generator().manual_seed(seed)
    noisy = torch.arange(num) < rate * num
    score = torch.randn(num, generator=g) * torch.where(noisy, spread, 1.0) + gap * noisy
    swaps = torch.randn(num // 4, generator=g) * spread + gap
    wrong = torch.distributions.Normal(gap, spread).log_prob(score).exp() * rate
    right = torch.distributions.Normal(0.0, 1.0).log_prob(score).exp() * (1 - rate)
    return score, swaps, noisy, wrong / (wrong + right)


def miscalibration(posterior: torch.Tensor, noisy: torch.Tensor) -> float:
    bins = (posterior * 10).long().clamp_max(9)
    return torch.bincount(bins, noisy.double() - posterior, minlength=10).abs().sum().item() / len(noisy)


@settings(deadline=None)
@given(strategies.scores(), strategies.scores(), st.sampled_from([0.0, 0.002, 0.05, 0.4, 0.9, 1.0]))
def test_rises_with_the_score_and_has_the_mean(score, swaps, mean):
    of_given, of_swaps = levelled_posterior(score, swaps, mean)
    both, values = torch.cat([of_given, of_swaps]), torch.cat([score, swaps])
    assert (both[values.argsort(stable=True)].diff() >= -1e-12).all()
    assert ((both >= 0) & (both <= 1)).all()
    assert of_given.mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("mean", [1e-6, 2.7e-5, 1e-3, 0.5, 1 - 1e-4, 1 - 1e-6])
@pytest.mark.parametrize("gap", [0.0, 2.0, 8.0, 40.0])
def test_probabilities_are_numbers_at_any_mean_and_separation(gap, mean):
    for seed in range(3):
        score, swaps, _, _ = mixture(0.0, 500, gap, seed=seed)
        for right in (0.0, 0.02):
            both = torch.cat(levelled_posterior(score, swaps, mean, right))
            assert ((both >= 0) & (both <= 1)).all()
            assert both[: len(score)].mean().item() == pytest.approx(mean, rel=0.01)


@settings(deadline=None)
@given(strategies.seeds, st.floats(0.01, 100), st.floats(-50, 50))
def test_neither_unit_nor_order_of_scores_matters(seed, unit, shift):
    score, swaps, _, _ = mixture(0.4, 200, 1.5, seed=seed % 1000)
    expected = levelled_posterior(score, swaps, 0.4)[0]
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(seed))
    found = levelled_posterior(unit * score.double()[order] + shift, unit * swaps.double() + shift, 0.4)[0]
    torch.testing.assert_close(found, expected[order], atol=2e-3, rtol=0)


@pytest.mark.parametrize("spread", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_finds_the_true_probability_given_enough_pairs(rate, spread):
    score, swaps, _, truth = mixture(rate, 40_000, 2.0, spread)
    # Where noise spreads more than what is right, the true probability rises again at the low end, as none may here.
    rising = torch.ones(len(score), dtype=torch.bool) if spread <= 1 else score > -0.5
    found = levelled_posterior(score, swaps, rate)[0]
    assert (found - truth)[rising].abs().mean() < 0.02


@pytest.mark.parametrize("rate", [0.4, 0.8])
def test_errs_less_than_a_fit_by_steps_where_swaps_are_few(rate):
    smooth, steps = 0.0, 0.0
    for seed in range(10):
        score, swaps, _, truth = mixture(rate, 600, 2.0, seed=seed)
        smooth += float((levelled_posterior(score, swaps, rate)[0] - truth).abs().mean())
        steps += float((noise_posterior(score, swaps, rate)[0] - truth).abs().mean())
    assert smooth < 0.6 * steps


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_is_calibrated_where_swaps_score_a_little_too_high(rate):
    score, swaps, noisy, _ = mixture(rate, 20_000, 2.0)
    levelled = miscalibration(levelled_posterior(score, swaps + 0.3, rate)[0], noisy)
    plain = miscalibration(noise_posterior(score, swaps + 0.3, rate)[0], noisy)
    assert levelled < 0.06
    assert levelled < plain


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_is_calibrated_where_some_swaps_are_right(rate):
    score, swaps, noisy, _ = mixture(rate, 20_000, 2.5)
    swaps[: round(0.05 * len(swaps))] -= 2.5
    told, untold = (levelled_posterior(score, swaps, rate, share)[0] for share in (0.05, 0.0))
    off = [(noisy[one < 0.3].float().mean() - one[one < 0.3].mean()).abs() for one in (told, untold)]
    assert off[0] < 0.02
    assert off[1] > off[0]


@pytest.mark.parametrize("gap", [2.0, 6.0, 12.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_few_wrong_pairs_far_from_the_rest_are_fitted_as_well_as_from_any_start(gap, seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    right, between = torch.randn(9_940, generator=generator), torch.randn(60, generator=generator)
    score = torch.cat([right - gap, (between - 1) * gap / 2])
    swaps = 2 * torch.randn(5_000, generator=generator) + gap
    costs, least = [], levelled._least

    def seen(cost, level):
        fit = least(cost, level)
        costs.append(cost(fit).item())
        return fit

    monkeypatch.setattr(levelled, "_least", seen)
    levelled_posterior(score, swaps, 7e-4, 1e-5)
    for start in (-2.0, 0.0, 0.35, 1.05, 1.4, 2.0):
        monkeypatch.setattr(levelled, "_STARTS", (start,))
        levelled_posterior(score, swaps, 7e-4, 1e-5)
    assert costs[0] < min(costs[1:]) + 0.2


def test_pairs_of_one_score_speak_once():
    score, swaps, _, _ = mixture(0.5, 400, 1.5)
    once = levelled_posterior(score, swaps, 0.5)[0]
    five_times = levelled_posterior(score.repeat_interleave(5), swaps.repeat_interleave(5), 0.5)[0]
    torch.testing.assert_close(five_times[::5], once, atol=0.02, rtol=0)


def test_works_where_no_gradient_is_kept():
    score, swaps, _, _ = mixture(0.5, 100, 1.5)
    with torch.inference_mode():
        inside = levelled_posterior(score, swaps, 0.5)[0]
    assert torch.equal(inside, levelled_posterior(score, swaps, 0.5)[0])


def test_scores_that_do_not_differ_tell_nothing():
    found = levelled_posterior(torch.ones(10), torch.ones(4), 0.3)[0]
    torch.testing.assert_close(found, torch.full((10,), 0.3, dtype=torch.float64))
