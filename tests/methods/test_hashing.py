from __future__ import annotations

import math

import numpy as np
import oracles_chnr
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nc_audit.errors import RecipeError, ShapeError
from nc_audit.methods.contrastive import negatives_mask
from nc_audit.methods.hashing import (
    WEIGHTINGS,
    HashHeads,
    binary_codes,
    halfway,
    hash_contrastive_loss,
    pair_weight,
    quantisation_loss,
)


def codes(num: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, bits, generator=generator, dtype=torch.float64) * 2 - 1


@given(st.integers(2, 6), strategies.seeds, st.sampled_from([0.5, 1.0, 2.0]), st.booleans())
def test_the_contrastive_loss_equals_the_oracle(num, seed, temperature, masked):
    image, caption = codes(num, 5, seed), codes(num, 5, seed + 1)
    weight = codes(num, 1, seed + 2).squeeze(1).abs()
    counts = None
    if masked:
        rng = np.random.default_rng(seed)
        sides = (torch.from_numpy(rng.integers(0, num, num)) for _ in range(2))
        counts = negatives_mask(*sides)
    found = hash_contrastive_loss(image, caption, weight, counts, temperature)
    everything = np.ones((num, num), bool) if counts is None else counts.numpy()
    expected = oracles_chnr.hash_contrastive_loss(
        image.numpy(), caption.numpy(), weight.tolist(), everything, temperature
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)


@given(st.integers(2, 6), strategies.seeds)
def test_the_order_of_pairs_does_not_matter(num, seed):
    image, caption, weight = codes(num, 4, seed), codes(num, 4, seed + 1), torch.rand(num).double()
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        hash_contrastive_loss(image, caption, weight)[order],
        hash_contrastive_loss(image[order], caption[order], weight[order]),
    )


def test_equal_codes_cost_the_log_of_the_others_twice_and_a_weight_of_0_nothing():
    same = torch.ones(4, 8, dtype=torch.float64)
    found = hash_contrastive_loss(same, same, torch.tensor([1.0, 0.5, 0.0, 1.0]))
    np.testing.assert_allclose(found, 2 * math.log(7) * np.array([1, 0.5, 0, 1]), atol=1e-12)


def test_a_pair_without_weight_still_is_a_negative():
    image, caption = codes(3, 4, 0).requires_grad_(True), codes(3, 4, 1)
    hash_contrastive_loss(image, caption, torch.tensor([1.0, 1.0, 0.0])).sum().backward()
    assert image.grad is not None
    assert image.grad[2].abs().sum() > 0


@given(st.integers(1, 5), st.integers(1, 3), strategies.seeds)
def test_the_quantisation_equals_the_oracle_and_is_0_on_bits(num, views, seed):
    target = binary_codes(codes(num, 6, seed)).double()
    soft = [codes(num, 6, seed + 1 + k) for k in range(views)]
    expected = oracles_chnr.quantisation_loss(target.numpy(), [one.numpy() for one in soft])
    np.testing.assert_allclose(quantisation_loss(target, soft), expected, atol=1e-9)
    assert quantisation_loss(target, [target] * views).sum() == 0


@given(strategies.probabilities, st.floats(0, 1))
def test_weights_lie_between_0_and_1_and_never_fall_as_the_probability_rises(values, threshold):
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    for weighting in WEIGHTINGS:
        weight = pair_weight(ordered, weighting, threshold)
        assert weight.dtype == torch.float64
        assert ((weight >= 0) & (weight <= 1)).all()
        assert (weight.diff() >= 0).all()


def test_the_weights_are_the_published_ones():
    probability = torch.tensor([0.1, 0.3, 0.5, 1.0], dtype=torch.float64)
    expected = {
        "nw": [0.1, 0.3, 0.5, 1.0],
        "ew": [0.001, 0.027, 0.125, 1.0],
        "dw": [0.0, 0.0, 1.0, 1.0],
        "ones": [1.0, 1.0, 1.0, 1.0],
    }
    assert tuple(expected) == WEIGHTINGS
    for weighting, weights in expected.items():
        np.testing.assert_allclose(pair_weight(probability, weighting, 0.3), weights, atol=1e-12)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(RecipeError) as caught:
        pair_weight(torch.ones(1), "eww", 0.5)
    assert str(caught.value) == "no weighting is called eww (did you mean ew?)"


def test_the_threshold_lies_halfway():
    assert halfway(torch.tensor([1.0, 0.5]), torch.tensor([0.25])) == (0.5, 0.25)


def test_sides_of_different_shape_are_refused():
    with pytest.raises(ShapeError) as caught:
        hash_contrastive_loss(torch.zeros(3, 4), torch.zeros(3, 5), torch.ones(3))
    assert str(caught.value) == "captions must have shape [3, 4], got [3, 5]"


def test_heads_give_soft_codes_unit_vectors_and_the_same_bits():
    torch.manual_seed(0)
    heads = HashHeads(6, 5, bits=8, hidden=16, logit_scale=2.0)
    image_ID, caption_CD = torch.randn(9, 6), torch.randn(7, 5)
    assert heads.training
    soft = heads.soft_codes(image_ID, caption_CD)
    unit = heads.embed(image_ID, caption_CD)
    assert heads.training
    assert heads.scale().item() == 2.0
    for code, vector, num in zip(soft, unit, (9, 7), strict=True):
        assert code.shape == vector.shape == (num, 8)
        assert (code.abs() < 1).all()
        torch.testing.assert_close(vector.norm(dim=1), torch.ones(num))
        assert torch.equal(binary_codes(code), binary_codes(vector))
        assert set(binary_codes(code).unique().tolist()) <= {-1, 1}
    # Evaluation mode: what else is in the batch does not matter.
    torch.testing.assert_close(heads.soft_codes(image_ID[:1], caption_CD[:1])[0], soft[0][:1])


def test_heads_are_as_published():
    heads = HashHeads(512, 768)
    assert [type(layer).__name__ for layer in heads.image.layers] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "Tanh",
    ]
    assert heads.sizes == {"num_image": 512, "num_caption": 768, "bits": 64, "hidden": 4096}
    assert heads.caption.layers[0].weight.shape == (4096, 768)
    assert heads.caption.layers[3].weight.shape == (64, 4096)
