"""Words that their images look unlike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from finding_case import Case, told

from nc_audit.unlikely_words import FEWEST_IMAGES, FEWEST_SAID, UnlikelyWords, WordMaps

THINGS = ["lake", "airport", "stadium", "forest", "bridge", "harbor", "desert", "school"]
NUM = 600


def seen_case(per_image: int = 1, seed: int = 0) -> tuple[Case, np.ndarray]:
    """Images of eight things, which the embedding shows and every caption names, with small talk around it."""
    draw = np.random.default_rng(seed)
    case = Case(NUM, per_image)
    thing = np.arange(NUM) % len(THINGS)
    means = 2 * draw.normal(size=(len(THINGS), 64))
    case.image_embedding = (means[thing] + draw.normal(size=(NUM, 64))).astype(np.float32)
    talk = ["large", "small", "old", "plain", "quiet", "busy"]
    case.captions = [
        f"a {talk[draw.integers(6)]} {THINGS[thing[image]]} {row} is seen"
        for row, image in enumerate(case.row_image.tolist())
    ]
    return case, thing


def odd(case: Case) -> dict[int, str]:
    return told(case.find(), "unlikely_word")


def put(case: Case, row: int, word: str) -> None:
    caption = case.captions[row]
    assert caption is not None
    case.captions[row] = " ".join(word if one in THINGS else one for one in caption.split())


@pytest.mark.parametrize("per_image", [1, 3])
def test_a_word_that_the_image_does_not_show_is_named(per_image):
    case, _ = seen_case(per_image)
    put(case, 7, "harbor")
    put(case, 98, "Bridges")
    assert set(odd(case)) == {7, 98}
    assert odd(case) == {
        row: f'unlikely word: "{word}", said of 75 images that look unlike this one'
        for row, word in ((7, "harbor"), (98, "bridges"))
    }


def test_right_captions_have_none():
    for seed in range(3):
        assert odd(seen_case(seed=seed)[0]) == {}


def test_a_word_that_another_caption_of_the_image_says_is_not_named():
    case, _ = seen_case(3)
    put(case, 21, "harbor")
    put(case, 22, "harbors")
    put(case, 30, "lake")
    assert set(odd(case)) == {30}


def test_rows_that_repeat_a_pair_are_all_told():
    case, _ = seen_case(2)
    put(case, 20, "harbor")
    case.captions[21] = case.captions[20]
    case.row_caption[21] = case.row_caption[20]
    assert set(odd(case)) == {20, 21}


def test_pairs_that_are_likely_noise_or_not_ok_have_none_and_teach_nothing():
    case, thing = seen_case()
    draw = np.random.default_rng(0)
    for row in range(0, NUM, 2):  # half of the set says what it does not show
        put(case, row, THINGS[(thing[row] + draw.integers(1, len(THINGS))) % len(THINGS)])
    case.noise[::2] = 0.97
    put(case, 7, "harbor")
    case.status[11] = "missing_image"
    put(case, 11, "stadium")
    assert set(odd(case)) == {7}


def test_the_least_likely_of_several_words_is_named_once():
    case, _ = seen_case()
    case.captions[7] = "a lake and a forest 7 is seen"
    found = [one for one in case.find() if one["kind"] == "unlikely_word"]
    assert [one["row"] for one in found] == [7]


def test_rare_words_and_small_sets_are_left_alone():
    case, _ = seen_case()
    for row in range(3 * FEWEST_SAID):
        put(case, 8 * row, "volcano")
    put(case, 7, "volcano")
    assert set(odd(case)) == {7}
    case, _ = seen_case()
    for row in range(FEWEST_SAID - 2):
        put(case, 8 * row, "volcano")
    put(case, 7, "volcano")
    assert odd(case) == {}
    put(case, 9, "harbor")
    assert not first_of(case, FEWEST_IMAGES - 1).ratio_N.any()


def first_of(case: Case, num: int) -> UnlikelyWords:
    captions = [caption or "" for caption in case.captions[:num]]
    both = case.row_image[:num], case.row_caption[:num]
    return WordMaps(case.image_embedding[:num], *both, captions, 1 - case.noise[:num]).given


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_images_that_all_look_alike_tell_nothing(value):
    case, _ = seen_case()
    case.image_embedding = np.full((NUM, 64), value, np.float32)
    assert not first_of(case, NUM).is_named.any()


def test_what_is_found_is_that_of_a_slow_reckoning():
    case = littered(4)
    said, ratio = slowly(case)
    odd_rows = {
        row
        for row, image in enumerate(case.row_image.tolist())
        if any(value <= -8 for value in alone(case, said, ratio, row, image, row))
    }
    assert odd(case).keys() == odd_rows
    assert odd_rows


def test_half_precision_is_taken_for_what_it_stands_for():
    case = littered(2)
    case.image_embedding = case.image_embedding.astype(np.float16)
    half = maps_of(case).given
    case.image_embedding = case.image_embedding.astype(np.float32)
    full = maps_of(case).given
    np.testing.assert_array_equal(half.total_N, full.total_N)
    assert half.total_N.any()


@pytest.mark.parametrize("seed", range(3))
def test_given_pairs_and_swaps_are_asked_alike(seed):
    """All words and the least likely one, against sums written out; a swap has all but one caption beside it."""
    case = littered(seed)
    said, ratio = slowly(case)
    maps = maps_of(case)
    num = len(case.captions)
    for row, image in enumerate(case.row_image.tolist()):
        tolds = alone(case, said, ratio, row, image, row)
        assert maps.given.total_N[row] == pytest.approx(weight(tolds), abs=1e-3)
        assert maps.given.ratio_N[row] == pytest.approx(min([*tolds, 0.0]), abs=2e-3)
    images = np.random.default_rng(seed).integers(NUM, size=num)
    swaps = maps.swaps(images, np.arange(num), seed)
    seen = [0, 0]
    for row, image in enumerate(images.tolist()):
        places = np.flatnonzero(case.row_image == image).tolist()
        choices = [weight(alone(case, said, ratio, row, image, place)) for place in places]
        assert min(abs(swaps.total_N[row] - one) for one in choices) < 1e-3
        if abs(choices[0] - choices[1]) > 1e-2:
            seen[int(abs(swaps.total_N[row] - choices[1]) < 1e-3)] += 1
    assert min(seen) > 0, "either caption makes room"
    assert swaps.total_N.mean() > 5 * maps.given.total_N.mean()
    np.testing.assert_array_equal(swaps.total_N, maps.swaps(images, np.arange(num), seed).total_N)
    assert (swaps.least <= swaps.total_N + 1e-6).all()
    np.testing.assert_allclose(swaps.least, np.sqrt(np.minimum(-swaps.ratio_N, 12)), rtol=1e-6)


def test_captions_of_an_image_vouch_for_each_other_unless_all_of_them_may_be_wrong():
    case, _ = seen_case(3)
    for row in range(21, 24):
        put(case, row, "harbor")
    believed = maps_of(case).given
    case.noise[21:24] = 0.97
    doubted = maps_of(case).given
    case.noise[22:24] = 0.4
    heard = maps_of(case).given
    assert (believed.total_N[21:24] < 1).all()
    assert (heard.total_N[21:24] < 1).all()
    assert (doubted.ratio_N[21:24] < -8).all()
    assert doubted.is_shared_N[21:24].all(), "not a word for people to look at"
    assert not doubted.is_named[21:24].any()
    np.testing.assert_allclose(doubted.total_N[:21], believed.total_N[:21], atol=0.5)


def littered(seed: int) -> Case:
    """Two captions to an image, forty of them with the name of another thing."""
    case, _ = seen_case(2, seed=seed)
    draw = np.random.default_rng(seed + 1)
    for row in draw.integers(0, 2 * NUM, 40).tolist():
        put(case, row, THINGS[draw.integers(len(THINGS))])
    return case


def maps_of(case: Case) -> WordMaps:
    captions = [caption or "" for caption in case.captions]
    return WordMaps(case.image_embedding, case.row_image, case.row_caption, captions, 1 - case.noise)


def weight(ratios: Sequence[float]) -> float:
    return sum(min(max(-one, 0.0), 12.0) ** 0.5 for one in ratios)


def alone(
    case: Case, said: dict[str, np.ndarray], ratio: dict[str, np.ndarray], row: int, image: int, place: int
) -> list[float]:
    """Ratios at an image of the words of a row that no caption of the image says, but for one that makes room."""
    beside = [one for one in np.flatnonzero(case.row_image == image).tolist() if one != place]
    return [ratio[word][image] for word in ratio if said[word][row] and not said[word][beside].any()]


def slowly(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Which rows say each word, and its log ratio at each image, by formulas written out.

    Every word for itself: maps without the image's fold, two normal curves, one width.
    """
    captions: Sequence[str | None] = case.captions
    embedding = case.image_embedding.astype(np.float64)
    centred = embedding - embedding.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    along = np.c_[centred @ directions.T / (values / np.sqrt(NUM)), np.ones(NUM)]
    fold = np.random.default_rng(0).permutation(NUM) % 5
    rows_of = [np.flatnonzero(case.row_image == image).tolist() for image in range(NUM)]
    said: dict[str, np.ndarray] = {}
    ratio: dict[str, np.ndarray] = {}
    for word in {word for caption in captions for word in (caption or "").split() if word not in ("a", "is")}:
        says = np.array([word in (caption or "").split() for caption in captions])
        share = np.array([says[rows].mean() for rows in rows_of])
        if says.mean() > 0.25 or (share > 0).sum() < FEWEST_SAID:
            continue
        like = np.empty(NUM)
        for one in range(5):
            others = fold != one
            ridge = np.diag([0.1 * NUM] * 64 + [1e-9])
            weights = np.linalg.solve(
                along[others].T @ along[others] + ridge, along[others].T @ share[others]
            )
            like[~others] = along[~others] @ weights
        positive, negative = like[share > 0], like[share == 0]
        width = (((positive - positive.mean()) ** 2).sum() + ((negative - negative.mean()) ** 2).sum()) / NUM
        middle = (positive.mean() + negative.mean()) / 2
        said[word] = says
        ratio[word] = (like - middle) * max(positive.mean() - negative.mean(), 0) / width
    return said, ratio
