from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given

from nc_audit.methods.self_paced import (
    AMBIGUOUS,
    CLEAN,
    NOISY,
    divide,
    divided_weight,
    pace_regulariser,
    pace_weight,
)

CHANCE = 4 * math.log(100)
"""Chance level of RRSITR's loss: four cross-entropies over 100 candidates."""


@given(strategies.losses(), strategies.thresholds)
def test_weight_is_the_grid_argmin_of_its_objective(losses, threshold):
    expected = [oracles.pace_weight_on_grid(loss, threshold) for loss in losses.tolist()]
    np.testing.assert_allclose(pace_weight(losses, threshold), expected, atol=1e-3)


@given(strategies.losses(), strategies.thresholds)
def test_weight_is_a_share_that_falls_with_the_loss(losses, threshold):
    weight = pace_weight(losses.sort().values, threshold)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (weight.diff() <= 0).all()


@given(strategies.thresholds)
def test_weight_is_one_at_no_loss_and_zero_from_the_threshold(threshold):
    at = torch.tensor([0.0, threshold, 2 * threshold, math.inf], dtype=torch.float64)
    assert pace_weight(at, threshold).tolist() == [1.0, 0.0, 0.0, 0.0]


@given(strategies.losses(), strategies.thresholds)
def test_value_at_the_optimum(losses, threshold):
    losses = losses.clamp_max(threshold * 0.999)
    weight = pace_weight(losses, threshold)
    value = weight * losses + pace_regulariser(weight, threshold)
    expected = 2 * threshold / math.pi * torch.sin(math.pi * losses / (2 * threshold))
    np.testing.assert_allclose(value, expected, atol=1e-9)


@given(strategies.losses(high=1.0), strategies.thresholds)
def test_regulariser_equals_the_oracle(weights, threshold):
    expected = [oracles.pace_regulariser(w, threshold) for w in weights.tolist()]
    np.testing.assert_allclose(pace_regulariser(weights, threshold), expected, atol=1e-12)


@given(strategies.losses())
def test_division_and_divided_weight_equal_the_oracle(losses):
    expected = [0 if x < 0.271 else 1 if x < 0.977 else 2 for x in losses.tolist()]
    assert divide(losses, 0.271, 0.977).tolist() == expected
    weights = [oracles.divided_weight(x, 0.271, 0.977, 0.8) for x in losses.tolist()]
    np.testing.assert_allclose(divided_weight(losses, 0.271, 0.977, 0.8), weights, atol=1e-12)


def test_borders_belong_to_the_noisier_side():
    assert divide(torch.tensor([0.25, 0.5, 0.75, 1.0, 1.5]), 0.5, 1.0).tolist() == [
        CLEAN,
        AMBIGUOUS,
        AMBIGUOUS,
        NOISY,
        NOISY,
    ]


@pytest.mark.parametrize(("nats", "share"), [(5, 0.271), (18, 0.977)])
def test_the_published_thresholds_as_shares_of_chance(nats, share):
    assert nats / CHANCE == pytest.approx(share, abs=5e-4)


def test_the_published_jump_is_pinned():
    # In nats at batch 100: weight .003 at 4.99, then .906 x .8 = .725 at 5.
    losses = torch.tensor([4.99, 5.0, 17.99, 18.0], dtype=torch.float64) / CHANCE
    weight = divided_weight(losses, 5 / CHANCE, 18 / CHANCE, 0.8)
    np.testing.assert_allclose(weight, [0.00314, 0.72504, 0.00070, 0.0], atol=1e-5)
    assert divided_weight(losses, 5 / CHANCE, 18 / CHANCE, 1.0)[1].item() == pytest.approx(0.906, abs=5e-4)


@given(strategies.losses())
def test_divided_weight_falls_within_each_region(losses):
    losses = losses.sort().values
    weight, region = divided_weight(losses, 0.271, 0.977), divide(losses, 0.271, 0.977)
    for one in (CLEAN, AMBIGUOUS, NOISY):
        assert (weight[region == one].diff() <= 0).all()
    assert (weight[region == NOISY] == 0).all()
