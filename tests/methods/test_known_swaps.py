from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score

from nc_audit.methods.known_swaps import (
    Evidence,
    auroc_of_probabilities,
    draw_image_swaps,
    draw_swaps,
    expected_auroc,
    fused,
    intra_image_correlation,
    isotonic_fit,
    noise_posterior,
    noise_rate,
    pooled,
    right_by_chance,
    standardise,
    swaps_auroc,
)
from nc_audit.methods.levelled import levelled_posterior

rates = st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(rate: float, seed: int, num: int = 20_000, gap: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Given scores of which `rate` are drawn like the swaps' scores, `gap` deviations above the others."""
    g = generator(seed)
    noisy = torch.arange(num) < rate * num
    return torch.randn(num, generator=g) + gap * noisy, torch.randn(num, generator=g) + gap


# --- drawing


def singly(image, caption, *rest):
    return image, draw_swaps(image, caption, *rest)


@pytest.mark.parametrize("draw", [singly, draw_image_swaps])
class TestDrawing:
    @given(pairs=strategies.pair_indices(), seed=strategies.seeds)
    def test_never_a_given_pair(self, draw, pairs, seed):
        image, caption, _, captions = pairs
        swapped = draw(image, caption, captions, generator(seed))
        known = set(zip(image.tolist(), caption.tolist(), strict=True))
        used = set(caption.tolist())
        for i, c in zip(*(one.tolist() for one in swapped), strict=True):
            assert (i, c) not in known
            assert c == -1 or c in used

    @given(pairs=strategies.pair_indices(), seed=strategies.seeds)
    def test_the_same_seed_draws_the_same_swaps(self, draw, pairs, seed):
        image, caption, _, captions = pairs
        first = draw(image, caption, captions, generator(seed))
        again = draw(image, caption, captions, generator(seed))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    def test_another_seed_draws_others(self, draw):
        image, caption = torch.arange(100), torch.arange(100)
        first, second = (torch.stack(draw(image, caption, 100, generator(seed))) for seed in (0, 1))
        assert not torch.equal(first, second)

    @given(seed=strategies.seeds)
    def test_captions_come_from_the_block(self, draw, seed):
        image, caption = torch.arange(60) // 3, torch.arange(60)
        block = (image * 7) % 4
        at, swapped = draw(image, caption, 60, generator(seed), block)
        block_I = block[::3]
        assert torch.equal(block[swapped], block)
        assert torch.equal(block_I[at], block)
        assert (image[swapped] != at).all()

    def test_a_block_that_has_nothing_to_give_takes_from_others(self, draw):
        image, caption = torch.tensor([0, 0, 1, 2]), torch.arange(4)
        at, swapped = draw(image, caption, 4, generator(), torch.tensor([0, 0, 1, 1]))
        assert (swapped[:2] >= 2).all()
        assert {(1, 3), (2, 2)} == set(zip(at[2:].tolist(), swapped[2:].tolist(), strict=True))

    def test_inputs_stay_as_they_are(self, draw):
        image, caption = torch.arange(30) // 3, torch.arange(30)
        draw(image, caption, 30, generator())
        assert torch.equal(image, torch.arange(30) // 3)
        assert torch.equal(caption, torch.arange(30))

    def test_minus_one_where_an_image_carries_every_caption(self, draw):
        image, caption = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0])
        at, swapped = draw(image, caption, 3, generator())
        assert (swapped[at == 0] == -1).all()
        assert set(swapped[at == 1].tolist()) <= {1, 2}


