from __future__ import annotations

import numpy as np
import oracles
import oracles_divided
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.errors import ShapeError
from nc_audit.methods.contrastive import negatives_mask
from nc_audit.methods.soft_margin import (
    hinge_loss,
    margin_prediction,
    refine,
    soft_margin,
    soft_margin_loss,
)

shares = st.floats(0, 1)


def cosines_and_mask(seed: int, num: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of unit vectors, and a mask in which some pairs share an image or a caption."""
    image, caption = (strategies.unit_vectors(num, 4, seed + k) for k in range(2))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(5, (2, num), generator=generator)
    return image @ caption.T, negatives_mask(drawn[0], drawn[1])


@given(strategies.seeds, st.floats(0.01, 1))
def test_the_hinge_loss_equals_the_oracle(seed, margin):
    similarity, counts = cosines_and_mask(seed)
    expected = oracles_divided.hinge_loss(similarity.numpy(), counts.numpy(), margin)
    np.testing.assert_allclose(hinge_loss(similarity, counts, margin), expected, atol=1e-12)


@given(strategies.seeds, st.lists(st.floats(0, 1.5), min_size=7, max_size=7))
def test_the_soft_margin_loss_equals_the_oracle(seed, margin):
    similarity, counts = cosines_and_mask(seed)
    margin_B = torch.tensor(margin, dtype=torch.float64)
    expected = oracles_divided.soft_margin_loss(similarity.numpy(), counts.numpy(), margin_B.numpy())
    np.testing.assert_allclose(soft_margin_loss(similarity, counts, margin_B), expected, atol=1e-12)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=40), st.floats(0.05, 1), st.floats(0.05, 1))
def test_the_margin_prediction_equals_the_oracle(loss, margin, top_share):
    expected = oracles_divided.margin_prediction(np.array(loss), margin, top_share)
    found = margin_prediction(torch.tensor(loss, dtype=torch.float64), margin, top_share)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert ((found >= 0) & (found <= 1)).all()


def test_float32_stays_near_the_oracle():
    similarity, counts = cosines_and_mask(3, 64)
    expected = oracles_divided.hinge_loss(similarity.numpy(), counts.numpy(), 0.2)
    np.testing.assert_allclose(hinge_loss(similarity.float(), counts, 0.2), expected, atol=1e-5)
    expected = oracles_divided.soft_margin_loss(similarity.numpy(), counts.numpy(), np.full(64, 0.2))
    np.testing.assert_allclose(
        soft_margin_loss(similarity.float(), counts, torch.full((64,), 0.2)), expected, atol=1e-5
    )


@pytest.mark.parametrize("num", [2, 5, 16])
def test_equal_cosines_leave_the_whole_margin(num):
    every = torch.ones(num, num, dtype=torch.bool)
    same = torch.full((num, num), 0.3, dtype=torch.float64)
    np.testing.assert_allclose(hinge_loss(same, every, 0.2), 2 * 0.2 * (num - 1) / num, atol=1e-12)
    margin = torch.linspace(0, 1, num, dtype=torch.float64)
    np.testing.assert_allclose(soft_margin_loss(same, every, margin), 2 * margin, atol=1e-12)


def test_matches_ahead_by_the_margin_lose_nothing():
    every = torch.ones(4, 4, dtype=torch.bool)
    assert not hinge_loss(torch.eye(4), every, 0.5).any()
    assert not soft_margin_loss(torch.eye(4), every, torch.full((4,), 1.0)).any()


def test_a_pair_without_negatives_loses_nothing_and_learns_nothing():
    similarity = torch.tensor([[0.1, 0.9], [0.9, 0.1]], requires_grad=True)
    alone = torch.eye(2, dtype=torch.bool)
    loss = hinge_loss(similarity, alone, 0.2) + soft_margin_loss(similarity, alone, torch.ones(2))
    loss.sum().backward()
    assert not loss.any()
    assert not similarity.grad.any()


@given(strategies.seeds)
def test_only_the_hardest_negative_teaches_the_soft_margin(seed):
    similarity, counts = cosines_and_mask(seed)
    similarity = similarity.requires_grad_()
    soft_margin_loss(similarity, counts, torch.full((7,), 3.0, dtype=torch.float64)).sum().backward()
    off = similarity.grad - torch.diag(similarity.grad.diagonal())
    taught = num_with_negatives(counts)
    assert off.sum() == pytest.approx(2 * taught)
    assert similarity.grad.diagonal().sum() == pytest.approx(-2 * taught)


def num_with_negatives(counts: torch.Tensor) -> int:
    """How many pairs have a negative at all."""
    return sum(any(counts[i, j] for j in range(len(counts)) if j != i) for i in range(len(counts)))


def test_the_mask_is_that_of_the_oracle():
    drawn = torch.tensor([[0, 0, 1, 2], [3, 4, 3, 5]])
    assert negatives_mask(*drawn).tolist() == oracles.negatives_mask(*drawn.tolist()).tolist()


@given(shares, shares, st.floats(0.05, 1), st.floats(1.5, 100))
def test_the_margin_grows_with_the_correspondence(one, other, margin, power):
    low, high = sorted((one, other))
    ends = soft_margin(torch.tensor([0.0, low, high, 1.0], dtype=torch.float64), margin, power)
    np.testing.assert_allclose(ends[[0, 3]], [0.0, margin], atol=1e-12)
    assert (ends.diff() >= -1e-12).all()
    assert ends[1] <= margin * low + 1e-12  # a doubtful pair has less than its share


@given(shares, shares)
def test_refining_lies_between_the_posterior_and_one(clean, predicted):
    refined = refine(torch.tensor([clean]), torch.tensor([predicted])).item()
    assert clean - 1e-6 <= refined <= 1 + 1e-6
    assert refined == pytest.approx(1 - (1 - clean) * (1 - predicted), abs=1e-6)


def test_predictions_are_zero_where_nobody_keeps_a_margin():
    assert margin_prediction(torch.tensor([0.4, 0.9]), 0.2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_shapes_are_named_in_the_error(shape):
    with pytest.raises(ShapeError) as caught:
        hinge_loss(torch.zeros(shape), torch.ones(shape, dtype=torch.bool), 0.2)
    assert str(caught.value) == f"similarity must have shape [B, B], got {list(shape)}"
