from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.errors import ShapeError
from nc_audit.methods.uncertainty import chance_loss, energy, match_entropy, swapped_entropy


@given(strategies.logits())
def test_energy_and_entropy_equal_the_oracle(logits):
    np.testing.assert_allclose(energy(logits), oracles.energy(logits.numpy()), atol=1e-10)
    np.testing.assert_allclose(match_entropy(logits), oracles.match_entropy(logits.numpy()), atol=1e-10)


@given(strategies.logits(min_candidates=3), strategies.seeds)
def test_candidates_left_out_do_not_count(logits, seed):
    rng = np.random.default_rng(seed)
    out = torch.from_numpy(rng.random(logits.shape) < 0.4)
    out[:, :2] = False
    logits = logits.masked_fill(out, float("-inf"))
    np.testing.assert_allclose(energy(logits), oracles.energy(logits.numpy()), atol=1e-10)
    np.testing.assert_allclose(match_entropy(logits), oracles.match_entropy(logits.numpy()), atol=1e-10)


def test_float32_stays_near_the_float64_oracle():
    logits = 20 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(energy(logits), oracles.energy(logits.double().numpy()), atol=1e-4)
    np.testing.assert_allclose(
        match_entropy(logits), oracles.match_entropy(logits.double().numpy()), atol=1e-4
    )


@given(st.integers(1, 4), st.integers(2, 9), st.floats(-20, 20))
def test_constant_logits_have_entropy_one(rows, columns, value):
    constant = torch.full((rows, columns), value, dtype=torch.float64)
    np.testing.assert_allclose(match_entropy(constant), 1.0, atol=1e-12)
    np.testing.assert_allclose(energy(constant), -value - math.log(columns), atol=1e-9)


@given(strategies.logits())
def test_entropy_is_a_share(logits):
    entropy = match_entropy(logits)
    assert ((entropy >= 0) & (entropy <= 1)).all()


@given(strategies.logits(), st.floats(-20, 20))
def test_a_constant_added_shifts_energy_only(logits, constant):
    np.testing.assert_allclose(energy(logits + constant), energy(logits) - constant, atol=1e-9)
    np.testing.assert_allclose(match_entropy(logits + constant), match_entropy(logits), atol=1e-9)


@given(strategies.logits(), strategies.seeds)
def test_the_order_of_pairs_and_candidates_does_not_matter(logits, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(logits.shape[0], generator=generator)
    columns = torch.randperm(logits.shape[1], generator=generator)
    for score in (energy, match_entropy):
        np.testing.assert_allclose(score(logits[rows][:, columns]), score(logits)[rows], atol=1e-10)


@given(strategies.logits())
def test_repeating_every_candidate_lowers_energy_by_ln_2(logits):
    np.testing.assert_allclose(
        energy(torch.cat([logits, logits], 1)), energy(logits) - math.log(2), atol=1e-10
    )


@given(strategies.logits(square=True))
def test_cross_entropy_is_minus_the_own_logit_minus_energy(logits):
    own = logits.diagonal()
    np.testing.assert_allclose(-logits.log_softmax(1).diagonal(), -own - energy(logits), atol=1e-10)


def test_one_candidate_that_takes_all_has_entropy_zero():
    assert match_entropy(torch.tensor([[500.0, 0.0, 0.0]])).tolist() == [0.0]


def test_the_swap_hands_each_direction_the_other_entropy():
    image, caption = torch.tensor([0.1, 0.2]), torch.tensor([0.8, 0.9])
    for_images, for_captions = swapped_entropy(image, caption)
    assert torch.equal(for_images, caption)
    assert torch.equal(for_captions, image)


@pytest.mark.parametrize("num", [2, 100, 1000])
def test_chance_is_the_log_of_the_candidates(num):
    assert chance_loss(num) == math.log(num)


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (energy, (3,), "logits must have shape [B, M], got [3]"),
        (energy, (1, 2, 3), "logits must have shape [B, M], got [1, 2, 3]"),
        (match_entropy, (3,), "logits must have shape [B, M >= 2], got [3]"),
        (match_entropy, (3, 1), "logits must have shape [B, M >= 2], got [3, 1]"),
    ],
)
def test_shapes_are_named_in_the_error(function, shape, expected):
    with pytest.raises(ShapeError) as caught:
        function(torch.zeros(shape))
    assert str(caught.value) == expected
