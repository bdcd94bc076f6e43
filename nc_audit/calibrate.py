"""Probability, noise rate and its interval from evidence on given pairs and known swaps.

Shapes: N = pairs; S = swaps; I = images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nc_audit.methods.known_swaps import (
    Evidence,
    expected_auroc,
    fused,
    intra_image_correlation,
    swaps_auroc,
    tail_shares,
)
from nc_audit.methods.levelled import levelled_posterior
from nc_audit.methods.tail_rates import RATE_TAILS, rates_by_two_rules

WEAK_AUROC = 0.85
_LEAST_RATE = 0.03  # below it nothing is said about how noise strikes
_ALL_BY_IMAGE = 0.8  # correlation of being noise within an image from which all noise counts as whole images
_SOME_BY_IMAGE = (
    0.2  # correlation of the posterior within an image up to which none does: some images are hard
)
_CLUSTERING = 1.25
_FEW_IMAGES = (
    40.0  # over their number: how far off a rate by swapped images may be, beside what its interval says
)
_RULES = (2 / 3, 1 / 3)  # how much each of `rates_by_two_rules` counts
_LOOKS = (1 / 4, 3 / 4)  # and each of two looks, the second of them held out


def share_by_image(posterior_N: Tensor, rate: float, image_N: Tensor) -> float:
    """Share of the noise that strikes all captions of an image together, as against pair by pair.

    A calibrated posterior p varies by a share b of r (1 - r), what being noise varies by, and two captions' posteriors
    are as much less alike within an image as b is below 1; so the correlation of being noise is that of p over b.
    Where a share i of the images is wrong as a whole, and other pairs one by one, it is i (1 - r) / ((1 - i) r).

    Args:
        posterior_N: noise probability of the first look, shape [N].
        rate: its noise rate, 0..1.
        image_N: index of each pair's image, shape [N].

    Returns:
        0..1; 0 where little is noisy, where images have one caption each, or where it cannot be told from hard images.
    """
    posterior = posterior_N.double()
    mean, variance = float(posterior.mean()), float(posterior.var(correction=0))
    if rate <= _LEAST_RATE or variance <= 0:
        return 0.0
    alike = intra_image_correlation(posterior, image_N)
    correlation = alike * mean * (1 - mean) / variance
    if alike <= _SOME_BY_IMAGE:
        return 0.0
    if correlation >= _ALL_BY_IMAGE:
        return 1.0
    odds = correlation * mean / (1 - mean)
    return min(1.0, odds / (1 + odds) / mean)


def image_mean(value_N: Tensor, image_N: Tensor) -> Tensor:
    """Mean of a value over the pairs of each pair's image, shape [N]."""
    size = int(image_N.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, image_N, value_N.double())
    return (total / torch.bincount(image_N, minlength=size).clamp_min(1))[image_N].to(value_N.dtype)


@dataclass(frozen=True)
class NoiseRate:
    """Estimated share of noisy pairs, 0..1, with its interval over images.

    `expected_auroc` is not a number where it cannot be told: blind, uncalibrated, or nearly all noise. `swaps_right` is
    the share of the known swaps that are right by chance, 0..1.
    """

    estimate: float
    low: float
    high: float
    level: float
    expected_auroc: float
    is_blind: bool
    is_calibrated: bool = True
    swaps_right: float = 0.0

    def moved(self, by: float) -> NoiseRate:
        """The rate and its interval moved, within 0..1; a blind one stays."""
        if self.is_blind:
            return self
        estimate, low, high = (min(1.0, max(0.0, one + by)) for one in (self.estimate, self.low, self.high))
        return replace(self, estimate=estimate, low=low, high=high)

    def separating(self, evidence: Evidence) -> NoiseRate:
        """The same with the AUROC that other evidence on these pairs may expect at this rate."""
        if self.is_blind:
            return self
        separation = swaps_auroc(evidence.given_N, evidence.swaps_S)
        return replace(self, expected_auroc=expected_auroc(separation, self.estimate, self.swaps_right))

    def expecting(self, auroc: float) -> NoiseRate:
        """The same with a second estimate of the AUROC, by the probabilities, counted by the noise rate.

        The first, by the known swaps, errs with the rate as 1 / (1 - rate); the second knows nothing where little is
        noisy.
        """
        if math.isnan(self.expected_auroc) or math.isnan(auroc):
            return self
        share = self.estimate
        return replace(self, expected_auroc=(1 - share) * self.expected_auroc + share * auroc)

    @property
    def is_weak(self) -> bool:
        """Whether the expected AUROC is below what a user should rely on; unknown, so False, without calibration."""
        return self.is_blind or (self.is_calibrated and not self.expected_auroc >= WEAK_AUROC)

    @property
    def evidence(self) -> str:
        """In a word: none, weak, good; uncalibrated where a method's own probabilities stand."""
        if not self.is_calibrated:
            return "uncalibrated"
        return "none" if self.is_blind else "weak" if self.is_weak else "good"


