from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from nc_audit.errors import ShapeError
from nc_audit.methods.mutual_information import GaussianDependence, Moments


def drawn(num: int, seed: int = 0, dims: int = 6, shared: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Image and caption vectors that share some latent directions."""
    rng = np.random.default_rng(seed)
    mix_image, mix_caption = np.random.default_rng(99).normal(size=(2, shared, dims))
    latent = rng.normal(size=(num, shared))
    return (
        latent @ mix_image + 0.7 * rng.normal(size=(num, dims)),
        latent @ mix_caption + 0.7 * rng.normal(size=(num, dims)),
    )


def variation(image, caption, weight, shrinkage, new_image, new_caption) -> np.ndarray:
    fitted = GaussianDependence(*(torch.from_numpy(x) for x in (image, caption, weight)), shrinkage)
    return fitted.variation(torch.from_numpy(new_image), torch.from_numpy(new_caption)).numpy()


@pytest.mark.parametrize("shrinkage", [0.0, 0.05, 0.3])
def test_equals_the_oracle_with_weights_and_shrinkage(shrinkage):
    image, caption = drawn(80)
    weight = np.random.default_rng(1).random(80)
    new = drawn(20, seed=2)
    expected = oracles.mi_variation(image, caption, weight, shrinkage, *new)
    np.testing.assert_allclose(variation(image, caption, weight, shrinkage, *new), expected, atol=1e-8)


def test_float32_stays_near_the_float64_oracle():
    image, caption = drawn(200)
    new = drawn(20, seed=2)
    expected = oracles.mi_variation(image, caption, np.ones(200), 0.3, *new)
    single = [x.astype(np.float32) for x in (image, caption, np.ones(200))]
    found = variation(*single, 0.3, *(x.astype(np.float32) for x in new))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_sums_over_parts_fit_as_all_pairs_do(shrinkage):
    image, caption = drawn(80)
    weight = np.random.default_rng(1).random(80)
    new = [torch.from_numpy(one) for one in drawn(20, seed=2)]
    joint, weight_N = torch.from_numpy(np.hstack([image, caption])), torch.from_numpy(weight)
    sums = Moments.of(joint[:50], weight_N[:50]) + Moments.of(joint[50:], weight_N[50:])
    fitted = GaussianDependence.of_moments(sums, image.shape[1], shrinkage, torch.float64)
    expected = oracles.mi_variation(image, caption, weight, shrinkage, *(one.numpy() for one in new))
    np.testing.assert_allclose(fitted.variation(*new).numpy(), expected, atol=1e-8)


def test_first_order_change_follows_the_exact_one():
    image, caption = drawn(400)
    new_image, new_caption = drawn(200, seed=3)
    # Half of the new pairs are mismatched, so that the range of values is wide.
    new_caption[:100] = np.roll(new_caption[:100], 1, axis=0)
    before = oracles.mutual_information(image, caption)
    exact = np.array(
        [
            oracles.mutual_information(np.vstack([image, v]), np.vstack([caption, t])) - before
            for v, t in zip(new_image, new_caption, strict=True)
        ]
    )
    found = variation(image, caption, np.ones(400), 0.0, new_image, new_caption)
    assert np.corrcoef(exact, found)[0, 1] > 0.99


def test_invertible_linear_maps_of_either_side_change_nothing():
    image, caption = drawn(100)
    new_image, new_caption = drawn(30, seed=4)
    rng = np.random.default_rng(5)
    map_image, map_caption = (np.eye(6) + 0.4 * rng.normal(size=(6, 6)) for _ in range(2))
    plain = variation(image, caption, np.ones(100), 0.0, new_image, new_caption)
    mapped = variation(
        image @ map_image,
        caption @ map_caption + 3,
        np.ones(100),
        0.0,
        new_image @ map_image,
        new_caption @ map_caption + 3,
    )
    np.testing.assert_allclose(mapped, plain, atol=1e-6)


def test_scaling_all_weights_changes_nothing_and_weight_zero_leaves_a_pair_out():
    image, caption = drawn(60)
    new = drawn(10, seed=6)
    weight = np.ones(60)
    weight[40:] = 0.0
    first = variation(image, caption, weight, 0.1, *new)
    np.testing.assert_allclose(variation(image, caption, 7 * weight, 0.1, *new), first, atol=1e-9)
    np.testing.assert_allclose(variation(image[:40], caption[:40], np.ones(40), 0.1, *new), first, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_pairs_are_lower_on_average(seed):
    image, caption = drawn(300)
    new_image, new_caption = drawn(200, seed=10 + seed)
    matched = variation(image, caption, np.ones(300), 0.05, new_image, new_caption)
    shuffled = variation(image, caption, np.ones(300), 0.05, new_image, np.roll(new_caption, 1, axis=0))
    assert shuffled.mean() < matched.mean() - 1
    assert abs(matched.mean()) < 1


@pytest.mark.parametrize(
    ("image", "caption", "got"),
    [((5,), (5, 2), [5]), ((5, 2), (5,), [5, 2]), ((5, 2), (4, 2), [5, 2])],
)
def test_shapes_are_named_in_the_error(image, caption, got):
    with pytest.raises(ShapeError) as caught:
        GaussianDependence(torch.zeros(image), torch.zeros(caption), torch.ones(5), 0.1)
    assert str(caught.value) == f"image and caption vectors must have shape [N, D], got {got}"
