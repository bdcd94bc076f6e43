"""Identity by content: what counts as one caption, one pair; and that the order of rows changes nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.dataset import content_id, fold, normalise_caption
from nc_audit.dataset.ids import says_nothing
from nc_audit.dataset.rows import captions_of, family_of, flag_of, split_named_by

PARTS = st.lists(st.one_of(st.text(max_size=5), st.binary(max_size=5)), max_size=4)


@given(PARTS, PARTS)
def test_content_ids_collide_only_for_equal_lists(one, other):
    is_same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (content_id(*one) == content_id(*other)) == is_same


def test_content_id_is_pinned():
    assert content_id("a", b"b") == "4349ff95c078e08ebc40803e5be32ae4"  # SHA-256 of s1:ab1:b
    assert len(content_id()) == 32


@pytest.mark.parametrize(
    ("caption", "normal"),
    [
        ("  Many planes\tare parked .\n", "many planes are parked"),
        ("Many planes are parked.", "many planes are parked"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("ﬁeld １２", "field 12"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("田んぼ。 本当？", "田んぼ 本当"),
        ("wait… what?!", "wait what"),
        ("a,b", "a,b"),
        ("...", ""),
    ],
)
def test_normalise_caption(caption, normal):
    assert normalise_caption(caption) == normal


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(caption):
    once = normalise_caption(caption)
    assert normalise_caption(once) == once
    assert normalise_caption(f" {caption} . ") == once


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("", True), (" \u200b\ufeff", True), ("?! —_", True), ("田", False), ("🌊", False), ("7", False)],
)
def test_says_nothing(caption, expected):
    assert says_nothing(caption) is expected


def test_cells():
    assert captions_of([]) == [None]
    assert captions_of(float("nan")) == [None]
    assert captions_of([{"caption": "x"}, {"tokens": ["a", "b"]}, {"other": 1}]) == ["x", "a b", None]
    flags = {True: True, 0: False, "1": True, "No": False, 0.37: None, None: None, "x": None}
    assert {value: flag_of(value) for value in flags} == flags
    assert flag_of(1.0) is True


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("captions_val2014.json", "val"),
        ("rsicd_test.csv", "test"),
        ("validation/metadata.csv", "validation"),
        ("latest.csv", None),
        ("values.csv", None),
        ("dataset_rsicd.json", None),
    ],
)
def test_split_named_by(path, split):
    assert split_named_by(path) == split


def test_families():
    assert family_of("test/metadata.csv") == family_of("train/metadata.csv")
    assert family_of("dataset_coco.json") != family_of("dataset_flickr8k.json")


@st.composite
def tables(draw):
    """Rows as `load_pairs` makes them, over few images and captions, so that copies occur."""
    captions = st.sampled_from(["A b.", "a b", "a  B", "c", "Ü d", "ü d"])
    row = st.tuples(st.integers(0, 3), captions, st.booleans(), st.integers(0, 1))
    rows = draw(st.lists(row, max_size=25))
    return [
        {
            "image_id": content_id(bytes([image])),
            "caption_id": content_id(normalise_caption(caption)),
            "pair_id": content_id(content_id(bytes([image])), content_id(normalise_caption(caption))),
            "image_uri": f"dataset:{copy}/{image}.png",
            "caption": caption,
            "status": "ok" if is_ok else "corrupt_image",
        }
        for image, caption, is_ok, copy in rows
    ]


SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("image_id", "caption_id", "pair_id", "image_uri", "caption", "status")]
)


def of_rows(rows) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA)


@given(tables(), st.randoms(use_true_random=False))
def test_fold_depends_neither_on_order_nor_on_copies(rows, random):
    folded = fold(of_rows(rows))
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = fold(pa.concat_tables([of_rows([rows[at]]) for at in order]) if rows else of_rows([]))
    doubled = fold(of_rows(rows + rows))
    for other in (shuffled, doubled):
        for name in ("image_ids", "image_uris", "caption_ids", "captions", "pair_ids"):
            assert getattr(other, name) == getattr(folded, name)
        assert np.array_equal(other.pair_image, folded.pair_image)
        assert np.array_equal(other.pair_caption, folded.pair_caption)
    assert shuffled.row_pair.tolist() == [folded.row_pair[at] for at in order]


@given(tables())
def test_fold_points_every_ok_row_at_its_own_pair(rows):
    folded = fold(of_rows(rows))
    assert folded.image_ids == sorted(set(folded.image_ids))
    assert folded.caption_ids == sorted(set(folded.caption_ids))
    assert folded.pair_ids == sorted(set(folded.pair_ids))
    assert folded.row_pair.dtype == folded.pair_image.dtype == folded.pair_caption.dtype == np.int64
    for row, pair in zip(rows, folded.row_pair.tolist(), strict=True):
        assert (pair >= 0) == (row["status"] == "ok")
        if pair >= 0:
            assert folded.pair_ids[pair] == row["pair_id"]
            assert folded.image_ids[folded.pair_image[pair]] == row["image_id"]
            assert folded.caption_ids[folded.pair_caption[pair]] == row["caption_id"]
            copies = [other for other in rows if other["status"] == "ok"]
            smallest = min(other["caption"] for other in copies if other["caption_id"] == row["caption_id"])
            assert folded.captions[folded.pair_caption[pair]] == smallest
            uri = min(other["image_uri"] for other in copies if other["image_id"] == row["image_id"])
            assert folded.image_uris[folded.pair_image[pair]] == uri


def test_fold_of_nothing():
    folded = fold(of_rows([]))
    assert (folded.image_ids, folded.captions, folded.pair_ids, folded.row_pair.tolist()) == ([], [], [], [])
