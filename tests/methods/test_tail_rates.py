"""The two rules of how far clean pairs reach into the tails of the known swaps' scores."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.methods.tail_rates import RATE_TAILS, rate_by_distance, rate_by_powers, rates_by_two_rules

NUM = len(RATE_TAILS)
UNIT = NormalDist()


def two_normals(rate: float, distance: float) -> torch.Tensor:
    """What each tail estimates where clean pairs score `distance` standard deviations below the swaps."""
    clean = [UNIT.cdf(UNIT.inv_cdf(q) - distance) / q for q in RATE_TAILS]
    return torch.tensor([rate + (1 - rate) * one for one in clean], dtype=torch.float64)


def sure(spread: float = 0.002) -> torch.Tensor:
    return torch.eye(NUM, dtype=torch.float64) / spread**2


@pytest.mark.parametrize("distance", [0.6, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9])
def test_two_normal_distributions_are_told_apart_by_distance(rate, distance):
    assert float(rate_by_distance(two_normals(rate, distance)[None], sure())) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("power", [1.5, 3, 6])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
def test_a_leak_that_is_a_power_is_told_apart_by_powers(rate, power):
    estimates = rate + 0.25 * torch.tensor(RATE_TAILS, dtype=torch.float64) ** power
    assert float(rate_by_powers(estimates[None], sure())) == pytest.approx(rate, abs=0.01)


def test_where_the_evidence_is_weak_powers_find_noise_in_a_clean_set_and_distance_does_not():
    estimates = two_normals(0.0, 0.8)[None]
    assert float(rate_by_powers(estimates, sure(0.02))) > 0.1
    assert float(rate_by_distance(estimates, sure(0.02))) < 0.02


@pytest.mark.parametrize("rate", [0.0, 0.4, 0.8])
def test_where_the_evidence_is_strong_the_rules_agree(rate):
    generator = torch.Generator().manual_seed(1)
    point = two_normals(rate, 4.0)
    draws = point + 0.01 * torch.randn(200, NUM, generator=generator, dtype=torch.float64)
    found = rates_by_two_rules(point, draws)
    assert found.shape == (2, 201)
    np.testing.assert_allclose(found[:, 0], rate, atol=0.01)


def slow_rate_by_distance(estimates: list[float], precision: np.ndarray) -> float:
    """Each distance by itself: the best rate within 0..1 on a fine grid, and what is left of the estimates."""
    rates, weights = [], []
    for step in range(1, 31):
        clean = [UNIT.cdf(UNIT.inv_cdf(q) - 0.2 * step) / q for q in RATE_TAILS]
        best = (math.inf, 0.0)
        for rate in np.linspace(0, 1, 2001):
            left = np.array([e - rate - (1 - rate) * c for e, c in zip(estimates, clean, strict=True)])
            best = min(best, (float(left @ precision @ left), float(rate)))
        rates.append(best[1])
        weights.append(math.exp(-best[0] / 2))
    return float(np.average(rates, weights=weights))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distance_against_a_slow_reference(seed):
    draw = np.random.default_rng(seed)
    mixing = np.eye(NUM) + 0.3 * draw.normal(size=(NUM, NUM))
    precision = mixing @ mixing.T / 0.1**2 / NUM
    estimates = two_normals(0.3, 1.1) + 0.03 * torch.from_numpy(draw.normal(size=NUM))
    fast = float(rate_by_distance(estimates[None], torch.from_numpy(precision)))
    assert fast == pytest.approx(slow_rate_by_distance(estimates.tolist(), precision), abs=2e-3)


@given(st.integers(0, 2**31), st.floats(0.001, 3.0))
def test_any_estimates_give_rates_within_0_and_1(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    draws = 0.5 + spread * torch.randn(30, NUM, generator=generator, dtype=torch.float64)
    found = rates_by_two_rules(draws[0], draws)
    assert bool(((found >= 0) & (found <= 1)).all())
