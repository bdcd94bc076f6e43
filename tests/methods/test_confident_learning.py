from __future__ import annotations

import numpy as np
import oracles_baselines as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

from nc_audit.errors import ShapeError
from nc_audit.methods.confident import (
    calibrated_joint,
    class_thresholds,
    cluster,
    confident_joint,
    fit_softmax,
    prune_by_noise_rate,
    self_confidence,
)


@st.composite
def judged(draw) -> tuple[Tensor, Tensor]:
    """Class probabilities and given classes, with ties between pairs; some classes may be given to nobody."""
    num, classes, seed = draw(st.integers(2, 40)), draw(st.integers(2, 5)), draw(seeds)
    rng = np.random.default_rng(seed)
    # Eighths, so that sums and comparisons are exact and many pairs tie.
    raw = rng.multinomial(8, np.full(classes, 1 / classes), size=num) / 8
    return torch.from_numpy(raw), torch.from_numpy(rng.integers(0, classes, num))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(judged())
def test_thresholds_equal_the_oracle(case):
    probability, given_class = case
    expected = oracle.thresholds(probability.numpy(), given_class.tolist())
    np.testing.assert_allclose(class_thresholds(*case).numpy(), expected, atol=1e-12)
    own = self_confidence(probability, given_class)
    assert own.tolist() == [probability[i, k].item() for i, k in enumerate(given_class.tolist())]


@given(judged())
def test_the_confident_joint_equals_the_oracle(case):
    expected = oracle.confident_joint(case[0].numpy(), case[1].tolist())
    np.testing.assert_array_equal(confident_joint(*case).numpy(), expected)


@given(judged())
def test_the_calibrated_joint_keeps_the_class_counts(case):
    probability, given_class = case
    joint = confident_joint(*case)
    calibrated = calibrated_joint(joint, given_class)
    counts = torch.bincount(given_class, minlength=probability.shape[1])
    assert torch.equal(calibrated.sum(1), counts)
    assert (calibrated >= 0).all()
    exact = joint.double() / joint.sum(1, keepdim=True) * counts[:, None]
    assert ((calibrated - exact).abs() < 1).all(), "rounding moves no cell by a whole pair"
    assert (calibrated[joint == 0] == 0).all()


@given(judged())
def test_pruning_equals_the_oracle(case):
    probability, given_class = case
    joint = calibrated_joint(confident_joint(*case), given_class)
    found = prune_by_noise_rate(probability, given_class, joint)
    expected = oracle.prune_by_noise_rate(probability.numpy(), given_class.tolist(), joint.numpy())
    assert found.tolist() == expected
    assert not (found & (probability.argmax(1) == given_class)).any()


@given(judged(), seeds)
def test_the_order_of_pairs_has_no_say(case, seed):
    probability, given_class = case
    order = torch.randperm(len(given_class), generator=generator(seed))
    joint = calibrated_joint(confident_joint(*case), given_class)
    shuffled = probability[order], given_class[order]
    again = calibrated_joint(confident_joint(*shuffled), shuffled[1])
    assert torch.equal(again, joint)
    assert torch.equal(
        prune_by_noise_rate(*shuffled, again), prune_by_noise_rate(probability, given_class, joint)[order]
    )


def test_planted_wrong_classes_are_found_and_counted():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 4000)
    given_class = np.where(rng.random(4000) < 0.25, (truth + 1) % 4, truth)
    # A classifier that is sharp and honest about the truth, and never saw the given classes.
    probability = rng.dirichlet([1, 1, 1], 4000) * 0.3
    full = np.zeros((4000, 4))
    for i, k in enumerate(truth):
        full[i] = np.insert(probability[i], k, 0.7)
    case = torch.from_numpy(full), torch.from_numpy(given_class)
    joint = calibrated_joint(confident_joint(*case), case[1])
    off = joint.sum() - joint.diagonal().sum()
    assert off.item() / 4000 == pytest.approx((given_class != truth).mean(), abs=0.01)
    flagged = prune_by_noise_rate(*case, joint).numpy()
    assert flagged[given_class != truth].mean() > 0.98
    assert flagged[given_class == truth].mean() < 0.01


# --- classifier


