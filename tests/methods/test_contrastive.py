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
from nc_audit.methods.contrastive import (
    candidate_logsumexp,
    hardest_negative_gap,
    in_batch_loss,
    left_out,
    negatives_mask,
    robust_triplet_loss,
)


def everything(num: int) -> torch.Tensor:
    return torch.ones(num, num, dtype=torch.bool)


def masks(num: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return negatives_mask(
        torch.from_numpy(rng.integers(0, num, num)), torch.from_numpy(rng.integers(0, num, num))
    )


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_mask_equals_the_oracle_and_is_symmetric(pairs):
    image, caption = (list(side) for side in zip(*pairs, strict=True))
    mask = negatives_mask(torch.tensor(image), torch.tensor(caption))
    assert np.array_equal(mask.numpy(), oracles.negatives_mask(image, caption))
    assert torch.equal(mask, mask.T)
    assert mask.diagonal().all()


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), strategies.seeds)
def test_what_is_left_out_is_where_the_mask_is_false(num_batches, num, num_distinct, seed):
    generator = torch.Generator().manual_seed(seed)
    image, caption = torch.randint(num_distinct, (2, num_batches, num), generator=generator)
    for some in ((image, caption), (image[0], caption[0])):
        mask = torch.ones(*some[0].shape, num, dtype=torch.bool)
        mask[left_out(*some)] = False
        assert torch.equal(mask, negatives_mask(*some))


@given(strategies.logits(square=True), strategies.seeds)
def test_loss_is_the_same_by_mask_and_by_places(logits, seed):
    sides = torch.randint(len(logits), (2, len(logits)), generator=torch.Generator().manual_seed(seed))
    for one in (logits, 1000 * logits):  # of which the exponentials overflow
        by_mask = in_batch_loss(one, negatives_mask(*sides))
        assert torch.equal(in_batch_loss(one, left_out(*sides)), by_mask)


@given(strategies.logits(square=True), strategies.seeds)
def test_loss_equals_the_oracle(logits, seed):
    counts = masks(len(logits), seed)
    expected = oracles.in_batch_loss(logits.numpy(), counts.numpy())
    np.testing.assert_allclose(in_batch_loss(logits, counts), expected, atol=1e-10)


def test_float32_loss_stays_near_the_float64_oracle():
    logits = 20 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    counts = masks(64, 0)
    expected = oracles.in_batch_loss(logits.double().numpy(), counts.numpy())
    np.testing.assert_allclose(in_batch_loss(logits, counts), expected, atol=1e-4)


@given(st.integers(2, 9), st.floats(-20, 20))
def test_constant_logits_cost_the_log_of_the_candidates(num, value):
    loss = in_batch_loss(torch.full((num, num), value, dtype=torch.float64), everything(num))
    np.testing.assert_allclose(loss, math.log(num), atol=1e-9)


@given(strategies.logits(square=True), st.floats(-20, 20))
def test_a_constant_added_to_all_logits_changes_no_loss(logits, constant):
    counts = everything(len(logits))
    np.testing.assert_allclose(
        in_batch_loss(logits + constant, counts), in_batch_loss(logits, counts), atol=1e-9
    )


@given(strategies.logits(square=True), strategies.seeds)
def test_permuting_pairs_permutes_losses(logits, seed):
    counts = masks(len(logits), seed)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    permuted = in_batch_loss(logits[order][:, order], counts[order][:, order])
    np.testing.assert_allclose(permuted, in_batch_loss(logits, counts)[order], atol=1e-10)


@given(strategies.logits(square=True), strategies.seeds)
def test_masked_logits_change_nothing(logits, seed):
    counts = masks(len(logits), seed)
    changed = torch.where(counts, logits, torch.full_like(logits, 1e3))
    np.testing.assert_allclose(in_batch_loss(changed, counts), in_batch_loss(logits, counts), atol=1e-12)


