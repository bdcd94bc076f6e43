"""Probability, noise rate and its interval from evidence on given pairs and known swaps.

Shapes: N = pairs; S = swaps; I = images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.methods.known_swaps import Evidence, expected_auroc, tail_shares

WEAK_AUROC = 0.85


@dataclass(frozen=True)
class NoiseRate:
    """Estimated share of noisy pairs, 0..1, with its interval over images."""

    estimate: float
    low: float
    high: float
    level: float
    expected_auroc: float

    @property
    def is_weak(self) -> bool:
        """Whether the scores tell swaps from given pairs too poorly to be trusted."""
        return not self.expected_auroc >= WEAK_AUROC


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
    return NoiseRate(estimate, low, high, level, expected_auroc(evidence.given_N, evidence.swaps_S, estimate))