def noise_rate(
    evidence: Evidence,
    image_N: Tensor,
    image_S: Tensor,
    seed: int,
    level: float = 0.9,
    num_draws: int = 400,
    *,
    also: tuple[Evidence, Tensor] | None = None,
    right_by_chance: float = 0.0,
    doubt: float = 0.0,
) -> NoiseRate:
    """Noise rate with a bootstrap interval over images.

    Every upper tail of the swaps' scores gives an estimate: the given pairs' share of it by the swaps'. Wide tails
    vary less, but clean pairs reach into them; two rules of how far (`rates_by_two_rules`) are fitted to all of them.
    Where the evidence is strong, the rules agree. Their weighted mean counts, and half their difference widens the
    interval.

    Args:
        evidence: one quantity on given pairs and swaps, higher = noisier.
        image_N: index of each given pair's image, shape [N].
        image_S: index of each swap's image, shape [S].
        seed: of the bootstrap.
        level: coverage of the interval.
        num_draws: bootstrap draws.
        also: a second look at the same pairs with swaps of its own, and their images, which training touched less, so
            that it counts for more. Where the two differ, the interval is wider.
        right_by_chance: share of the swaps that would be right were all given pairs wrong, 0..1.
        doubt: how far off the rate may be for swaps that stand badly for noise, added to the interval, 0..1.

    Returns:
        The estimate and its interval; the interval speaks of sampling and of differing looks, not of errors harder
        than random swaps.
    """
    looks = [(evidence, image_S)] + ([also] if also is not None else [])
    sums = [_tail_sums(one, image_N, images) for one, images in looks]
    times_I = torch.ones(len(sums[0][0]), dtype=torch.float64)
    points = [_tail_rates(given, swaps, times_I) for given, swaps in sums]
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[Tensor]] = [[] for _ in looks]
    present = (sums[0][0][:, -1] > 0).nonzero().squeeze(1)
    for _ in range(num_draws):
        at = present[torch.randint(len(present), (len(present),), generator=generator)]
        times_I = torch.bincount(at, minlength=len(sums[0][0])).double()
        for one, (given, swaps) in zip(drawn, sums, strict=True):
            one.append(_tail_rates(given, swaps, times_I))
    # by look, rule and draw, the point first
    found = torch.stack(
        [rates_by_two_rules(point_Q, torch.stack(some)) for point_Q, some in zip(points, drawn, strict=True)]
    )
    # The tails give r / (1 - e), and of the swaps e = r c are right.
    found = found / (1 + right_by_chance * found)
    together = (torch.tensor(_RULES, dtype=torch.float64)[:, None] * found).sum(1)
    counts = torch.tensor(_LOOKS if len(looks) > 1 else (1.0,), dtype=torch.float64)
    estimate = float(counts @ together[:, 0])
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    bounds = (counts @ together[:, 1:]).quantile(quantiles)
    # Captions recur over images, and looks and rules differ: a bootstrap over images sees none of it.
    looks_apart, rules_apart = (
        float(one.max() - one.min()) / 2 for one in (together[:, 0], found[:, :, 0].mean(0))
    )
    low, high = (
        math.hypot(_CLUSTERING * max(0.0, far), looks_apart, rules_apart, doubt)
        for far in (estimate - float(bounds[0]), float(bounds[1]) - estimate)
    )
    low, high = max(0.0, estimate - low), min(1.0, estimate + high)
    num_given, num_swaps = len(evidence.given_N), len(evidence.swaps_S)
    chance_spread = math.sqrt((num_given + num_swaps + 1) / (12 * num_given * num_swaps))
    separation = swaps_auroc(evidence.given_N, evidence.swaps_S)
    is_blind = separation < 0.5 + 3 * chance_spread
    if is_blind:
        return NoiseRate(estimate, 0.0, 1.0, level, float("nan"), is_blind)
    right = estimate * right_by_chance
    auroc = expected_auroc(separation, estimate, right)
    return NoiseRate(estimate, low, high, level, auroc, is_blind, swaps_right=right)