@given(strategies.logits(square=True), strategies.seeds)
def test_gradient_is_that_of_the_formula(logits, seed):
    counts = masks(len(logits), seed)
    weight = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (weight * in_batch_loss(found, counts)).sum().backward()
    masked = expected.masked_fill(~counts, float("-inf"))
    normaliser = (masked.logsumexp(1) + masked.logsumexp(0)) / 2
    (weight * (normaliser - expected.diagonal())).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("largest", [5.0, 60.0, 69.0, 71.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_finite_whatever_the_scale(largest, dtype):
    cosines = 2 * torch.rand(33, 33, generator=torch.Generator().manual_seed(1)) - 1
    cosines[:, 0] = -1  # a caption that fits nothing
    cosines[3] = -1
    logits = (largest * cosines).to(dtype).requires_grad_()
    counts = masks(33, 1)
    loss = in_batch_loss(logits, counts)
    loss.sum().backward()
    expected = oracles.in_batch_loss(logits.detach().double().numpy(), counts.numpy())
    np.testing.assert_allclose(loss.detach().float(), expected, rtol=0.02, atol=0.02)
    assert torch.isfinite(logits.grad).all()
    assert (loss >= 0).all()


def test_batches_side_by_side_cost_what_each_costs():
    generator = torch.Generator().manual_seed(0)
    logits = 9 * torch.randn(3, 7, 7, generator=generator, dtype=torch.float64)
    image, caption = (torch.randint(5, (3, 7), generator=generator) for _ in range(2))
    counts = negatives_mask(image, caption)
    each = [in_batch_loss(one, negatives_mask(*of)) for one, *of in zip(logits, image, caption, strict=True)]
    torch.testing.assert_close(in_batch_loss(logits, counts), torch.stack(each))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_loss_wants_a_square(shape):
    with pytest.raises(ShapeError) as caught:
        in_batch_loss(torch.zeros(shape), torch.ones(shape, dtype=torch.bool))
    assert str(caught.value) == f"logits must have shape [B, B], got {list(shape)}"
    assert (caught.value.expected, caught.value.actual) == ("B, B", list(shape))
    assert isinstance(caught.value, ValueError)


@given(strategies.logits(), strategies.seeds)
def test_candidate_logsumexp_equals_the_oracle(logits, seed):
    rng = np.random.default_rng(seed)
    counts = torch.from_numpy(rng.random(logits.shape) < 0.5)
    own = torch.from_numpy(rng.normal(size=len(logits)))
    expected = oracles.candidate_logsumexp(own.numpy(), logits.numpy(), counts.numpy())
    np.testing.assert_allclose(candidate_logsumexp(own, logits, counts), expected, atol=1e-10)


def test_without_candidates_only_the_own_match_is_left():
    own = torch.tensor([1.5, -2.0])
    assert torch.equal(candidate_logsumexp(own, torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)), own)


# --- the robust triplet loss


@given(strategies.logits(square=True, bound=1.0), strategies.seeds)
def test_gaps_and_triplet_loss_equal_the_oracle(similarity, seed):
    counts = masks(len(similarity), seed)
    for ours, expected in zip(
        hardest_negative_gap(similarity, counts),
        oracles.hardest_negative_gap(similarity.numpy(), counts.numpy()),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-12)
    expected = oracles.robust_triplet_loss(similarity.numpy(), counts.numpy(), 0.6)
    np.testing.assert_allclose(robust_triplet_loss(similarity, counts, 0.6), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("gap", "slope"), [(-0.9, 0.0), (-0.61, 0.0), (-0.59, 1.0), (-0.1, 1.0), (0.05, 1.6), (0.8, 1.6)]
)
def test_triplet_slope_in_the_gap(gap, slope):
    # Image 0 sees caption 1 at its own match plus the gap; everything else lies far below.
    similarity = torch.tensor([[0.0, gap], [-9.0, 0.0]], dtype=torch.float64, requires_grad=True)
    robust_triplet_loss(similarity, everything(2), 0.6)[0].backward()
    assert similarity.grad is not None
    assert similarity.grad[0, 1].item() == pytest.approx(slope)
    assert similarity.grad[0, 0].item() == pytest.approx(-slope)


def test_triplet_loss_is_zero_up_to_minus_the_margin():
    similarity = torch.tensor([[0.6, 0.0], [0.0, 0.6]], dtype=torch.float64)
    assert robust_triplet_loss(similarity, everything(2), 0.6).tolist() == [0.0, 0.0]


def test_the_diagonal_is_no_negative_whatever_the_mask_says():
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    image, caption = hardest_negative_gap(similarity, everything(2))
    np.testing.assert_allclose(image, [0.1 - 0.9, 0.2 - 0.8])
    np.testing.assert_allclose(caption, [0.2 - 0.9, 0.1 - 0.8])


def test_a_pair_without_negatives_costs_nothing():
    own = torch.eye(2, dtype=torch.bool)
    image, caption = hardest_negative_gap(torch.zeros(2, 2), own)
    assert image.tolist() == caption.tolist() == [-math.inf, -math.inf]
    assert robust_triplet_loss(torch.zeros(2, 2), own).tolist() == [0.0, 0.0]
