from __future__ import annotations

import math

import pytest
import torch

from nc_audit.calibrate import (
    NoiseRate,
    calibrated,
    combine_held_out,
    corrected_by_people,
    image_mean,
    mean_rate,
    noise_rate,
    share_by_image,
)
from nc_audit.methods.known_swaps import Evidence


def mixture(
    rate: float,
    seed: int,
    num_images: int = 400,
    per_image: int = 3,
    gap: float = 3.0,
    *,
    whole_images: bool = False,
) -> tuple[Evidence, torch.Tensor]:
    """Evidence of which `rate` is drawn like the swaps', and the image of each pair; nothing else."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.arange(num_images * per_image) // per_image
    units = num_images if whole_images else len(image)
    noisy = (torch.arange(units) < round(rate * units))[torch.randperm(units, generator=generator)]
    if whole_images:
        noisy = noisy[image]
    given = torch.randn(len(image), generator=generator) + gap * noisy
    swaps = torch.randn(len(image), generator=generator) + gap
    return Evidence(given, swaps), image


def noise_of(evidence: Evidence, image: torch.Tensor, seed: int = 0, **options: float) -> NoiseRate:
    return noise_rate(evidence, image, image, seed, **options)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_interval_contains_the_estimate_and_lies_within_0_and_1(rate, seed):
    found = noise_of(*mixture(rate, seed))
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.estimate == pytest.approx(rate, abs=0.08)
    assert not found.is_blind
    assert found.level == 0.9


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_swaps_that_are_right_by_chance_do_not_raise_the_rate(rate):
    evidence, image = mixture(rate, 2, 4000)
    by_chance = 0.1
    returned = torch.arange(len(image)) < round(rate * by_chance * len(image))
    evidence = Evidence(evidence.given_N, evidence.swaps_S - 3.0 * returned)
    told = noise_of(evidence, image, right_by_chance=by_chance)
    assert told.estimate == pytest.approx(rate, abs=0.02)
    assert told.swaps_right == pytest.approx(rate * by_chance, rel=0.05)
    assert told.low < rate < told.high
    assert noise_of(evidence, image).estimate > told.estimate + 0.8 * rate**2 * by_chance


@pytest.mark.parametrize("whole_images", [False, True])
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(rate, whole_images):
    covered = 0
    for seed in range(30):
        found = noise_of(*mixture(rate, seed, 300, whole_images=whole_images), num_draws=100)
        covered += found.low <= rate <= found.high
    # 27 of 30 are expected; fewer than 22 would come by chance once in a hundred times.
    assert covered >= 22


def test_more_images_narrow_the_interval_and_noise_by_image_widens_it():
    widths = []
    for num_images, whole in ((200, False), (2000, False), (2000, True)):
        found = noise_of(*mixture(0.4, 0, num_images, 5, whole_images=whole))
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2
    assert widths[2] > 1.2 * widths[1]


def test_a_higher_level_gives_a_wider_interval():
    evidence, image = mixture(0.3, 0)
    half, most = (noise_of(evidence, image, level=level) for level in (0.5, 0.95))
    assert most.low < half.low <= half.high < most.high


def test_the_same_seed_gives_the_same_interval():
    evidence, image = mixture(0.3, 0)
    assert noise_of(evidence, image) == noise_of(evidence, image)
    assert noise_of(evidence, image, seed=1) != noise_of(evidence, image)


@pytest.mark.parametrize("seed", range(5))
def test_random_scores_are_blind(seed):
    evidence, image = mixture(0.0, seed, gap=0.0)
    found = noise_of(evidence, image)
    assert found.is_blind
    assert found.is_weak
    assert (found.low, found.high) == (0.0, 1.0)
    assert math.isnan(found.expected_auroc)
    for half in (calibrated(evidence, found).given_N, calibrated(evidence, found).swaps_S):
        assert (half == 0.5).all()


def test_scores_that_point_the_wrong_way_are_blind():
    assert noise_of(*mixture(0.0, 0, gap=-2.0)).is_blind


@pytest.mark.parametrize(("gap", "weak"), [(0.8, True), (3.0, False)])
def test_weak_evidence_is_called_weak(gap, weak):
    found = noise_of(*mixture(0.1, 0, gap=gap))
    assert not found.is_blind
    assert found.is_weak is weak


def test_an_expected_auroc_that_is_no_number_is_weak():
    assert NoiseRate(0.995, 0.99, 1.0, 0.9, float("nan"), False).is_weak


def test_calibrated_probability_means_near_the_rate():
    evidence, image = mixture(0.3, 0)
    found = noise_of(evidence, image)
    probability = calibrated(evidence, found).given_N
    assert probability.mean().item() == pytest.approx(found.estimate, abs=0.03)


# --- whole images


@pytest.mark.parametrize("gap", [1.5, 4.0])
@pytest.mark.parametrize(
    ("rate", "whole", "expected"),
    [(0.3, True, 1), (0.7, True, 1), (0.3, False, 0), (0.7, False, 0), (0.02, True, 0), (0.0, True, 0)],
)
def test_whole_image_noise_is_noticed_however_good_the_evidence(gap, rate, whole, expected):
    evidence, image = mixture(rate, 0, gap=gap, whole_images=whole)
    posterior = evidence.posterior(rate).given_N
    assert share_by_image(posterior, rate, image) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("share", [0.35, 0.65])
def test_of_a_mixture_the_share_that_strikes_whole_images_is_told(share):
    rate, num, per_image = 0.4, 4000, 5
    generator = torch.Generator().manual_seed(1)
    image = torch.arange(num * per_image) // per_image
    whole = (torch.rand(num, generator=generator) < share * rate)[image]
    single = torch.rand(len(image), generator=generator) < (1 - share) * rate / (1 - share * rate)
    noisy = whole | single
    given = torch.randn(len(image), generator=generator) + 3.5 * noisy
    evidence = Evidence(given, torch.randn(len(image), generator=generator) + 3.5)
    assert share_by_image(evidence.posterior(rate).given_N, rate, image) == pytest.approx(share, abs=0.1)


def test_images_of_one_caption_each_say_nothing_of_how_noise_strikes():
    evidence, image = mixture(0.4, 0, per_image=1)
    assert share_by_image(evidence.posterior(0.4).given_N, 0.4, image) == 0


# --- several draws


def test_the_mean_of_rates_is_blind_where_most_are():
    seeing = NoiseRate(0.2, 0.1, 0.4, 0.9, 0.9, False, swaps_right=0.02)
    other = NoiseRate(0.4, 0.2, 0.5, 0.9, 0.8, False, swaps_right=0.04)
    blind = NoiseRate(0.9, 0.0, 1.0, 0.9, float("nan"), True)
    both = mean_rate([seeing, other])
    assert (both.estimate, both.low, both.high) == pytest.approx((0.3, 0.15, 0.45))
    assert (both.expected_auroc, both.swaps_right) == pytest.approx((0.85, 0.03))
    assert mean_rate([seeing, blind, other]) == both
    assert mean_rate([seeing, blind]).is_blind
    assert mean_rate([seeing]) == seeing


def test_other_evidence_states_another_auroc_at_the_same_rate():
    rate = noise_of(*mixture(0.3, 0, gap=1.5))
    better = rate.separating(mixture(0.3, 0, gap=3.0)[0])
    assert better.expected_auroc > rate.expected_auroc + 0.05
    assert (better.estimate, better.low, better.high) == (rate.estimate, rate.low, rate.high)
    blind = NoiseRate(0.9, 0.0, 1.0, 0.9, float("nan"), True)
    assert blind.separating(mixture(0.3, 0)[0]) is blind


def test_image_mean():
    value, image = torch.tensor([1.0, 2.0, 3.0, 7.0]), torch.tensor([2, 0, 2, 0])
    assert image_mean(value, image).tolist() == [2.0, 4.5, 2.0, 4.5]
    assert image_mean(value, image).dtype == value.dtype


@pytest.mark.parametrize("whole", [False, True])
def test_held_out_evidence_is_fused_and_averaged_over_images_where_these_are_struck(whole):
    first, image = mixture(0.3, 0, whole_images=True)
    loss, _ = mixture(0.3, 0, whole_images=True, gap=2.0)
    held_out = combine_held_out(first, loss, loss, image, image, whole, 0)
    per_image = held_out.evidence.given_N.view(400, 3)
    assert bool((per_image == per_image[:, :1]).all()) is whole
    assert held_out.rate.estimate == pytest.approx(0.3, abs=0.1)
    for posterior in (held_out.posterior.given_N, held_out.posterior.swaps_S):
        assert ((posterior >= 0) & (posterior <= 1)).all()
    assert held_out.posterior.given_N.mean().item() == pytest.approx(held_out.rate.estimate, abs=0.05)


def test_few_swapped_images_widen_the_interval_by_the_doubt_about_them():
    evidence, image = mixture(0.3, 0, whole_images=True)
    rate = combine_held_out(evidence, evidence, evidence, image, image, True, 0).rate
    doubt = 40 / 400
    assert rate.high >= rate.estimate + doubt
    assert rate.low <= rate.estimate - doubt
    sure = noise_rate(evidence, image, image, 0)
    doubted = noise_rate(evidence, image, image, 0, doubt=0.2)
    assert doubted.estimate == sure.estimate
    assert doubted.high - sure.estimate == pytest.approx(math.hypot(sure.high - sure.estimate, 0.2))


# --- what people found


def decided(true_slope: float, shift: float, num: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Stated probabilities, the true ones, and decisions on pairs that were picked by the stated ones."""
    generator = torch.Generator().manual_seed(seed)
    logit = 3 * torch.randn(5000, generator=generator, dtype=torch.float64)
    truth = torch.sigmoid(shift + true_slope * logit)
    noise = torch.rand(5000, generator=generator) < truth
    worst = logit.argsort(descending=True)[: 3 * num]
    known = worst[torch.randperm(len(worst), generator=generator)[:num]]
    return torch.sigmoid(logit), truth, known, noise[known]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("slope", "shift"), [(1.0, -1.5), (1.0, 1.5), (0.6, 0.0), (1.0, 0.0)])
