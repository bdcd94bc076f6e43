"""Probability, noise rate and its interval from evidence on given pairs and known swaps.

Shapes: N = pairs; S = swaps; I = images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from nc_audit.methods.matching import Pairs

WEAK_AUROC = 0.85
IMAGE_MODE_CORRELATION = 0.5
IMAGE_MODE_MIN_RATE = 0.03


def strikes_whole_images(posterior_N: Tensor, rate: float, image_N: Tensor) -> bool:
    """Whether noise seems to strike all captions of an image together, rather than pair by pair.

    Args:
        posterior_N: noise probability of the first look, shape [N].
        rate: its noise rate, 0..1.
        image_N: index of each pair's image, shape [N].
    """
    correlation = intra_image_correlation(posterior_N, image_N)
    return correlation > IMAGE_MODE_CORRELATION and rate > IMAGE_MODE_MIN_RATE


def image_mean(value_N: Tensor, image_N: Tensor) -> Tensor:
    """Mean of a value over the pairs of each pair's image, shape [N]."""
    size = int(image_N.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, image_N, value_N.double())
    return (total / torch.bincount(image_N, minlength=size).clamp_min(1))[image_N].to(value_N.dtype)


@dataclass(frozen=True)
class NoiseRate:
    """Estimated share of noisy pairs, 0..1, with its interval over images."""

    estimate: float
    low: float
    high: float
    level: float
    expected_auroc: float
    is_blind: bool
    is_calibrated: bool = True

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
    evidence: Evidence, image_N: Tensor, image_S: Tensor, seed: int, level: float = 0.9, num_draws: int = 400
) -> NoiseRate:
    """Noise rate with a bootstrap interval over images.

    Args:
        evidence: one quantity on given pairs and swaps, higher = noisier.
        image_N: index of each given pair's image, shape [N].
        image_S: index of each swap's image, shape [S].
        seed: of the bootstrap.
        level: coverage of the interval.
        num_draws: bootstrap draws.

    Returns:
        The estimate and its interval; the interval speaks of sampling, not of errors harder than random swaps.
    """
    estimate = evidence.rate()
    given_NQ = tail_shares(evidence.given_N, evidence.swaps_S)
    swaps_SQ = tail_shares(evidence.swaps_S, evidence.swaps_S)
    num_images = int(max(image_N.max(), image_S.max())) + 1
    given_IQ = torch.zeros(num_images, given_NQ.shape[1] + 1, dtype=torch.float64)
    swaps_IQ = torch.zeros_like(given_IQ)
    given_IQ.index_add_(0, image_N, torch.cat([given_NQ, torch.ones(len(given_NQ), 1)], 1).double())
    swaps_IQ.index_add_(0, image_S, torch.cat([swaps_SQ, torch.ones(len(swaps_SQ), 1)], 1).double())
    present = given_IQ[:, -1] > 0
    given_IQ, swaps_IQ = given_IQ[present], swaps_IQ[present]
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(num_draws):
        times = torch.bincount(
            torch.randint(len(given_IQ), (len(given_IQ),), generator=generator), minlength=len(given_IQ)
        ).double()
        given, swaps = times @ given_IQ, times @ swaps_IQ
        share = (given[:-1] / given[-1]) / (swaps[:-1] / swaps[-1].clamp_min(1)).clamp_min(1 / len(swaps_SQ))
        draws.append(share.mean().clamp(0.0, 1.0))
    bounds = torch.stack(draws).quantile(
        torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    )
    low, high = min(float(bounds[0]), estimate), max(float(bounds[1]), estimate)
    num_given, num_swaps = len(evidence.given_N), len(evidence.swaps_S)
    chance_spread = math.sqrt((num_given + num_swaps + 1) / (12 * num_given * num_swaps))
    separation = swaps_auroc(evidence.given_N, evidence.swaps_S)
    is_blind = separation < 0.5 + 3 * chance_spread
    if is_blind:
        low, high = 0.0, 1.0
    return NoiseRate(estimate, low, high, level, expected_auroc(separation, estimate), is_blind)


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


def combine_held_out(
    first: Evidence,
    loss: Evidence,
    distance: Evidence,
    pairs: Pairs,
    swap_image_S: Tensor,
    whole_images: bool,
    seed: int,
) -> HeldOut:
    """Fuse the first look with the held-out loss and distance.

    When noise strikes whole images, each pair speaks for its image: the evidence is averaged over the image's
    pairs, on given pairs and on swaps alike.
    """
    evidence = fused(first, loss, distance)
    if whole_images:
        evidence = Evidence(
            image_mean(evidence.given_N, pairs.image_N), image_mean(evidence.swaps_S, swap_image_S)
        ).standardised()
    rate = noise_rate(evidence, pairs.image_N, swap_image_S, seed)
    return HeldOut(evidence, rate, calibrated(evidence, rate))


def calibrated(evidence: Evidence, rate: NoiseRate) -> Evidence:
    """Noise probability of given pairs and swaps, 0..1; one half throughout where the evidence is blind."""
    if rate.is_blind:
        return Evidence(torch.full_like(evidence.given_N, 0.5), torch.full_like(evidence.swaps_S, 0.5))
    return evidence.posterior(rate.estimate)