def test_swaps_of_many_pairs_are_nearly_a_permutation():
    image, caption = torch.arange(3000) // 3, torch.arange(3000)
    swapped = draw_swaps(image, caption, 3000, generator())
    assert (swapped // 3 != image).all()
    # Only the few clashes are drawn again, so nearly every caption is used, none very often.
    assert len(swapped.unique()) > 2990
    assert torch.bincount(swapped).max() <= 3


@given(seed=strategies.seeds, popular=st.integers(20, 70))
def test_swaps_keep_every_caption_as_frequent_as_it_is(seed, popular):
    caption = torch.cat([torch.zeros(popular, dtype=torch.long), torch.arange(1, 201 - popular)])
    swapped = draw_swaps(torch.arange(200), caption, 201, generator(seed))
    assert torch.equal(swapped.sort().values, caption.sort().values)


def test_a_caption_on_most_images_is_drawn_as_far_as_it_goes():
    caption = torch.cat([torch.zeros(150, dtype=torch.long), torch.arange(1, 51)])
    swapped = draw_swaps(torch.arange(200), caption, 51, generator())
    assert (swapped[:150] > 0).all()
    assert (swapped >= 0).all()


@pytest.mark.parametrize("rate", [0.3, 0.8])
@pytest.mark.parametrize("per_image", [1, 2])
def test_right_by_chance_is_what_displaced_captions_show(rate, per_image):
    g = generator(1)
    image, place = torch.arange(20_000) // per_image, torch.arange(20_000) % per_image
    # The captions of an image differ, and some captions are far more frequent than others.
    own = 40 * place + (torch.rand(20_000, generator=g) ** 3 * 40).long()
    wrong = torch.rand(20_000, generator=g) < rate
    found = own.clone()
    found[wrong] = draw_swaps(image[wrong], own[wrong], 80, g, None, (image, own))
    swapped = draw_swaps(image, found, 80, g)
    pairs = set(zip(image.tolist(), own.tolist(), strict=True))
    hits = np.mean([pair in pairs for pair in zip(image.tolist(), swapped.tolist(), strict=True)])
    assert hits > 0.02
    told = rate * right_by_chance(image, swapped, image, found, 80)
    assert told == pytest.approx(hits, rel=0.1)


def test_nothing_is_right_by_chance_where_no_caption_comes_twice():
    image = caption = torch.arange(1000)
    swapped = draw_swaps(image, caption, 1000, generator())
    assert right_by_chance(image, swapped, image, caption, 1000) == pytest.approx(0.001, rel=0.01)


def test_image_swaps_take_all_captions_of_one_other_image_however_many():
    sizes = torch.arange(100) % 5 + 1
    image = torch.arange(100).repeat_interleave(sizes)
    order = torch.randperm(len(image), generator=generator(5))
    image, caption = image[order], torch.arange(len(image))
    at, swapped = draw_image_swaps(image, caption, len(image), generator())
    assert torch.equal(swapped, caption)
    takers = set()
    for donor in range(100):
        (taker,) = set(at[image == donor].tolist())
        assert taker != donor
        takers.add(taker)
    assert takers == set(range(100)), "every image takes once"


# --- standardising and separation


def test_standardised_swaps_have_mean_zero_and_deviation_one():
    values, swaps = mixture(0.3, 0, num=500)
    one = standardise(swaps, swaps)
    assert one.mean().item() == pytest.approx(0, abs=1e-5)
    assert one.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    expected = (values - swaps.mean()) / swaps.std(correction=0)
    assert torch.equal(standardise(values, swaps), expected)


def test_standardise_is_zero_where_swaps_do_not_vary():
    assert standardise(torch.tensor([1.0, 2.0]), torch.full((3,), 7.0)).tolist() == [0.0, 0.0]


@given(strategies.scores(), strategies.scores())
def test_auroc_equals_the_oracle_with_ties_half(score, swaps):
    expected = oracles.swaps_auroc(score.tolist(), swaps.tolist())
    assert swaps_auroc(score, swaps) == pytest.approx(expected, abs=1e-9)
    truth = [0] * len(score) + [1] * len(swaps)
    assert expected == pytest.approx(roc_auc_score(truth, torch.cat([score, swaps])), abs=1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8])
