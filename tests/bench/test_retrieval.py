from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import pair_indices, seeds, unit_vectors

from nc_audit.bench import retrieval
from nc_audit.bench.retrieval import mean_average_precision, ranks, recall_at_k
from nc_audit.errors import DatasetError, ShapeError

# --- recall


def slow_ranks(query: np.ndarray, gallery: np.ndarray, matches: set[tuple[int, int]]) -> list[int]:
    result = []
    for q in range(len(query)):
        cosine = [float(np.dot(query[q], g)) for g in gallery]
        own = [cosine[g] for g in range(len(gallery)) if (q, g) in matches]
        rivals = [cosine[g] for g in range(len(gallery)) if (q, g) not in matches]
        result.append(1 + sum(r >= max(own) - 1e-6 for r in rivals) if own else 0)
    return result


def slow_recall(found: list[int], k: int) -> float:
    asked = [r for r in found if r > 0]
    return 100 * sum(r <= k for r in asked) / len(asked)


@given(pair_indices(), seeds, st.sampled_from([torch.float32, torch.float64]))
def test_recall_equals_loops(drawn, seed, dtype):
    image_N, caption_N, images, captions = drawn
    # Whole numbers, not unit: exact products, so that many tie exactly.
    rng = np.random.default_rng(seed)
    image, caption = (rng.integers(-1, 2, (num, 3)).astype(float) for num in (images, captions))
    matches = set(zip(image_N.tolist(), caption_N.tolist(), strict=True))
    by_image = slow_ranks(image, caption, matches)
    by_caption = slow_ranks(caption, image, {(c, i) for i, c in matches})
    image_t, caption_t = (torch.from_numpy(v).to(dtype) for v in (image, caption))
    assert ranks(image_t, caption_t, image_N, caption_N).tolist() == by_image
    found = recall_at_k(image_t, caption_t, image_N, caption_N, (1, 2, 5))
    assert found.image_to_caption == pytest.approx({k: slow_recall(by_image, k) for k in (1, 2, 5)})
    assert found.caption_to_image == pytest.approx({k: slow_recall(by_caption, k) for k in (1, 2, 5)})
    six = [*found.image_to_caption.values(), *found.caption_to_image.values()]
    assert found.total == pytest.approx(sum(six))
    assert found.mean == pytest.approx(sum(six) / 6)


@given(pair_indices(), seeds)
def test_float32_unit_vectors_rank_as_float64_ones(drawn, seed):
    image_N, caption_N, images, captions = drawn
    image, caption = unit_vectors(images, 16, seed), unit_vectors(captions, 16, seed + 1)
    exact = slow_ranks(
        image.numpy(), caption.numpy(), set(zip(image_N.tolist(), caption_N.tolist(), strict=True))
    )
    assert ranks(image.float(), caption.float(), image_N, caption_N).tolist() == exact


@given(pair_indices(), seeds, st.integers(1, 40))
def test_blocks_and_order_change_nothing(drawn, seed, cells):
    image_N, caption_N, images, captions = drawn
    image, caption = unit_vectors(images, 4, seed), unit_vectors(captions, 4, seed + 1)
    order = torch.randperm(len(image_N), generator=torch.Generator().manual_seed(seed))
    whole = ranks(image, caption, image_N, caption_N)
    before, retrieval._CELLS_AT_ONCE = retrieval._CELLS_AT_ONCE, cells
    try:
        parts = ranks(image, caption, image_N[order], caption_N[order])
    finally:
        retrieval._CELLS_AT_ONCE = before
    assert torch.equal(parts, whole)


def test_who_ranks_everything_alike_finds_nothing():
    same = torch.nn.functional.normalize(torch.ones(7, 5), dim=1)
    pair = torch.arange(7)
    assert ranks(same, same, pair, pair).tolist() == [7] * 7
    assert recall_at_k(same, same, pair, pair).mean == pytest.approx(100 / 3)  # only R@10 of 7


def test_equal_vectors_in_a_large_gallery_tie_whatever_their_place():
    # In other columns of a product the same numbers may add up in another order.
    query = unit_vectors(3, 257, 0, torch.float32)
    gallery = query[:1].repeat(1013, 1)
    for at in (0, 500, 1012):
        assert ranks(query[:1], gallery, torch.tensor([0]), torch.tensor([at])).tolist() == [1013]


def test_cosines_that_differ_by_rounding_tie():
    gallery = torch.tensor([[0.5, 0.8660254], [0.49999997, 0.8660254], [0.4999, 0.866]])
    assert gallery[0, 0] > gallery[1, 0] > gallery[2, 0]
    query = torch.tensor([[1.0, 0.0]])
    assert ranks(query, gallery, torch.tensor([0]), torch.tensor([0])).tolist() == [2]


