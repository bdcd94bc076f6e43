from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import unit_vectors

from nc_audit.methods import matching
from nc_audit.methods.matching import Candidates, Matches, Pairs


def match(image, caption, scale, candidates, image_N, caption_N):
    """One set of pairs, and the same set asked beside another one: company must not matter."""
    (alone,) = matching.match(image, caption, scale, candidates, (image_N, caption_N))
    other = (image_N.flip(0), caption_N)
    _, beside = matching.match(image, caption, scale, candidates, other, (image_N, caption_N))
    for one, two in zip(tensors(alone), tensors(beside), strict=True):
        np.testing.assert_array_equal(one, two)
    return alone


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compare(found: Matches, expected: dict[str, np.ndarray], atol: float = 1e-9) -> None:
    for ours, name in (
        (found.similarity, "similarity"),
        (found.loss, "loss"),
        (found.energy, "energy"),
        (found.image_entropy, "image"),
        (found.caption_entropy, "caption"),
    ):
        np.testing.assert_allclose(ours, expected[name], atol=atol, err_msg=name)


def tensors(matches: Matches) -> tuple[torch.Tensor, ...]:
    return (
        matches.similarity,
        matches.loss,
        matches.energy,
        matches.image_entropy,
        matches.caption_entropy,
    )


@given(strategies.pair_indices(), strategies.seeds, st.integers(1, 20), st.sampled_from([1.0, 10.0, 40.0]))
def test_every_image_with_every_caption_equals_the_oracle(indices, seed, num, scale):
    # Asking all combinations covers given pairs and swaps, own match a candidate or not, candidate masked or not.
    pairs = Pairs(*indices)
    image, caption = unit_vectors(pairs.num_images, 4, seed), unit_vectors(pairs.num_captions, 4, seed + 1)
    candidates = Candidates.draw(pairs, num, generator(seed))
    asked = [(i, c) for i in range(pairs.num_images) for c in range(pairs.num_captions)]
    found = match(
        image,
        caption,
        scale,
        candidates,
        torch.tensor([i for i, _ in asked]),
        torch.tensor([c for _, c in asked]),
    )
    expected = oracles.match(
        image.numpy(),
        caption.numpy(),
        scale,
        set(zip(pairs.image_N.tolist(), pairs.caption_N.tolist(), strict=True)),
        candidates.caption_M.tolist(),
        candidates.image_M.tolist(),
        asked,
    )
    compare(found, expected)


def test_float32_stays_near_the_float64_oracle():
    pairs = Pairs(torch.arange(180) // 3, torch.arange(180), 60, 180)
    image, caption = unit_vectors(60, 16, 0), unit_vectors(180, 16, 1)
    candidates = Candidates.draw(pairs, 64, generator(0))
    found = match(image.float(), caption.float(), 30.0, candidates, pairs.image_N, pairs.caption_N)
    given_pairs = list(zip(pairs.image_N.tolist(), pairs.caption_N.tolist(), strict=True))
    expected = oracles.match(
        image.numpy(),
        caption.numpy(),
        30.0,
        set(given_pairs),
        candidates.caption_M.tolist(),
        candidates.image_M.tolist(),
        given_pairs,
    )
    compare(found, expected, atol=1e-4)


def test_a_pair_is_scored_alike_whether_or_not_its_own_match_is_a_candidate():
    pairs = Pairs(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]), 4, 4)
    image, caption = unit_vectors(4, 3, 0), unit_vectors(4, 3, 1)
    seen = set()
    for seed in range(20):
        candidates = Candidates.draw(pairs, 3, generator(seed))
        asked = torch.tensor([0])
        found = match(image, caption, 10.0, candidates, asked, asked)
        others = [k for k in candidates.caption_M.tolist() if k != 0]
        logits = [10.0 * float(image[0] @ caption[k]) for k in [0, *others]]
        images = [
            10.0 * float(image[k] @ caption[0]) for k in [0, *(k for k in candidates.image_M.tolist() if k)]
        ]
        expected = -(oracles.log_sum_exp(logits) + oracles.log_sum_exp(images)) / 2
        assert found.energy.item() == pytest.approx(expected, abs=1e-9)
        seen.add(len(others))
    assert seen == {2, 3}


def test_more_queries_than_one_chunk_equal_one_matrix():
    num = 4096 + 200
    pairs = Pairs(torch.arange(num), torch.randperm(num, generator=generator(9)), num, num)
    image, caption = unit_vectors(num, 8, 0), unit_vectors(num, 8, 1)
    candidates = Candidates.draw(pairs, 20, generator(0))
    at = torch.cat([torch.arange(50), torch.arange(4080, 4120), torch.arange(num - 50, num)])
    found = match(image, caption, 20.0, candidates, pairs.image_N[at], pairs.caption_N[at])
    asked = list(zip(pairs.image_N[at].tolist(), pairs.caption_N[at].tolist(), strict=True))
    known = set(zip(pairs.image_N.tolist(), pairs.caption_N.tolist(), strict=True))
    expected = oracles.match(
        image.numpy(),
        caption.numpy(),
        20.0,
        known,
        candidates.caption_M.tolist(),
        candidates.image_M.tolist(),
        asked,
    )
    compare(found, expected)


