"""Images that look the same: what is proposed, what the hash confirms, and in how large a set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from finding_case import Case
from PIL import Image

from nc_audit.findings import Found, dhash, near


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


def test_half_precision_is_taken_for_what_it_stands_for() -> None:
    case = Case()
    case.image_embedding[10] = case.image_embedding[3] + 0.1 * case.image_embedding[4]
    half, read = case.image_embedding.astype(np.float16), case.hashes.get
    case.hashes[10] = case.hashes[3]
    assert near.near_duplicates(half, read, Found()) == [(3, 10)]
    full = half.astype(np.float32)
    one, other = (near._closest(near._Centred.of(some), Found()) for some in (half, full))
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("hashed", "proposed", "dense", "fruitless"),
    [
        (1000, 10_000, 1, 1000),
        (12, 10_000, 1, 1000),
        (1000, 30, 1, 1000),
        (0, 10_000, 1, 1000),
        (1000, 10_000, 0, 1000),
        (1000, 30, 0, 1000),
        (1000, 10_000, 1, 9),
        (12, 10_000, 1, 4),
        (1000, 10_000, 1, 2),
    ],
)
def test_near_duplicates_against_a_slow_reference(monkeypatch, hashed, proposed, dense, fruitless):
    """An encoder that sees little proposes most pairs; the closest are compared, up to the limits."""
    monkeypatch.setattr(near, "FRUITLESS", fruitless)
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
    hashes[10:30:2] = [int.from_bytes(draw.bytes(32), "big") for _ in range(10)]  # like nothing else
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
    expected, seen, num_before, is_fruitful, is_all = [], set(), 0, False, True
    for _, a, b in close[:proposed]:
        is_all = len(seen | {a, b}) <= hashed
        if not is_all:
            break
        if len(seen | {a, b}) > num_before + fruitless:
            is_all = is_fruitful
            if not is_fruitful:
                break
            num_before, is_fruitful = len(seen), False
        seen |= {a, b}
        if None not in (read(a), read(b)) and (hashes[a] ^ hashes[b]).bit_count() <= near.NEAR_BITS:
            expected.append((a, b))
            is_fruitful = True
    asked = []
    found = Found()
    pairs = near.near_duplicates(vectors, lambda image: asked.append(image) or read(image), found)
    assert pairs == sorted(expected)
    assert sorted(asked) == sorted(seen)
    assert len(close) > 100
    assert len(found.capped) == (not is_all) + (proposed < 100)
    assert is_all == (hashed == 1000 and fruitless > 4)


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
