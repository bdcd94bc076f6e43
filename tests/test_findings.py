"""Each kind of finding on sets where it is planted, and none of it on sets where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nc_audit.findings import Found, Vectors, dhash, find_all, near, script_of
from nc_audit.findings.displaced import best_of_each_other
from nc_audit.schema import FINDING_KINDS, PAIRS, check_table
from nc_audit.tag import Thresholds, tag_scores

NUM, DIM = 400, 32


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Case:
    """A set of images with one good caption each; tests change its parts before they look for findings."""

    def __init__(self, num: int = NUM, per_image: int = 1, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.image_embedding = draw.normal(size=(num, 64)).astype(np.float32)
        self.image = unit(draw.normal(size=(num, DIM)))
        self.row_image = np.repeat(np.arange(num), per_image)
        rows = num * per_image
        self.caption = unit(self.image[self.row_image] + 0.12 * draw.normal(size=(rows, DIM)))
        self.row_caption = np.arange(rows)
        self.noise = np.full(rows, 0.02)
        self.captions: list[str | None] = [f"a drawn picture of thing {row}" for row in range(rows)]
        self.names = [f"images/{image}.png" for image in self.row_image.tolist()]
        self.splits: list[str | None] = [None] * rows
        self.status = ["ok"] * rows
        self.hashes = dict(enumerate(draw.integers(0, 2**63, num).tolist()))

    def pairs(self) -> pa.Table:
        values: dict[str, list[Any]] = {
            "row": list(range(len(self.names))),
            "pair_id": [f"p{row}" for row in range(len(self.names))],
            "image": self.names,
            "caption": self.captions,
            "split": self.splits,
            "source": ["captions.csv"] * len(self.names),
            "status": self.status,
        }
        return pa.table(
            [pa.array(values.get(f.name, [None] * len(self.names)), f.type) for f in PAIRS], schema=PAIRS
        )

    def find(self, image_rank: np.ndarray | None = None, is_cut: Sequence[bool] = ()) -> list[dict[str, Any]]:
        is_ok = np.array([status == "ok" for status in self.status])
        vectors = Vectors(
            np.where(is_ok, self.row_image, -1),
            np.where(is_ok, self.row_caption, -1),
            self.image_embedding,
            self.image,
            self.caption,
            np.where(is_ok, self.noise, np.nan),
        )
        rank = np.ones(len(self.names), np.int64) if image_rank is None else image_rank
        found = find_all(self.pairs(), vectors, rank, self.hashes.get, is_cut)
        assert not found.capped
        return check_table("findings", found.table(self.pairs())).to_pylist()


def told(findings: Sequence[dict[str, Any]], kind: str) -> dict[int, str]:
    return {one["row"]: one["detail"] for one in findings if one["kind"] == kind}


def test_nothing_is_found_in_a_set_without_faults() -> None:
    assert Case().find() == []


def test_nothing_is_found_in_an_empty_set() -> None:
    case = Case(1)
    case.status = ["missing_image"]
    assert case.find() == []


def test_equal_images_under_two_names_leak_and_contradict() -> None:
    case = Case()
    case.row_image[7] = case.row_image[2]
    case.splits = ["train"] * NUM
    case.splits[7] = "test"
    case.caption[7] = -case.caption[2]
    found = case.find()
    assert told(found, "duplicate_image") == {7: "image equals images/2.png (row 2)"}
    assert told(found, "leakage") == {
        2: "image equals images/7.png (row 7), which is in split test, this row in train",
        7: "image equals images/2.png (row 2), which is in split train, this row in test",
    }
    assert told(found, "contradicting_captions") == {
        2: "image equals images/7.png (row 7), whose captions disagree",
        7: "image equals images/2.png (row 2), whose captions disagree",
    }


def test_equal_images_whose_captions_agree_do_not_contradict() -> None:
    case = Case()
    case.row_image[7], case.caption[7] = case.row_image[2], case.caption[2]
    assert told(case.find(), "contradicting_captions") == {}


def test_images_that_look_the_same_need_embedding_and_hash() -> None:
    case = Case()
    for copy, original in ((10, 3), (20, 4)):
        case.image_embedding[copy] = case.image_embedding[original] + 0.01
    case.hashes[10] = case.hashes[3] ^ 0b101
    found = case.find()
    assert told(found, "near_duplicate_image") == {
        3: "image looks like images/10.png (row 10)",
        10: "image looks like images/3.png (row 3)",
    }


def test_an_image_that_cannot_be_read_is_nobodys_copy() -> None:
    case = Case()
    case.image_embedding[10] = case.image_embedding[3]
    del case.hashes[10]
    assert told(case.find(), "near_duplicate_image") == {}


def test_placeholders_and_copied_captions() -> None:
    case = Case()
    case.row_image[100:112] = 100
    case.row_caption[200:215] = 200
    found = case.find()
    assert told(found, "placeholder_image") == dict.fromkeys(
        range(100, 112), "image carries 12 different captions"
    )
    assert told(found, "copied_caption") == dict.fromkeys(range(200, 215), "caption also on 14 other images")


@pytest.mark.parametrize(
    ("caption", "kind", "detail"),
    [
        ("https://example.org/a.jpg", "file_name_caption", "caption is a URL"),
        ("DSC_0012.JPG", "file_name_caption", "caption is a file name"),
        ("img_0231", "file_name_caption", "caption is a file name"),
        ("house.", "short_caption", "caption is a single word"),
        ("пять красных домов", "other_script", "caption is in Cyrillic, 399 others are in Latin"),
        ("一座红色的房子", "other_script", "caption is in Cjk, 399 others are in Latin"),
        (
            "zwei Flugzeuge stehen auf dem Rollfeld",
            "other_script",
            "caption is in German, 399 others are in English",
        ),
        ("un avion est sur la piste", "other_script", "caption is in French, 399 others are in English"),
        ("un avión está en la pista", "other_script", "caption is in Spanish, 399 others are in English"),
        ("um avião está na pista", "other_script", "caption is in Portuguese, 399 others are in English"),
        (
            "twee vliegtuigen op het platform",
            "other_script",
            "caption is in Dutch, 399 others are in English",
        ),
        ("due aerei sono sulla pista", "other_script", "caption is in Italian, 399 others are in English"),
    ],
)
def test_captions_that_are_none(caption: str, kind: str, detail: str) -> None:
    case = Case()
    case.captions[5] = caption
    found = case.find()
    assert told(found, kind) == {5: detail}
    assert {one["kind"] for one in found} == {kind}


def test_empty_captions_are_told_by_their_status() -> None:
    case = Case()
    case.captions[5], case.status[5] = "  ", "empty_caption"
    case.captions[6], case.status[6] = None, "missing_caption"
    assert told(case.find(), "empty_caption") == {5: "caption is empty", 6: "caption is missing"}


def test_a_set_in_two_scripts_has_no_other_script() -> None:
    case = Case()
    case.captions[::3] = ["дом у реки"] * len(case.captions[::3])
    assert told(case.find(), "other_script") == {}


@pytest.mark.parametrize(
    "caption", ["the die and der Bus", "rio de la plata", "los angeles airport", "de luxe hotel"]
)
def test_foreign_words_make_no_other_language(caption: str) -> None:
    case = Case()
    case.captions[5] = caption
    assert told(case.find(), "other_script") == {}


def test_a_set_in_two_languages_or_of_few_captions_has_no_other_one() -> None:
    case = Case()
    case.captions[::3] = ["zwei Häuser an einem Fluss und der Wald"] * len(case.captions[::3])
    assert told(case.find(), "other_script") == {}
    case = Case(15)
    case.captions[3] = "zwei Häuser an einem Fluss und der Wald"
    assert told(case.find(), "other_script") == {}


def test_rows_whose_caption_the_encoder_cuts_are_listed() -> None:
    case = Case()
    case.row_caption[7] = case.row_caption[2]
    case.status[9] = "missing_image"
    cut = [caption in (2, 9, 30) for caption in range(NUM)]
    assert told(case.find(is_cut=cut), "cut_caption") == dict.fromkeys(
        (2, 7, 30), "caption is longer than the encoder reads"
    )


def test_generic_captions_are_those_of_pairs_that_look_right() -> None:
    case, rank = Case(), np.ones(NUM, np.int64)
    rank[[3, 4]], case.noise[4] = 101, 0.9
    assert told(case.find(rank), "generic_caption") == {3: "generic: 100 other images fit the caption better"}


def test_a_noisy_caption_unlike_the_images_others() -> None:
    case = Case(per_image=4)
    case.caption[9], case.noise[9] = case.caption[900], 0.9
    case.noise[13] = 0.9
    assert told(case.find(), "disagrees") == {9: "disagrees with the image's other captions"}


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


@given(st.text(max_size=40))
def test_any_caption_is_looked_at(caption: str) -> None:
    case = Case(4)
    case.captions[0] = caption
    assert all(one["row"] == 0 or one["kind"] != "short_caption" for one in case.find())
    script = script_of(caption)
    assert (script is not None) == any(letter.isalpha() for letter in caption)


def test_the_hash_survives_rescaling_and_tells_mirror_images_apart() -> None:
    ramp = np.add.outer(np.sin(np.arange(90) / 7) * 40, np.arange(120) ** 2 / 150) + 60
    image = Image.fromarray(ramp.astype(np.uint8))
    scaled = dhash(image.resize((64, 48)))
    assert (dhash(image) ^ scaled).bit_count() <= 26
    assert (dhash(image) ^ dhash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))).bit_count() > 64


def test_capped_searches_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "WHOLE_SEARCH", 100)
    monkeypatch.setattr(near, "CELL", 40)
    case = Case()
    case.image_embedding[10] = case.image_embedding[3]
    case.hashes[10] = case.hashes[3]
    found = Found()
    read: Callable[[int], int | None] = case.hashes.get
    assert near.near_duplicates(case.image_embedding, read, found) == [(3, 10)]
    assert found.capped == [
        "near-duplicate images: 400 images, each compared with those of the 3 cells that it is next to"
    ]


def test_every_kind_has_a_severity() -> None:
    assert {severity for severity, _ in FINDING_KINDS.values()} == {"warn", "info"}


def test_tags_take_reasons_and_rematches_from_the_findings() -> None:
    from test_tag import tables

    probability = np.array([0.01, 0.95, 0.95])
    scores, pairs = tables(probability, caption_rank=np.array([1, 9, 9]), image_rank=np.array([1, 8, 8]))
    found = Found()
    found.add("copied_caption", 0, "caption also on 57 other images")
    found.add("copied_caption", 1, "caption also on 57 other images")
    found.add("leakage", 0, "image equals b.png (row 9), which is in split test, this row in train", 9)
    found.add("rematch", 1, "the caption of row 2 fits the image", 2, 0.75)
    tags = tag_scores(scores, pairs, Thresholds(0.2, 0.8), findings=found.table(pairs))
    assert tags["reasons"].to_pylist() == [
        ["image equals b.png (row 9), which is in split test, this row in train"],
        [
            "8 other captions fit the image better",
            "7 other images fit the caption better",
            "caption also on 57 other images",
            "the caption of row 2 fits the image",
        ],
        ["8 other captions fit the image better", "7 other images fit the caption better"],
    ]
    assert tags["rematch_row"].to_pylist() == [None, 2, None]
    assert tags["rematch_probability"].to_pylist() == [None, 0.75, None]


@pytest.mark.parametrize(
    ("hashed", "proposed", "dense"),
    [(1000, 10_000, 1), (12, 10_000, 1), (1000, 30, 1), (0, 10_000, 1), (1000, 10_000, 0), (1000, 30, 0)],
)
def test_near_duplicates_against_a_slow_reference(monkeypatch, hashed, proposed, dense):
    """An encoder that sees little proposes most pairs; the closest are compared, up to the limits."""
    monkeypatch.setattr(near, "HASHED", hashed)
    monkeypatch.setattr(near, "HASHED_SHARE", 0)
    monkeypatch.setattr(near, "_PROPOSED", proposed)
    monkeypatch.setattr(near, "_AT_ONCE", 7)
    monkeypatch.setattr(near, "_TILE", (6, 9))
    monkeypatch.setattr(near, "_DENSE", dense)
    draw = np.random.default_rng(3)
    vectors = draw.normal(size=(40, 6)).astype(np.float32)
    vectors[:30] = vectors[:3].repeat(10, 0) + 0.1 * draw.normal(size=(30, 6)).astype(np.float32)
    hashes = [int.from_bytes(draw.bytes(2), "big") << 240 for _ in range(40)]
    hashes[5:9] = [hashes[5] ^ (1 << bit) for bit in range(4)]

    def read(image: int) -> int | None:
        return None if image == 8 else hashes[image]

    centred = vectors - vectors.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    close = sorted(
        (-float(centred[a] @ centred[b]), a, b)
        for a in range(40)
        for b in range(a + 1, 40)
        if centred[a] @ centred[b] >= near.NEAR_COSINE
    )
    expected, seen = [], set()
    for _, a, b in close[:proposed]:
        if len(seen | {a, b}) > hashed:
            break
        seen |= {a, b}
        if None not in (read(a), read(b)) and (hashes[a] ^ hashes[b]).bit_count() <= near.NEAR_BITS:
            expected.append((a, b))
    found = Found()
    assert near.near_duplicates(vectors, read, found) == sorted(expected)
    assert len(close) > 100
    assert len(found.capped) == (hashed < 40) + (proposed < 100)


@pytest.mark.parametrize("dense", [0, 1])
def test_cells_find_what_a_search_of_all_finds_each_pair_once(monkeypatch, dense):
    """Near-duplicates among 3,000 images of 40 kinds, sought in 30 cells of which each image is in three."""
    monkeypatch.setattr(near, "_DENSE", dense)
    draw = np.random.default_rng(5)
    kinds = draw.normal(size=(40, 48))[draw.integers(0, 40, 3000)]
    vectors = (kinds + draw.normal(size=(3000, 48))).astype(np.float32)
    vectors[2000:2400] = vectors[:400] + 0.3 * draw.normal(size=(400, 48))
    whole = np.stack(near._closest(near._Centred.of(vectors), Found()), 1)
    monkeypatch.setattr(near, "WHOLE_SEARCH", 1000)
    monkeypatch.setattr(near, "CELL", 100)
    found = Found()
    by_cells = np.stack(near._closest(near._Centred.of(vectors), found), 1)
    assert len(found.capped) == 1
    assert len(whole) >= 400
    among_all, seen = {tuple(pair) for pair in whole.tolist()}, [tuple(pair) for pair in by_cells.tolist()]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= among_all
    assert len(seen) >= 0.95 * len(among_all)


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
