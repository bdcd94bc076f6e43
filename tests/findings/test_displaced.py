"""Shifted blocks and re-matches, where they are planted and where not."""

from __future__ import annotations

import numpy as np
import pytest
from finding_case import DIM, NUM, Case, told, unit
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.findings.displaced import _cosines_by_offset, best_of_each_other


@pytest.mark.parametrize("per_image", [1, 3])
@pytest.mark.parametrize("offset", [-3, 3, 6])
def test_a_shifted_block_is_one_finding_with_the_right_rows(per_image: int, offset: int) -> None:
    case = Case(per_image=per_image)
    low, high = 90, 210
    case.row_caption[low + offset : high + offset] = np.arange(low, high)
    case.noise[low:high] = 0.95
    found = told(case.find(), "block_shift")
    expected = set(range(low, high))
    assert len(expected ^ found.keys()) <= 4 * per_image + 2 * abs(offset)
    assert len(set(found.values())) == 1
    way = "later" if offset > 0 else "earlier"
    assert next(iter(found.values())).endswith(f"fit captions {abs(offset)} rows {way}")
    partners = {one["row"]: one["partner_row"] for one in case.find() if one["kind"] == "block_shift"}
    assert all(partner == row + offset for row, partner in partners.items())


@pytest.mark.parametrize("num", [45, 128, 300])
def test_cosines_by_offset_are_those_of_the_rows_that_far_away(num: int) -> None:
    case, draw = Case(), np.random.default_rng(0)
    image, caption = draw.integers(NUM, size=num), draw.integers(NUM, size=num)
    offsets = [0, 1, -1, 7, -20, 64, -64, 70, -90]
    vectors = case.vectors
    for offset, found in zip(offsets, _cosines_by_offset(vectors, image, caption, offsets), strict=True):
        assert len(found) == num
        for row in range(max(0, -offset), min(num, num - offset)):
            expected = vectors.image[image[row]] @ vectors.caption[caption[row + offset]]
            assert found[row] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_permuted_captions_are_no_block(rate: float) -> None:
    for seed in range(5):
        case, draw = Case(per_image=2, seed=seed), np.random.default_rng(seed)
        hit = np.flatnonzero(draw.random(2 * NUM) < rate)
        case.row_caption[hit] = draw.permutation(hit)
        assert told(case.find(), "block_shift") == {}


def test_exchanged_captions_are_matched_again() -> None:
    case = Case()
    hit = np.arange(50, 90)
    case.row_caption[hit] = np.roll(hit, 17)
    case.noise[hit] = 0.97
    matched = {one["row"]: one for one in case.find() if one["kind"] == "rematch"}
    assert len(matched) >= 36
    assert all(case.row_caption[one["partner_row"]] == row for row, one in matched.items())
    assert all(0.5 <= one["probability"] <= 0.901 for one in matched.values())


def test_captions_that_fit_nothing_are_not_matched() -> None:
    case, draw = Case(), np.random.default_rng(1)
    case.caption[50:90] = unit(draw.normal(size=(40, DIM)))
    case.noise[50:90] = 0.97
    assert told(case.find(), "rematch") == {}


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_the_best_of_each_other_against_the_whole_table(num_images, num_captions, seed):
    """Few distinct vectors, so that there are ties: the first of equally close ones counts, across tiles as within."""
    draw = np.random.default_rng(seed)
    image, caption = (unit(np.eye(3)[draw.integers(0, 3, num)]) for num in (num_images, num_captions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nc_audit.findings.displaced._TILE", (4, 7))
        best_caption, value, best_image = best_of_each_other(image, caption)
    table = image @ caption.T
    assert best_caption.tolist() == table.argmax(1).tolist()
    assert best_image.tolist() == table.argmax(0).tolist()
    np.testing.assert_array_equal(value, table.max(1))