def test_expected_auroc_is_near_the_one_that_labels_would_give(rate):
    score, swaps = mixture(rate, 1, gap=1.5)
    noisy = np.arange(len(score)) < rate * len(score)
    labelled = (
        roc_auc_score(noisy, score)
        if rate
        else roc_auc_score([0] * 20_000 + [1] * 20_000, torch.cat([score, swaps]))
    )
    # The sampling error of the separation is divided by 1 - rate.
    assert expected_auroc(swaps_auroc(score, swaps), rate) == pytest.approx(labelled, abs=0.006 / (1 - rate))


@given(strategies.scores(min_size=2, max_size=20), strategies.seeds)
def test_auroc_of_probabilities_equals_the_oracle(score, seed):
    probability = torch.rand(len(score), generator=generator(seed))
    p, s = probability.tolist(), score.tolist()
    chance = [
        (p[i] * (1 - p[k]), 1.0 if s[i] > s[k] else 0.5 if s[i] == s[k] else 0.0)
        for i in range(len(p))
        for k in range(len(p))
    ]
    expected = sum(w * won for w, won in chance) / sum(w for w, _ in chance)
    assert auroc_of_probabilities(probability, score) == pytest.approx(expected, abs=1e-5)


def test_auroc_of_certain_probabilities_is_that_of_labels():
    score, _ = mixture(0.3, 0, num=2000, gap=1.5)
    noisy = torch.arange(2000) < 600
    assert auroc_of_probabilities(noisy.float(), score) == pytest.approx(
        roc_auc_score(noisy, score), abs=1e-6
    )
    assert math.isnan(auroc_of_probabilities(torch.zeros(5), torch.arange(5.0)))


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_expected_auroc_knows_of_swaps_that_are_right(rate):
    score, swaps = mixture(rate, 5, gap=2.0)
    noisy = torch.arange(len(score)) < rate * len(score)
    swaps[: round(0.1 * len(swaps))] -= 2.0
    labelled = roc_auc_score(noisy, score)
    assert expected_auroc(swaps_auroc(score, swaps), rate, 0.1) == pytest.approx(labelled, abs=0.01)
    assert expected_auroc(swaps_auroc(score, swaps), rate) < labelled - 0.03


def test_expected_auroc_is_no_number_where_all_is_noise():
    assert math.isnan(expected_auroc(0.5, 1.0))


# --- the rate


@given(strategies.scores(), strategies.scores(min_size=2))
def test_rate_equals_the_oracle(score, swaps):
    assert noise_rate(score, swaps) == pytest.approx(
        oracles.noise_rate(score.tolist(), swaps.tolist()), abs=1e-9
    )


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rate_of_known_mixtures(rate, seed):
    assert noise_rate(*mixture(rate, seed)) == pytest.approx(rate, abs=0.02)


@given(strategies.scores(min_size=2), strategies.scores(min_size=2), strategies.seeds)
def test_rate_does_not_depend_on_order_or_on_unit(score, swaps, seed):
    rate = noise_rate(score, swaps)
    order = torch.randperm(len(score), generator=generator(seed))
    assert noise_rate(score[order], swaps.flip(0)) == rate
    assert noise_rate(4 * score, 4 * swaps) == rate
    assert 0 <= rate <= 1


# --- isotonic regression and the posterior


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 5)), min_size=1, max_size=30))
def test_isotonic_fit_equals_the_oracle_and_sklearn(pairs):
    values, weights = (list(side) for side in zip(*pairs, strict=True))
    fitted = isotonic_fit(torch.tensor(values).double(), torch.tensor(weights).double())
    values, weights = torch.tensor(values).tolist(), torch.tensor(weights).tolist()
    np.testing.assert_allclose(fitted, oracles.isotonic(values, weights), atol=1e-6)
    peer = IsotonicRegression().fit_transform(np.arange(len(values)), values, sample_weight=weights)
    np.testing.assert_allclose(fitted, peer, atol=1e-6)
    assert (fitted.diff() >= 0).all()