def test_decisions_mend_what_is_stated_even_if_only_the_worst_were_looked_at(slope, shift, seed):
    stated, truth, known, noise = decided(slope, shift, 600, seed)
    bent = corrected_by_people(stated, known, noise)
    before, after = ((one - truth).abs()[stated > 0.3].mean() for one in (stated, bent))
    assert after <= max(0.9 * before, 0.04)
    if shift:
        assert after <= before / 2
    assert (bent[stated.argsort()].diff() >= 0).all()


def test_few_decisions_change_little_and_none_change_nothing():
    stated, _, known, _ = decided(1.0, 0.0, 3)
    one = corrected_by_people(stated, known[:1], torch.tensor([False]))
    assert (one - stated).abs().max() < 0.25
    assert torch.equal(corrected_by_people(stated, known[:0], torch.zeros(0, dtype=torch.bool)), stated)
    certain = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    kept = corrected_by_people(certain, torch.tensor([2]), torch.tensor([True]))
    assert kept[:2].tolist() == [0.0, 1.0]
    assert kept[2] > 0.5


def test_a_second_estimate_of_the_auroc_counts_by_the_noise_rate():
    rate = NoiseRate(0.25, 0.2, 0.3, 0.9, 0.9, is_blind=False)
    assert rate.expecting(0.98).expected_auroc == pytest.approx(0.92)
    assert rate.expecting(float("nan")) == rate
    nothing = NoiseRate(1.0, 0.99, 1.0, 0.9, float("nan"), is_blind=False)
    assert math.isnan(nothing.expecting(0.9).expected_auroc)


def test_a_moved_rate_stays_within_bounds_and_a_blind_one_stays():
    rate = NoiseRate(0.2, 0.1, 0.3, 0.9, 0.95, is_blind=False)
    assert [rate.moved(0.1).estimate, rate.moved(-0.5).low] == [pytest.approx(0.3), 0.0]
    blind = NoiseRate(0.2, 0.0, 1.0, 0.9, 0.5, is_blind=True)
    assert blind.moved(0.1) == blind