@given(strategies.pair_indices(), strategies.seeds, st.integers(1, 7))
def test_asking_in_parts_or_in_another_order_changes_nothing(indices, seed, part):
    pairs = Pairs(*indices)
    image, caption = unit_vectors(pairs.num_images, 4, seed), unit_vectors(pairs.num_captions, 4, seed + 1)
    candidates = Candidates.draw(pairs, 8, generator(seed))
    whole = tensors(match(image, caption, 10.0, candidates, pairs.image_N, pairs.caption_N))
    order = torch.randperm(len(pairs), generator=generator(seed))
    collected = [torch.empty_like(whole[0]) for _ in whole]
    for at in order.split(part):
        some = match(image, caption, 10.0, candidates, pairs.image_N[at], pairs.caption_N[at])
        for into, values in zip(collected, tensors(some), strict=True):
            into[at] = values
    for one, other in zip(whole, collected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_equal_vectors_are_at_chance():
    pairs = Pairs(torch.arange(12), torch.arange(12), 12, 12)
    same = torch.full((12, 4), 0.5, dtype=torch.float64)
    found = match(same, same, 7.0, Candidates.draw(pairs, 12, generator(0)), pairs.image_N, pairs.caption_N)
    np.testing.assert_allclose(found.loss, math.log(12), atol=1e-9)
    np.testing.assert_allclose(found.energy, -7.0 - math.log(12), atol=1e-9)
    np.testing.assert_allclose(found.image_entropy, 1.0, atol=1e-9)
    np.testing.assert_allclose(found.caption_entropy, 1.0, atol=1e-9)


def test_a_pair_whose_candidates_are_all_its_own_has_no_loss():
    # Image 0 carries every caption, and caption 0 belongs to every image.
    pairs = Pairs(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), 2, 2)
    image, caption = unit_vectors(2, 3, 0), unit_vectors(2, 3, 1)
    zero = torch.tensor([0])
    found = match(image, caption, 10.0, Candidates.draw(pairs, 2, generator(0)), zero, zero)
    assert found.loss.item() == pytest.approx(0, abs=1e-12)
    assert found.image_entropy.item() == found.caption_entropy.item() == 0.0


@given(strategies.pair_indices(), strategies.seeds, st.integers(1, 20))
def test_candidates_are_distinct_sorted_and_know_their_own(indices, seed, num):
    pairs = Pairs(*indices)
    drawn = Candidates.draw(pairs, num, generator(seed))
    for chosen, total, position in (
        (drawn.caption_M, pairs.num_captions, drawn.position_of_caption_C),
        (drawn.image_M, pairs.num_images, drawn.position_of_image_I),
    ):
        assert len(chosen) == min(num, total)
        assert (chosen.diff() > 0).all()
        assert torch.equal(position[chosen], torch.arange(len(chosen)))
        assert int((position >= 0).sum()) == len(chosen)
    known = set(zip(pairs.image_N.tolist(), pairs.caption_N.tolist(), strict=True))
    image, at = drawn.own_caption
    of_captions = set(zip(image.tolist(), drawn.caption_M[at].tolist(), strict=True))
    assert of_captions == {(i, c) for i, c in known if c in set(drawn.caption_M.tolist())}
    caption, at = drawn.own_image
    of_images = set(zip(drawn.image_M[at].tolist(), caption.tolist(), strict=True))
    assert of_images == {(i, c) for i, c in known if i in set(drawn.image_M.tolist())}


def test_matches_add_up_in_place():
    total = Matches.zeros(3)
    part = Matches(*(torch.tensor([1.0, 2.0]) * k for k in range(1, 6)))
    total.add_(torch.tensor([2, 0]), part)
    total.add_(torch.tensor([2, 0]), part)
    mean = total.divided(2)
    assert mean.similarity.tolist() == [2.0, 0.0, 1.0]
    assert mean.caption_entropy.tolist() == [10.0, 0.0, 5.0]


def test_selected_pairs_keep_the_same_images_and_captions():
    pairs = Pairs(torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), 3, 6)
    some = pairs.select(torch.tensor([2, 0]))
    assert (some.image_N.tolist(), some.caption_N.tolist()) == ([2, 0], [5, 3])
    assert (len(some), some.num_images, some.num_captions) == (2, 3, 6)


@given(strategies.pair_indices(), strategies.seeds, st.integers(1, 20))
def test_the_image_a_swap_took_its_caption_from_is_a_candidate(indices, seed, num):
    pairs = Pairs(*indices)
    image, caption = unit_vectors(pairs.num_images, 4, seed), unit_vectors(pairs.num_captions, 4, seed + 1)
    candidates = Candidates.draw(pairs, num, generator(seed))
    given_pairs = set(zip(pairs.image_N.tolist(), pairs.caption_N.tolist(), strict=True))
    carrier = pairs.carrier_of_captions()
    for c in range(pairs.num_captions):
        carriers = [i for i, other in given_pairs if other == c]
        assert carrier[c] == (min(carriers) if carriers else -1)
    asked = [
        (i, c)
        for i in range(pairs.num_images)
        for c in set(pairs.caption_N.tolist())
        if (i, c) not in given_pairs
    ]
    if not asked:
        return
    i, c = (torch.tensor(one) for one in zip(*asked, strict=True))
    own = (pairs.image_N, pairs.caption_N)
    before = matching.match(image, caption, 10.0, candidates, own, (i, c))
    after = matching.match(image, caption, 10.0, candidates, own, (i, c), strays=carrier[c])
    assert torch.equal(after[0].loss, before[0].loss), "other sets stay as they are"
    for at, (this, words) in enumerate(asked):
        stray = int(carrier[words])
        rivals = [
            k
            for k in candidates.image_M.tolist()
            if k != this and (k == stray or (k, words) not in given_pairs)
        ]
        logits = [10.0 * float(image[k] @ caption[words]) for k in [this, *rivals]]
        without = [10.0 * float(image[k] @ caption[words]) for k in [this, *rivals] if k != stray]
        gain = (oracles.log_sum_exp(logits) - oracles.log_sum_exp(without)) / 2
        assert float(after[1].loss[at] - before[1].loss[at]) == pytest.approx(gain, abs=1e-9)