def mean_rate(rates: Sequence[NoiseRate]) -> NoiseRate:
    """The mean of what several draws of known swaps found on the same pairs, blind where most of them are.

    The ends of the interval are means too. What differs between draws is part of each one's interval, so that of the
    mean is rather too wide than too narrow.
    """
    seeing = [one for one in rates if not one.is_blind]
    if 2 * len(seeing) <= len(rates):
        return next(one for one in rates if one.is_blind)

    def mean(name: str) -> float:
        return sum(getattr(one, name) for one in seeing) / len(seeing)

    return replace(
        seeing[0],
        estimate=mean("estimate"),
        low=mean("low"),
        high=mean("high"),
        expected_auroc=mean("expected_auroc"),
        swaps_right=mean("swaps_right"),
    )


def _tail_sums(evidence: Evidence, image_N: Tensor, image_S: Tensor) -> tuple[Tensor, Tensor]:
    """Per image, how many given pairs and how many swaps lie in each tail, and how many there are: [I, Q + 1]."""
    num_images = int(image_N.max()) + 1
    sums = []
    for score, image in ((evidence.given_N, image_N), (evidence.swaps_S, image_S)):
        inside = tail_shares(score, evidence.swaps_S, RATE_TAILS)
        counted = torch.cat([inside, torch.ones(len(inside), 1, dtype=inside.dtype)], 1)
        total = torch.zeros(num_images, counted.shape[1], dtype=torch.float64)
        sums.append(total.index_add_(0, image, counted))
    return sums[0], sums[1]


def _tail_rates(given_IQ: Tensor, swaps_IQ: Tensor, times_I: Tensor) -> Tensor:
    """Noise rate by each tail, shape [Q], with every image counted `times_I`."""
    given, swaps = times_I @ given_IQ, times_I @ swaps_IQ
    floor = 1 / float(swaps_IQ[:, -1].sum().clamp_min(1))
    return (given[:-1] / given[-1]) / (swaps[:-1] / swaps[-1].clamp_min(1)).clamp_min(floor)


def corrected_by_people(probability_N: Tensor, known_K: Tensor, is_noise_K: Tensor) -> Tensor:
    """Probabilities bent to what people found: logit p becomes a + b logit p, fitted on the pairs they decided.

    Which pairs were looked at may depend on the probability (the worst first, say), not on the outcome: pairs that
    are only known because they are right must not be among them. A normal prior around no change (deviation .5 for
    a, .25 for b) keeps a handful of decisions from turning the scale.

    Args:
        probability_N: noise probability of every pair, shape [N], 0..1.
        known_K: indices of the decided pairs, shape [K].
        is_noise_K: whether they were found to be noise, bool, shape [K].

    Returns:
        Shape [N], 0..1; 0 and 1 stay what they are, and order is kept.
    """
    if not len(known_K):
        return probability_N
    logit_N = probability_N.double().clamp(1e-4, 1 - 1e-4).logit()
    x, y = logit_N[known_K], is_noise_K.double()
    prior_mean = torch.tensor([0.0, 1.0], dtype=torch.float64)
    precision = torch.tensor([4.0, 16.0], dtype=torch.float64)
    design = torch.stack([torch.ones_like(x), x], 1)
    coefficients = prior_mean.clone()

    def cost(value: Tensor) -> Tensor:
        fit = torch.nn.functional.binary_cross_entropy_with_logits(design @ value, y, reduction="sum")
        return fit + (precision * (value - prior_mean).square()).sum() / 2

    for _ in range(50):
        found = torch.sigmoid(design @ coefficients)
        gradient = design.T @ (found - y) + precision * (coefficients - prior_mean)
        curvature = (design * (found * (1 - found))[:, None]).T @ design + torch.diag(precision)
        step = torch.linalg.solve(curvature, gradient)
        while cost(coefficients - step) > cost(coefficients) and step.abs().max() > 1e-12:
            step = step / 2
        coefficients = coefficients - step
        if step.abs().max() < 1e-9:
            break
    slope = coefficients[1].clamp_min(0.05)
    bent = torch.sigmoid(coefficients[0] + slope * logit_N).to(probability_N.dtype)
    certain = (probability_N <= 0) | (probability_N >= 1)
    return torch.where(certain, probability_N, bent)


