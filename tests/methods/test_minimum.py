"""Minima against scipy's and against those that are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, rosen, rosen_der

from nc_audit.methods.minimum import minimum


def rosenbrock(at: torch.Tensor) -> torch.Tensor:
    return (100 * (at[1:] - at[:-1] ** 2) ** 2 + (1 - at[:-1]) ** 2).sum()


@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(0, 6))
def test_of_a_bowl_of_any_shape_it_is_the_bottom(dims, seed, decades):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64)).Q
    steep = torch.logspace(0, decades, dims, dtype=torch.float64)
    bottom, start = torch.randn(2, dims, generator=generator, dtype=torch.float64).unbind()
    at, least = minimum(lambda x: 5 + (steep * (axes.T @ (x - bottom)).square()).sum() / 2, start)
    assert least == pytest.approx(5, abs=1e-8)
    torch.testing.assert_close(at, bottom, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dims", [2, 5, 17])
def test_a_bent_valley_is_followed_as_by_scipy(dims):
    start = torch.zeros(dims, dtype=torch.float64)
    evaluations = 0

    def counted(at: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        return rosenbrock(at)

    _, least = minimum(counted, start)
    theirs = minimize(rosen, start.numpy(), jac=rosen_der, method="BFGS", options={"gtol": 1e-5})
    assert max(least, theirs.fun) < 1e-8
    assert evaluations < 2.5 * theirs.nfev


def test_it_turns_back_from_where_the_cost_is_no_number():
    at, _ = minimum(lambda x: (x - x.log()).sum(), torch.full((3,), 40.0, dtype=torch.float64))
    torch.testing.assert_close(at, torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_where_nothing_falls_it_stays():
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for cost in (lambda x: 0 * x.sum(), lambda x: float("nan") * x.sum()):
        assert torch.equal(minimum(cost, start)[0], start)


def test_without_end_it_stops_after_its_rounds():
    _, value = minimum(lambda x: -x.sum(), torch.zeros(2, dtype=torch.float64), rounds=7)
    assert -float("inf") < value < 0