def test_other_captions_of_the_image_are_no_rivals():
    image = torch.eye(3)
    caption = torch.stack([image[0], image[0], image[0], image[1], image[2]])
    image_N, caption_N = torch.tensor([0, 0, 0, 1, 2]), torch.arange(5)
    assert ranks(image, caption, image_N, caption_N).tolist() == [1, 1, 1]
    assert recall_at_k(image, caption, image_N, caption_N, (1,)).total == 200


def test_images_and_captions_without_a_pair_are_searched_but_not_asked():
    image, caption = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    found = recall_at_k(image, caption, torch.tensor([0]), torch.tensor([0]), (1, 3))
    assert ranks(image, caption, torch.tensor([0]), torch.tensor([0])).tolist() == [3, 0, 0]
    assert found.image_to_caption == {1: 0.0, 3: 100.0}


def test_no_pair_and_vectors_that_do_not_fit():
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(DatasetError) as caught:
        recall_at_k(torch.eye(3), torch.eye(3), none, none)
    assert caught.value.message == "there is no pair to retrieve"
    assert caught.value.hint == "evaluate a split that has both images and captions"
    with pytest.raises(ShapeError) as wrong:
        ranks(torch.eye(3), torch.eye(4), none, none)
    assert str(wrong.value) == "the gallery must have shape [G, 3], got [4, 4]"


# --- mean average precision


def slow_map(query, database, query_class, database_class, k, full_ranking) -> float:
    values = []
    for q, wanted in zip(query, query_class, strict=True):
        distance = [sum(int(a != b) for a, b in zip(q, g, strict=True)) for g in database]
        ranking = sorted(range(len(database)), key=lambda g: (distance[g], g))
        if full_ranking:
            relevant = [r for r, g in enumerate(ranking, 1) if database_class[g] == wanted][:k]
        else:
            relevant = [r for r, g in enumerate(ranking[:k], 1) if database_class[g] == wanted]
        values.append(sum(n / r for n, r in enumerate(relevant, 1)) / len(relevant) if relevant else 0.0)
    return sum(values) / len(values)


@given(
    st.integers(1, 8),
    st.integers(0, 30),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 35),
    st.booleans(),
    seeds,
    st.integers(1, 50),
)
def test_mean_average_precision_equals_loops(queries, size, bits, classes, k, full_ranking, seed, cells):
    rng = np.random.default_rng(seed)
    query, database = (2 * rng.integers(0, 2, (num, bits)) - 1 for num in (queries, size))
    query_class, database_class = (rng.integers(0, classes, num) for num in (queries, size))
    expected = slow_map(query, database, query_class, database_class, k, full_ranking)
    before, retrieval._CELLS_AT_ONCE = retrieval._CELLS_AT_ONCE, cells
    try:
        found = mean_average_precision(
            *(torch.from_numpy(a) for a in (query, database, query_class, database_class)),
            k,
            full_ranking=full_ranking,
        )
    finally:
        retrieval._CELLS_AT_ONCE = before
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_two_readings_differ_only_beyond_the_list():
    # Relevant at ranks 1 and 4; a list of two holds the first alone.
    code = torch.tensor([[1, 1, 1], [1, 1, -1], [1, -1, -1], [-1, -1, -1]])
    args = code[:1], code, torch.tensor([5]), torch.tensor([5, 0, 0, 5])
    assert mean_average_precision(*args, 2) == 1.0
    assert mean_average_precision(*args, 2, full_ranking=True) == (1 + 2 / 4) / 2
    assert mean_average_precision(*args, 4) == mean_average_precision(*args, 4, full_ranking=True)


def test_equal_distances_rank_by_place():
    code = torch.ones(3, 4)
    for at in range(3):
        relevant = torch.zeros(3, dtype=torch.long)
        relevant[at] = 1
        assert mean_average_precision(code[:1], code, torch.tensor([1]), relevant) == 1 / (at + 1)


def test_codes_and_classes_must_fit():
    code, kind = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
    for call, message in (
        (
            lambda: mean_average_precision(code, torch.ones(3, 5), kind, kind),
            "codes of the database must have shape [G, 4], got [3, 5]",
        ),
        (
            lambda: mean_average_precision(code, code, kind[:2], kind),
            "classes of the queries must have shape [3], got [2]",
        ),
        (
            lambda: mean_average_precision(code, code, kind, kind[:1]),
            "classes of the database must have shape [3], got [1]",
        ),
    ):
        with pytest.raises(ShapeError) as caught:
            call()
        assert str(caught.value) == message
    with pytest.raises(DatasetError) as empty:
        mean_average_precision(code[:0], code, kind[:0], kind)
    assert empty.value.message == "there is no query to retrieve with"
