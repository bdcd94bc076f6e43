from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.methods.contrastive import negatives_mask, robust_triplet_loss
from nc_audit.methods.division import divided_objective, total_loss

PUBLISHED = {
    "scale": 20.0,
    "clean_at": 5 / (4 * math.log(100)),
    "noisy_at": 18 / (4 * math.log(100)),
    "ambiguous_factor": 0.8,
    "triplet_factor": 0.9,
    "margin": 0.6,
}


def cosines(num: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(num, num, generator=generator, dtype=torch.float64) * 2 - 1
    return (drawn * 0.3 + shift * torch.eye(num, dtype=torch.float64)).clamp(-1, 1)


def everything(num: int) -> torch.Tensor:
    return torch.ones(num, num, dtype=torch.bool)


def cross_entropy(logits: np.ndarray, i: int) -> float:
    return -logits[i, i] + math.log(sum(math.exp(x) for x in logits[i]))


def published(cosine: np.ndarray, local: np.ndarray | None, g1: float, g2: float) -> tuple[float, list[int]]:
    """The paper's loss in nats with its own thresholds, one pair at a time (rows and columns are symmetric)."""
    num, total, tags = len(cosine), 0.0, []
    for i in range(num):
        loss = cross_entropy(20 * cosine, i) + cross_entropy(20 * cosine.T, i)
        if local is not None:
            loss += cross_entropy(20 * local, i) + cross_entropy(20 * local.T, i)
        if loss < g2:
            g, factor = (g1, 1.0) if loss < g1 else (g2, 0.8)
            w = math.cos(math.pi * loss / (2 * g))
            total += factor * (w * loss - (2 * g / math.pi) * (w * math.acos(w) - math.sqrt(1 - w * w)))
            tags.append(0 if loss < g1 else 1)
            continue
        tags.append(2)
        for matrix in (cosine, cosine.T):
            d = max(matrix[i, j] for j in range(num) if j != i) - matrix[i, i]
            total += 0.9 * max(0.0, 0.6 * (1 + max(0.0, d)) + d)
    return total / num, tags


@given(st.integers(3, 12), st.integers(0, 1000), st.floats(0, 0.6), st.booleans())
def test_the_objective_is_the_papers_with_thresholds_rescaled_by_chance(num, seed, shift, with_local):
    cosine = cosines(num, seed, shift)
    local = cosines(num, seed + 1, shift).abs() if with_local else None
    found = divided_objective(cosine, local, everything(num), **PUBLISHED)
    terms = 4 if with_local else 2
    rescaled = terms * math.log(num) / (4 * math.log(100))
    expected, tags = published(
        cosine.numpy(), None if local is None else local.numpy(), 5 * rescaled, 18 * rescaled
    )
    assert found.division_B.tolist() == tags
    assert found.objective.item() == pytest.approx(expected, abs=1e-9)


def test_constant_similarities_are_chance():
    flat = torch.full((100, 100), 0.3, dtype=torch.float64)
    both = total_loss(flat, flat, everything(100), 20.0)
    torch.testing.assert_close(both, torch.full_like(both, 4 * math.log(100)))
    one = total_loss(flat, None, everything(100), 20.0)
    torch.testing.assert_close(one, torch.full_like(one, 2 * math.log(100)))
    found = divided_objective(flat, flat, everything(100), **PUBLISHED)
    torch.testing.assert_close(found.relative_loss_B, torch.ones(100, dtype=torch.float64))
    assert found.division_B.tolist() == [2] * 100, "at chance every pair is noisy: heads need a warm-up"


def test_the_published_thresholds_are_27_and_98_per_cent_of_chance():
    assert PUBLISHED["clean_at"] == pytest.approx(0.271, abs=5e-4)
    assert PUBLISHED["noisy_at"] == pytest.approx(0.977, abs=5e-4)


def test_the_regulariser_moves_no_gradient_and_the_weight_is_detached():
    # The gradient is that of the weighted losses and triplets with constant weights.
    cosine = cosines(10, 3, 0.25).requires_grad_()
    found = divided_objective(cosine, None, everything(10), **PUBLISHED)
    (gradient,) = torch.autograd.grad(found.objective, cosine)
    again = cosine.detach().requires_grad_()
    losses = total_loss(again, None, everything(10), 20.0)
    weighted = (found.weight_B * losses).sum() / 10
    triplets = robust_triplet_loss(again, everything(10), 0.6)[found.division_B == 2].sum() * 0.9 / 10
    (expected,) = torch.autograd.grad(weighted + triplets, again)
    torch.testing.assert_close(gradient, expected)
    assert 0 < (found.division_B == 2).sum() < 10, "the case has all kinds"


def test_ablations_change_what_they_say():
    cosine = cosines(30, 1, 0.25)
    whole = divided_objective(cosine, None, everything(30), **PUBLISHED)
    flat = divided_objective(cosine, None, everything(30), **PUBLISHED, is_paced=False)
    assert set(flat.weight_B.tolist()) <= {0.0, 0.8, 1.0}
    assert torch.equal(flat.division_B, whole.division_B)
    two = divided_objective(cosine, None, everything(30), **PUBLISHED, has_ambiguous=False)
    assert set(two.division_B.tolist()) <= {0, 2}
    assert torch.equal(two.division_B == 0, whole.division_B == 0)
    without = divided_objective(cosine, None, everything(30), **PUBLISHED, has_triplet=False)
    assert without.objective < whole.objective


def test_pairs_of_one_image_are_no_negatives():
    image, caption = torch.tensor([0, 0, 1, 2]), torch.arange(4)
    cosine = cosines(4, 0)
    counts = negatives_mask(image, caption)
    changed = cosine.clone()
    changed[0, 1] = changed[1, 0] = 0.99
    one = divided_objective(cosine, None, counts, **PUBLISHED)
    other = divided_objective(changed, None, counts, **PUBLISHED)
    torch.testing.assert_close(one.objective, other.objective)


def test_a_batch_of_pairs_that_all_match_is_finite():
    counts = negatives_mask(torch.zeros(3, dtype=torch.long), torch.arange(3))
    cosine = cosines(3, 0).requires_grad_()
    found = divided_objective(cosine, None, counts, **PUBLISHED)
    found.objective.backward()
    assert torch.isfinite(found.objective)
    assert torch.isfinite(cosine.grad).all()
