"""Ranks and best matches: against one candidate at a time, and by an index against all."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from nc_audit import rivals
from nc_audit.errors import RecipeError
from nc_audit.methods.matching import Pairs
from nc_audit.recipe import ScoreSection
from nc_audit.rivals import Reach, look_around, look_up, reach, widened

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


def unit_vectors(num: int, dims: int, seed: int) -> torch.Tensor:
    """Random unit vectors in float32, as heads give them."""
    return strategies.unit_vectors(num, dims, seed, torch.float32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def look_up_by_hand(query, other, pairs, searched):
    """Rank, best other and its margin per pair, one candidate at a time."""
    own_of: dict[int, set[int]] = {}
    for q, o in pairs:
        own_of.setdefault(q, set()).add(o)
    result = []
    for q, o in pairs:
        own = float(query[q] @ other[o])
        rivals = {k: float(query[q] @ other[k]) for k in searched if k not in own_of[q]}
        best = max(rivals, key=lambda k: rivals[k], default=-1)
        rank = 1 + sum(v > own for v in rivals.values())
        result.append((rank, best, rivals[best] - own if rivals else float("nan")))
    return result


@given(strategies.pair_indices(), strategies.seeds, st.integers(1, 5))
def test_look_up_equals_the_one_by_hand_in_any_block(indices, seed, block):
    image_N, caption_N, images, captions = indices
    image, caption = unit_vectors(images, 4, seed), unit_vectors(captions, 4, seed + 1)
    found = look_up(image, caption, image_N, caption_N, 10_000, generator(), block)
    pairs = list(zip(image_N.tolist(), caption_N.tolist(), strict=True))
    expected = look_up_by_hand(image, caption, pairs, range(captions))
    assert found.rank.tolist() == [rank for rank, _, _ in expected]
    assert found.best.tolist() == [best for _, best, _ in expected]
    np.testing.assert_allclose(found.margin, [margin for _, _, margin in expected], atol=1e-6)


@pytest.mark.parametrize("missing", [0, 1])
def test_ranks_of_more_queries_than_are_counted_at_once(missing):
    # Each image has a first caption, some have others; one caption is that of many images.
    image_N = torch.cat([torch.arange(missing, 300), torch.randint(300, (200,), generator=generator())])
    caption_N = torch.cat([torch.arange(missing, 300) % 40, torch.randint(5, (200,), generator=generator())])
    image, caption = unit_vectors(300, 4, 0), unit_vectors(40, 4, 1)
    for query, other, asks, own in (
        (image, caption, image_N, caption_N),
        (caption, image, caption_N, image_N),
    ):
        found = look_up(query, other, asks, own, 10_000, generator())
        pairs = list(zip(asks.tolist(), own.tolist(), strict=True))
        expected = look_up_by_hand(query, other, pairs, range(len(other)))
        assert found.rank.tolist() == [rank for rank, _, _ in expected]


def test_a_bounded_search_finds_candidates_only_and_ranks_among_them():
    image, caption = unit_vectors(50, 4, 0), unit_vectors(60, 4, 1)
    image_N, caption_N = torch.arange(50), torch.arange(50)
    found = look_up(image, caption, image_N, caption_N, 20, generator(3))
    searched = set(torch.randperm(60, generator=generator(3))[:20].tolist())
    expected = look_up_by_hand(image, caption, [(i, i) for i in range(50)], searched)
    assert set(found.best.tolist()) <= searched
    assert found.rank.tolist() == [rank for rank, _, _ in expected]


@given(strategies.seeds, st.integers(1, 4), st.integers(1, 9))
def test_the_largest_of_a_row_is_its_first(seed, pieces, levels):
    values = torch.randint(levels, (7, 64 * pieces), generator=generator(seed)).float()
    values[0] = float("-inf")
    values[1, -40:] = float("-inf")
    top, at = rivals._largest(values)
    assert torch.equal(top, values.amax(1))
    assert at.tolist() == [row.index(max(row)) for row in values.tolist()]


def test_a_query_that_owns_everything_has_no_better_match():
    found = look_up(
        unit_vectors(1, 3, 0),
        unit_vectors(2, 3, 1),
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        10,
        generator(),
    )
    assert found.rank.tolist() == [1, 1]
    assert found.best.tolist() == [-1, -1]
    assert found.margin.isnan().all()


def test_equal_vectors_are_no_better_matches():
    # Two hundred captions, each there twice under two names: the twin fits exactly as well, not better.
    image, caption = unit_vectors(200, 64, 0), unit_vectors(200, 64, 1).repeat(2, 1)
    near = torch.nn.functional.normalize(image + 0.1 * caption[:200], dim=1)
    caption = torch.cat([near, near])
    at = torch.arange(200)
    found = look_up(image, caption, at, at, 10_000, generator())
    assert found.rank.tolist() == [1] * 200


# --- how far


def searching(**settings) -> ScoreSection:
    return ScoreSection(**settings)


def test_searches_are_bounded_where_very_many_ask():
    settings = searching(search="part")
    sizes = [reach(num // 5, num, settings).compared for num in (300, 7 * 10**4, 10**5, 10**6, 10**8)]
    assert sizes == [300, 70_000, 50_000, 5_000, 1_000]


def test_a_gpu_compares_all_of_a_million():
    settings = searching()
    assert reach(200_000, 1_000_000, settings, "cuda") == Reach(1_000_000)
    assert reach(2 * 10**6, 10**7, settings, "cuda").compared == 100_000


@needs_faiss
def test_an_index_is_made_only_where_not_all_can_be_compared():
    assert not reach(1_000, 5_000, searching()).has_index
    assert reach(200_000, 10**6, searching()).has_index
    assert reach(200_000, 10**6, searching(search="faiss")).has_index
    assert not reach(200_000, 10**6, searching(search="part")).has_index
    assert reach(100, 500, searching(rank_candidates=400)).has_index


def test_without_faiss_a_part_is_searched_and_told_or_refused_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    far = reach(200_000, 10**6, searching())
    assert not far.has_index
    assert far.told(200_000, 10**6) == (
        "ranks and best matches: 5,000 of 1,000,000 captions and of 200,000 images were searched; "
        "pip install 'nc-audit[faiss]' finds best matches among all"
    )
    with pytest.raises(RecipeError) as caught:
        reach(10, 50, searching(search="faiss"))
    assert str(caught.value) == (
        "score.search = \"faiss\" needs the package faiss (pip install 'nc-audit[faiss]')"
    )


def test_only_what_was_not_all_searched_is_told():
    told = Reach(50_000).told(20_000, 100_000)
    assert told is not None
    assert told.startswith("ranks and best matches: 50,000 of 100,000 captions were searched;")
    assert Reach(50).told(20, 50) is None
    assert Reach(5, has_index=True).told(20, 50) is None


# --- by an index


def clustered(num_images: int, per_image: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Pairs]:
    """Images of a hundred classes with captions near them, in the order of the images."""

    def near(centre: torch.Tensor, far: float, seed: int) -> torch.Tensor:
        return torch.nn.functional.normalize(centre + far * unit_vectors(len(centre), 24, seed), dim=1)

    image = near(unit_vectors(100, 24, seed).repeat(num_images // 100, 1), 0.7, seed + 1)
    at = torch.arange(num_images * per_image)
    caption = near(image.repeat_interleave(per_image, 0), 0.7, seed + 2)
    return image, caption, Pairs(at // per_image, at, num_images, len(at))


@needs_faiss
def test_the_index_finds_nearly_all_of_what_an_exact_search_finds_and_never_less_than_the_part():
    image, caption, pairs = clustered(4_000, 3, 0)
    asked = (caption, image, pairs.caption_N, pairs.image_N)
    exact = look_up(*asked, 10**6, generator())
    part = look_up(*asked, 300, generator(1))
    wide = widened(part, *asked, 0)
    assert torch.equal(wide.rank, part.rank)
    assert (wide.margin >= part.margin).all()
    assert (part.best == exact.best).double().mean() < 0.2
    assert (wide.best == exact.best).double().mean() > 0.95
    same = wide.best == exact.best
    torch.testing.assert_close(wide.margin[same], exact.margin[same], atol=1e-5, rtol=0)


@needs_faiss
@given(strategies.pair_indices(), strategies.seeds)
def test_the_index_of_few_is_exact(indices, seed):
    image_N, caption_N, images, captions = indices
    image, caption = unit_vectors(images, 4, seed), unit_vectors(captions, 4, seed + 1)
    exact = look_up(image, caption, image_N, caption_N, 10_000, generator())
    nothing = rivals.LookUp(
        exact.rank, torch.full_like(exact.best, -1), torch.full_like(exact.margin, float("nan"))
    )
    wide = widened(nothing, image, caption, image_N, caption_N, 0)
    # A few cells, all of which are looked into; half precision may exchange what is all but equally near.
    torch.testing.assert_close(wide.margin, exact.margin, atol=2e-3, rtol=0, equal_nan=True)
    own = set(zip(image_N.tolist(), caption_N.tolist(), strict=True))
    assert not own & set(zip(image_N.tolist(), wide.best.tolist(), strict=True))


@needs_faiss
def test_an_image_with_more_captions_than_are_looked_past_keeps_what_the_part_found():
    image, caption = unit_vectors(50, 8, 0), unit_vectors(400, 8, 1)
    image_N = torch.cat([torch.zeros(300, dtype=torch.long), torch.arange(100) % 50])
    caption[:300] = torch.nn.functional.normalize(image[0] + 0.01 * caption[:300], dim=1)
    asked = (image, caption, image_N, torch.arange(400))
    part = look_up(*asked, 10_000, generator())
    wide = widened(part, *asked, 0)
    assert torch.equal(wide.best[:300], part.best[:300])


@needs_faiss
def test_the_same_seed_finds_the_same():
    image, caption, pairs = clustered(2_000, 2, 3)
    far = Reach(100, has_index=True)
    one, other = (look_around(image, caption, pairs, far, 5) for _ in range(2))
    for name, values in one.items():
        assert torch.equal(values, other[name]), name