def test_the_classifier_is_at_the_minimum_of_its_objective():
    rng = np.random.default_rng(0)
    vectors, counts = rng.standard_normal((30, 4)), rng.integers(0, 3, (30, 3)).astype(float)
    weight, intercept = (
        t.numpy() for t in fit_softmax(torch.from_numpy(vectors), torch.from_numpy(counts), 2.0)
    )
    least = oracle.softmax_objective(weight, intercept, vectors, counts, 2.0)
    for _ in range(50):
        moved = weight + 0.02 * rng.standard_normal(weight.shape)
        shifted = intercept + 0.02 * rng.standard_normal(3)
        assert oracle.softmax_objective(moved, shifted, vectors, counts, 2.0) > least - 1e-6
    np.testing.assert_allclose(weight.sum(1), 0, atol=1e-4)  # no class is preferred before anything is seen


def test_the_classifier_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    vectors, classes = rng.standard_normal((200, 5)), rng.integers(0, 3, 200)
    vectors[:, 0] += classes
    reference = LogisticRegression(C=1 / 3, tol=1e-8, max_iter=1000).fit(vectors, classes)
    weight, intercept = fit_softmax(torch.from_numpy(vectors), torch.from_numpy(np.eye(3)[classes]), 3.0)
    found = (torch.from_numpy(vectors) @ weight + intercept).softmax(1)
    np.testing.assert_allclose(found.numpy(), reference.predict_proba(vectors), atol=1e-3)


def test_a_heavy_penalty_leaves_the_class_shares():
    vectors = torch.randn(40, 3, generator=generator())
    counts = torch.zeros(40, 2)
    counts[:30, 0], counts[30:, 1] = 1, 1
    weight, intercept = fit_softmax(vectors, counts, 1e6)
    found = (vectors @ weight + intercept).softmax(1)
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25]]).expand(40, 2), atol=1e-3, rtol=0)


def test_the_classifier_leaves_gradients_and_random_numbers_alone():
    before = torch.get_rng_state()
    with torch.no_grad():
        weight, intercept = fit_softmax(torch.eye(3), torch.eye(3))
    assert not weight.requires_grad
    assert not intercept.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


# --- clusters


def test_clusters_that_are_there_are_found():
    centre = 20 * torch.randn(6, 8, generator=generator(1))
    truth = torch.arange(6).repeat(30)
    found = cluster(centre[truth] + torch.randn(180, 8, generator=generator(2)), 6, generator(3))
    assert len(set(zip(truth.tolist(), found.tolist(), strict=True))) == 6
    assert sorted(found.unique().tolist()) == list(range(6))


@given(seeds, st.integers(1, 6))
def test_no_vector_would_rather_be_elsewhere(seed, num):
    vectors = torch.randn(40, 3, generator=generator(seed), dtype=torch.float64)
    found = cluster(vectors, num, generator(seed + 1), 1000)
    assert found.tolist() == cluster(vectors, num, generator(seed + 1), 1000).tolist()
    assert len(found.unique()) == num
    centres = torch.stack([vectors[found == k].mean(0) for k in range(num)])
    assert torch.equal(torch.cdist(vectors, centres).argmin(1), found)


def test_as_good_as_scikit_learn():
    from sklearn.cluster import KMeans

    vectors = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    reference = KMeans(10, n_init=1, random_state=0).fit(vectors)
    found = cluster(torch.from_numpy(vectors), 10, generator())
    assert oracle.within(vectors, found.tolist()) < 1.05 * reference.inertia_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_vectors_share_a_cluster_and_none_is_empty(dtype):
    distinct = torch.randn(3, 5, generator=generator(), dtype=dtype)
    found = cluster(distinct.repeat(20, 1), 10, generator(1))
    assert torch.equal(found[:3].sort().values, torch.arange(3))
    assert torch.equal(found, found[:3].repeat(20))


def test_one_vector_or_none_that_differs_is_one_cluster():
    assert cluster(torch.ones(1, 4), 5, generator()).tolist() == [0]
    assert cluster(torch.zeros(7, 4), 5, generator()).tolist() == [0] * 7


# --- errors


def test_shapes_are_checked():
    probability = torch.full((3, 2), 0.5)
    for call, message in (
        (
            lambda: self_confidence(probability, torch.zeros(4, dtype=torch.long)),
            "probabilities must have shape [4, K], got [3, 2]",
        ),
        (lambda: fit_softmax(torch.eye(3), torch.eye(2)), "counts must have shape [3, K], got [2, 2]"),
        (
            lambda: calibrated_joint(torch.ones(2, 3), torch.tensor([0, 1])),
            "the confident joint must have shape [K, K], got [2, 3]",
        ),
    ):
        with pytest.raises(ShapeError) as caught:
            call()
        assert str(caught.value) == message
