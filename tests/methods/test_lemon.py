from __future__ import annotations

import math

import numpy as np
import oracles_baselines as oracle
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import pair_indices, seeds, unit_vectors

from nc_audit.errors import ShapeError
from nc_audit.methods import lemon
from nc_audit.methods.lemon import lemon_score, nearest_references, neighbour_noise


def distances(image, caption, image_N, caption_N):
    return 1 - (image[image_N] * caption[caption_N]).sum(1)


@st.composite
def situations(draw):
    """Pairs whose images all differ, so that none tie; captions may repeat."""
    _, caption_N, _, captions = draw(pair_indices())
    num, seed = len(caption_N), draw(seeds)
    order = np.random.default_rng(seed).permutation(num)
    reference = torch.from_numpy(np.sort(order[: draw(st.integers(1, num))]))
    return (
        unit_vectors(num, 4, seed),
        unit_vectors(captions, 4, seed + 1),
        torch.arange(num),
        caption_N,
        reference,
    )


@given(situations(), st.integers(1, 12), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.0, 5.0]))
def test_equals_the_oracle(situation, k, tau1, tau2):
    image, caption, image_N, caption_N, reference = situation
    own = distances(image, caption, image_N, caption_N)
    found = neighbour_noise(image, caption, image_N, caption_N, own, reference, k, tau1, tau2)
    expected = oracle.neighbour_noise(
        image.numpy(),
        caption.numpy(),
        image_N.tolist(),
        caption_N.tolist(),
        own.tolist(),
        reference.tolist(),
        k,
        tau1,
        tau2,
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    assert ((found >= 0) & (found <= 2)).all()


@given(seeds)
def test_float32_agrees(seed):
    image, caption = unit_vectors(60, 8, seed), unit_vectors(60, 8, seed + 1)
    pair, reference = torch.arange(60), torch.arange(0, 60, 2)
    own = distances(image, caption, pair, pair)
    exact = neighbour_noise(image, caption, pair, pair, own, reference, 60)
    found = neighbour_noise(image.float(), caption.float(), pair, pair, own.float(), reference, 60)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_a_pair_has_no_say_on_itself():
    # Two images at right angles: without self-exclusion the nearest reference would be the pair itself, at 0.
    side = torch.eye(2, dtype=torch.float64)
    pair = torch.arange(2)
    found = neighbour_noise(side, side, pair, pair, torch.zeros(2, dtype=torch.float64), pair, 1, 0.0, 0.0)
    assert found.tolist() == [1.0, 1.0]
    alone = neighbour_noise(
        side, side, pair, pair, torch.zeros(2, dtype=torch.float64), torch.tensor([1]), 3, 0.0, 0.0
    )
    assert alone.tolist() == [1.0, 0.0], "nobody is left to speak of the second pair"


def test_other_captions_of_the_same_image_speak():
    # One image with three captions: the two others are its nearest references, at distance 0.
    image = torch.eye(2, dtype=torch.float64)
    caption = torch.eye(4, dtype=torch.float64)
    image_N, caption_N = torch.tensor([0, 0, 0, 1]), torch.arange(4)
    own = torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    found = neighbour_noise(image, caption, image_N, caption_N, own, torch.arange(4), 2, 0.1, 1.0)
    say = [math.exp(-d) for d in own.tolist()]
    expected = [(say[1] + say[2]) / 2, (say[0] + say[2]) / 2, (say[0] + say[1]) / 2]
    np.testing.assert_allclose(found[:3].numpy(), expected, atol=1e-12)


def test_nobody_speaks_without_references():
    side, pair = torch.eye(3), torch.arange(3)
    assert neighbour_noise(side, side, pair, pair, torch.ones(3), pair[:0]).tolist() == [0.0] * 3


@given(seeds, st.integers(1, 9))
def test_blocks_change_nothing(seed, block):
    image, caption = unit_vectors(23, 5, seed), unit_vectors(23, 5, seed + 1)
    pair = torch.arange(23)
    own = distances(image, caption, pair, pair)
    whole = neighbour_noise(image, caption, pair, pair, own, pair, 4)
    before = lemon._PAIRS_AT_ONCE, lemon._COSINES_AT_ONCE
    lemon._PAIRS_AT_ONCE, lemon._COSINES_AT_ONCE = block, block * 23
    try:
        parts = neighbour_noise(image, caption, pair, pair, own, pair, 4)
    finally:
        lemon._PAIRS_AT_ONCE, lemon._COSINES_AT_ONCE = before
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


@given(seeds)
def test_the_order_of_pairs_has_no_say(seed):
    image, caption = unit_vectors(20, 5, seed), unit_vectors(20, 5, seed + 1)
    pair = torch.arange(20)
    own = distances(image, caption, pair, pair)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    straight = neighbour_noise(image, caption, pair, pair, own, pair, 6)
    shuffled = neighbour_noise(image, caption, order, order, own[order], pair, 6)
    torch.testing.assert_close(shuffled, straight[order], atol=1e-12, rtol=0)


@given(seeds, st.floats(0, 3))
def test_inner_products_in_the_exponent_only_scale(seed, tau1):
    # The published code puts the inner product, not one minus it, into the first exponent.
    image, caption = unit_vectors(15, 4, seed), unit_vectors(15, 4, seed + 1)
    pair = torch.arange(15)
    own = distances(image, caption, pair, pair)
    noise = neighbour_noise(image, caption, pair, pair, own, pair, 5, tau1, 5.0)
    by_code = np.zeros(15)
    for i in range(15):
        near = sorted(range(15), key=lambda j: -float(image[i] @ image[j]))
        near = [j for j in near if j != i][:5]
        by_code[i] = np.mean(
            [
                (1 - float(caption[i] @ caption[j]))
                * math.exp(tau1 * float(image[i] @ image[j]))
                * math.exp(-5.0 * float(own[j]))
                for j in near
            ]
        )
    np.testing.assert_allclose(by_code, math.exp(tau1) * noise.numpy(), rtol=1e-9)


@given(strategies.scores())
def test_without_factors_the_score_is_the_distance(distance_N):
    noise = torch.full_like(distance_N, 7.0)
    assert torch.equal(lemon_score(distance_N, noise, noise, 0.0, 0.0), distance_N)
    torch.testing.assert_close(lemon_score(distance_N, noise, noise / 7, 5.0, 3.0), distance_N + 38)


def test_nearest_references_come_in_order_and_no_more_than_there_are():
    side = unit_vectors(9, 4, 0)
    cosine, at = nearest_references(side, torch.arange(9), torch.tensor([2, 5, 7]), 10)
    assert cosine.shape == at.shape == (9, 3)
    assert (cosine.diff(dim=1) <= 0).all()
    assert at[5, 0] == 1
    assert at.sort(1).values.tolist() == [[0, 1, 2]] * 9


def test_distances_must_be_those_of_the_pairs():
    side, pair = torch.eye(3), torch.arange(3)
    with pytest.raises(ShapeError) as caught:
        neighbour_noise(side, side, pair, pair, torch.zeros(2), pair)
    assert str(caught.value) == "distances must have shape [N], got [2]"