def rate_of_probabilities(
    probability_N: Tensor, image_N: Tensor, seed: int, level: float = 0.9, num_draws: int = 400
) -> NoiseRate:
    """Noise rate of a method that states probabilities by its own rule: their mean, bootstrapped over images.

    Args:
        probability_N: noise probability of each pair, shape [N], 0..1.
        image_N: index of each pair's image, shape [N].
        seed: of the bootstrap.
        level: coverage of the interval, of sampling only.
        num_draws: bootstrap draws.
    """
    size = int(image_N.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, image_N, probability_N.double())
    counts = torch.bincount(image_N, minlength=size).double()
    total, counts = total[counts > 0], counts[counts > 0]
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(num_draws):
        drawn = torch.randint(len(total), (len(total),), generator=generator)
        draws.append(total[drawn].sum() / counts[drawn].sum())
    bounds = torch.stack(draws).quantile(
        torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    )
    estimate = float(probability_N.double().mean())
    low, high = min(float(bounds[0]), estimate), max(float(bounds[1]), estimate)
    return NoiseRate(estimate, low, high, level, float("nan"), is_blind=False, is_calibrated=False)


@dataclass(frozen=True)
class HeldOut:
    """The fused out-of-fold evidence: rate and posterior that training did not touch."""

    evidence: Evidence
    rate: NoiseRate
    posterior: Evidence


def by_image(evidence: Evidence, image_N: Tensor, image_S: Tensor) -> Evidence:
    """Each pair speaks for its image: evidence averaged over the image's pairs, on given pairs and swaps alike.

    The swaps must be of whole images: those of equal `image_S` stand or fall together.
    """
    return Evidence(
        image_mean(evidence.given_N, image_N), image_mean(evidence.swaps_S, image_S)
    ).standardised()


def combine_held_out(
    first: Evidence,
    loss: Evidence,
    distance: Evidence,
    image_N: Tensor,
    image_S: Tensor,
    whole_images: bool,
    seed: int,
    right_by_chance: float = 0.0,
) -> HeldOut:
    """Fuse the first look with the held-out loss and distance; by image when noise strikes whole images.

    Swaps of equal image then are one swapped image. The fewer images there are, the worse swapped ones stand for wrong
    ones: measured in recipes/README.md, "Small sets".
    """
    evidence, doubt = fused(first, loss, distance), 0.0
    if whole_images:
        evidence = by_image(evidence, image_N, image_S)
        doubt = _FEW_IMAGES / len(image_N.unique())
    rate = noise_rate(evidence, image_N, image_S, seed, right_by_chance=right_by_chance, doubt=doubt)
    return HeldOut(evidence, rate, calibrated(evidence, rate))


def calibrated(evidence: Evidence, rate: NoiseRate, *, levelled: bool = False) -> Evidence:
    """Noise probability of given pairs and swaps, 0..1; one half throughout where the evidence is blind.

    Args:
        evidence: higher = noisier.
        rate: by this evidence or, `levelled`, by other evidence on the same pairs; then the probabilities' mean is it.
    """
    if rate.is_blind:
        return Evidence(torch.full_like(evidence.given_N, 0.5), torch.full_like(evidence.swaps_S, 0.5))
    if levelled:
        given, swaps = levelled_posterior(evidence.given_N, evidence.swaps_S, rate.estimate, rate.swaps_right)
        return Evidence(given.float(), swaps.float())
    return evidence.posterior(rate.estimate, rate.swaps_right)
