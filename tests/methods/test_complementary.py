from __future__ import annotations

import math

import numpy as np
import oracles_divided
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.errors import ShapeError
from nc_audit.methods.complementary import (
    biased_complementary_loss,
    complement_transition,
    complementary_loss,
)
from nc_audit.methods.contrastive import negatives_mask

LOGITS = strategies.logits(bound=8.0, square=True)


def mask_of(num: int, seed: int) -> torch.Tensor:
    drawn = torch.randint(4, (2, num), generator=torch.Generator().manual_seed(seed))
    return negatives_mask(drawn[0], drawn[1])


def everything(num: int) -> torch.Tensor:
    return torch.ones(num, num, dtype=torch.bool)


@given(LOGITS, strategies.seeds)
def test_the_complementary_loss_equals_the_oracle(logits, seed):
    counts = mask_of(len(logits), seed)
    expected = oracles_divided.complementary_loss(logits.numpy(), counts.numpy())
    np.testing.assert_allclose(complementary_loss(logits, counts), expected, rtol=1e-7, atol=1e-10)


@given(LOGITS, strategies.seeds, st.floats(0.5, 5))
def test_the_biased_loss_equals_the_oracle(logits, seed, temperature):
    counts = mask_of(len(logits), seed)
    emphasis = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    transition = complement_transition(logits, counts, temperature)
    slow = oracles_divided.complement_transition(logits.numpy(), counts.numpy(), temperature)
    np.testing.assert_allclose(transition, slow, atol=1e-12)
    expected = oracles_divided.biased_complementary_loss(
        logits.numpy(), counts.numpy(), slow, emphasis.numpy()
    )
    found = biased_complementary_loss(logits, counts, transition, emphasis)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(LOGITS)
def test_the_uniform_transition_gives_the_log_loss_and_a_constant(logits):
    num = len(logits)
    uniform = complement_transition(torch.zeros_like(logits), everything(num), 1.0)
    found = biased_complementary_loss(logits, everything(num), uniform, torch.ones_like(logits))
    expected = complementary_loss(logits, everything(num)) + (num - 1) * math.log(num - 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@given(LOGITS, strategies.seeds, st.floats(0.05, 5))
def test_what_is_drawn_as_no_match_is_a_distribution_over_negatives(logits, seed, temperature):
    counts = mask_of(len(logits), seed)
    transition = complement_transition(logits, counts, temperature)
    off = counts & ~torch.eye(len(logits), dtype=torch.bool)
    assert not transition[~off].any()
    np.testing.assert_allclose(transition.sum(1), off.any(1).double(), atol=1e-12)


@given(LOGITS)
def test_predicted_complements_sum_to_one(logits):
    transition = complement_transition(logits, everything(len(logits)), 0.7)
    np.testing.assert_allclose((logits.softmax(1) @ transition).sum(1), 1.0, atol=1e-12)


def test_the_temperature_leads_from_the_hardest_negative_to_all_alike():
    similarity = torch.tensor([[9.0, 0.3, 0.1], [0.3, 9.0, 0.1], [0.0, 0.1, 9.0]])
    hardest = complement_transition(similarity, everything(3), 1e-3)
    assert hardest.argmax(1).tolist() == [1, 0, 1]
    np.testing.assert_allclose(hardest.amax(1), 1.0, atol=1e-6)
    alike = complement_transition(similarity, everything(3), 1e6)
    np.testing.assert_allclose(alike, (1 - torch.eye(3)) / 2, atol=1e-5)


@given(LOGITS, strategies.seeds, st.floats(-5, 5))
def test_candidates_left_out_change_nothing(logits, seed, value):
    counts = mask_of(len(logits), seed)
    moved = logits.masked_fill(~counts, value)
    for loss in (
        complementary_loss,
        lambda x, c: biased_complementary_loss(x, c, complement_transition(x, c, 1.0), torch.ones_like(x)),
    ):
        np.testing.assert_allclose(loss(moved, counts), loss(logits, counts), atol=1e-9)


def test_a_better_match_and_worse_negatives_lose_less():
    logits = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    sharper = torch.tensor([[3.0, 0.5], [0.5, 3.0]])
    worse = torch.tensor([[0.5, 1.0], [1.0, 0.5]])
    found = [complementary_loss(x, everything(2)).sum() for x in (sharper, logits, worse)]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("confident_in", ["match", "negative"])
def test_gradients_stay_finite_where_one_candidate_takes_all(confident_in):
    logits = torch.zeros(3, 3)
    logits[0, 0 if confident_in == "match" else 1] = 200.0
    logits.requires_grad_()
    transition = complement_transition(logits.detach(), everything(3), 1.0)
    loss = complementary_loss(logits, everything(3)) + biased_complementary_loss(
        logits, everything(3), transition, 2 * transition
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_a_lone_pair_has_no_complement():
    alone = torch.eye(2, dtype=torch.bool)
    assert complement_transition(torch.zeros(2, 2), alone, 0.1).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert complementary_loss(torch.zeros(2, 2), alone).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_shapes_are_named_in_the_error(shape):
    with pytest.raises(ShapeError) as caught:
        complementary_loss(torch.zeros(shape), torch.ones(shape, dtype=torch.bool))
    assert str(caught.value) == f"logits must have shape [B, B], got {list(shape)}"