@given(
    strategies.scores(),
    strategies.scores(),
    rates,
    st.sampled_from([1, 5, 2048]),
    st.sampled_from([0.0, 0.02, 0.2]),
)
def test_posterior_equals_the_oracle(score, swaps, rate, num_bins, right):
    for ours, expected in zip(
        noise_posterior(score, swaps, rate, right, num_bins),
        oracles.noise_posterior(score.tolist(), swaps.tolist(), rate, num_bins, right),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@given(strategies.scores(), strategies.scores(), rates)
def test_posterior_rises_with_the_score_and_ties_are_equal(score, swaps, rate):
    given_pairs, of_swaps = noise_posterior(score, swaps, rate)
    both, values = torch.cat([given_pairs, of_swaps]), torch.cat([score, swaps])
    order = values.argsort(stable=True)
    assert (both[order].diff() >= 0).all()
    assert ((both >= 0) & (both <= 1)).all()
    for value in values.unique():
        assert len(both[values == value].unique()) == 1


@given(strategies.scores(), strategies.scores())
def test_posterior_of_rate_zero_is_zero(score, swaps):
    for posterior in noise_posterior(score, swaps, 0.0):
        assert (posterior == 0).all()


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("gap", [1.5, 3.0])
def test_posterior_means_near_the_rate_and_is_calibrated(rate, gap):
    score, swaps = mixture(rate, 3, gap=gap)
    noisy = torch.arange(len(score)) < rate * len(score)
    posterior, _ = noise_posterior(score, swaps, rate)
    assert posterior.mean().item() == pytest.approx(rate, abs=0.03)
    for low in np.arange(0, 1, 0.2):
        inside = (posterior >= low) & (posterior < low + 0.2)
        if inside.sum() > 300:
            assert noisy[inside].float().mean() == pytest.approx(posterior[inside].mean().item(), abs=0.06)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_posterior_is_calibrated_where_some_swaps_are_right(rate):
    score, swaps = mixture(rate, 3, gap=2.5)
    right = 0.1
    swaps[: round(right * len(swaps))] -= 2.5
    noisy = torch.arange(len(score)) < rate * len(score)
    told, _ = noise_posterior(score, swaps, rate, right)
    untold, _ = noise_posterior(score, swaps, rate)
    off = [(noisy[one > 0.9].float().mean() - one[one > 0.9].mean()).abs() for one in (told, untold)]
    assert off[0] < 0.015
    assert off[1] > 0.03


@given(strategies.scores(min_size=2), strategies.scores(min_size=2), rates, strategies.seeds)
def test_posterior_follows_the_order_of_pairs(score, swaps, rate, seed):
    order = torch.randperm(len(score), generator=generator(seed))
    np.testing.assert_array_equal(
        noise_posterior(score[order], swaps, rate)[0], noise_posterior(score, swaps, rate)[0][order]
    )


# --- whole images


@given(
    st.lists(
        st.tuples(strategies.probabilities.map(lambda p: p[0]), st.integers(0, 5)), min_size=1, max_size=30
    )
)
def test_correlation_equals_the_oracle(rows):
    value, image = (list(side) for side in zip(*rows, strict=True))
    found = intra_image_correlation(torch.tensor(value, dtype=torch.float64), torch.tensor(image))
    expected = oracles.intra_image_correlation(value, image)
    assert found == pytest.approx(expected, abs=1e-6) or np.std(value) < 1e-6


@pytest.mark.parametrize("per_image", [2, 5])
def test_correlation_of_planted_cases(per_image):
    num = 3000
    image = torch.arange(num) // per_image
    by_pair = (torch.rand(num, generator=generator()) < 0.3).float()
    by_image = (torch.rand(num, generator=generator()) < 0.3).float()[image]
    blurred = 0.1 * torch.rand(num, generator=generator(1))
    assert abs(intra_image_correlation(by_pair + blurred, image)) < 0.06
    assert intra_image_correlation(by_image + blurred, image) > 0.97


def test_correlation_is_zero_without_two_pairs_of_one_image_or_without_variation():
    assert intra_image_correlation(torch.rand(10), torch.arange(10)) == 0.0
    assert intra_image_correlation(torch.rand(10), torch.zeros(10, dtype=torch.long)) == 0.0
    assert intra_image_correlation(torch.full((10,), 0.5), torch.arange(10) // 2) == 0.0


# --- evidence


def test_fused_evidence_is_the_sum_of_standardised_evidence():
    first, second = Evidence(*mixture(0.3, 0, 200)), Evidence(*mixture(0.3, 1, 200))
    both = fused(first, second)
    expected = standardise(first.given_N, first.swaps_S) + standardise(second.given_N, second.swaps_S)
    assert torch.equal(both.given_N, expected)
    assert torch.equal(fused(first).swaps_S, standardise(first.swaps_S, first.swaps_S))


def test_evidence_speaks_of_its_own_rate_and_posterior():
    score, swaps = mixture(0.3, 0, 2000)
    evidence = Evidence(score, swaps)
    assert evidence.rate() == noise_rate(score, swaps)
    posterior = evidence.posterior(0.3)
    assert posterior.given_N.dtype == torch.float32
    np.testing.assert_allclose(posterior.given_N, noise_posterior(score, swaps, 0.3)[0], atol=1e-7)


# --- several draws


def drawn(num_draws: int, steady: float, rate: float = 0.4, num: int = 20_000):
    """Evidence of several draws: what is steady from draw to draw, and what is not; and the truth."""
    noisy = torch.arange(num) < rate * num
    own = torch.randn(num, generator=generator(0))
    several = []
    for draw in range(num_draws):
        given_pairs, swaps = (torch.randn(num, generator=generator(10 + 2 * draw + at)) for at in range(2))
        swaps = steady**0.5 * torch.randn(num, generator=generator(90 + draw)) + (1 - steady) ** 0.5 * swaps
        several.append(
            Evidence(steady**0.5 * own + (1 - steady) ** 0.5 * given_pairs + 2.5 * noisy, swaps + 2.5)
        )
    return several, noisy


@pytest.mark.parametrize("num_draws", [2, 4])
@pytest.mark.parametrize("steady", [0.5, 0.9])
def test_pooled_swaps_vary_as_the_means_of_noisy_pairs_do(num_draws, steady):
    several, noisy = drawn(num_draws, steady)
    one = pooled(several, noisy.double())
    assert one.swaps_S.std() == pytest.approx(one.given_N[noisy].std().item(), rel=0.03)
    assert one.swaps_S.mean() == pytest.approx(one.given_N[noisy].mean().item(), abs=0.03)
    assert len(one.swaps_S) == num_draws * len(several[0].swaps_S)


def test_several_draws_tell_noise_better_and_stay_calibrated():
    several, noisy = drawn(4, 0.5)
    one = pooled(several, several[0].posterior(0.4).given_N)
    assert swaps_auroc(one.given_N[~noisy], one.given_N[noisy]) > 0.015 + swaps_auroc(
        several[0].given_N[~noisy], several[0].given_N[noisy]
    )
    posterior = levelled_posterior(one.given_N, one.swaps_S, 0.4)[0]
    for low in np.arange(0, 1, 0.2):
        inside = (posterior >= low) & (posterior < low + 0.2)
        if inside.sum() > 300:
            assert noisy[inside].float().mean() == pytest.approx(posterior[inside].mean().item(), abs=0.06)


def test_one_draw_is_pooled_as_it_is():
    (only,), _ = drawn(1, 0.5, num=100)
    one = pooled([only], torch.rand(100, generator=generator()))
    assert torch.equal(one.given_N, only.standardised().given_N)
    assert torch.equal(one.swaps_S, only.standardised().swaps_S)


@given(strategies.seeds, st.integers(2, 4))
def test_the_order_of_draws_does_not_matter(seed, num_draws):
    several = [Evidence(*mixture(0.3, seed % 1000 + at, 60)) for at in range(num_draws)]
    weight = torch.rand(60, generator=generator(seed))
    one, other = pooled(several, weight), pooled(several[::-1], weight)
    torch.testing.assert_close(one.given_N, other.given_N)
    torch.testing.assert_close(one.swaps_S.sort().values, other.swaps_S.sort().values)
