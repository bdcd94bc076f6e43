from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.bench.classes import classes_of_names
from nc_audit.bench.inject import KINDS, MAX_RATE, fold_rows, inject
from nc_audit.dataset import load_pairs, normalise_caption
from nc_audit.errors import RecipeError

EXCHANGES = ("caption", "image", "class", "block", "mixture")
RATES = st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.6, 0.8, MAX_RATE])
UCM = Path(__file__).parents[2] / ".." / "shared" / "data" / "ucm_captions"


@st.composite
def clean_rows(draw):
    """Rows of images with one to five captions, some of which other images carry too, in any order, folded."""
    common = [f"Some {thing} here." for thing in ("trees", "houses", "boats", "roads")]
    rows = []
    for image in range(draw(st.integers(1, 14))):
        for number in range(draw(st.integers(1, 5))):
            own = f"scene {image} has thing number {number} in view"
            rows.append((image, draw(st.sampled_from([own, own, own, *common]))))
    if draw(st.booleans()):
        rows = draw(st.permutations(rows))
    kept = [rows[at] for at in fold_rows(*zip(*rows, strict=True))]
    return [image for image, _ in kept], [caption for _, caption in kept]


def classes_for(images):
    return [image % 3 for image in range(max(images) + 1)]


def truth(images, old, found):
    """Which rows are noisy, by looking at every row for every row."""
    return [
        not any(
            other == image and normalise_caption(kept) == normalise_caption(caption)
            for other, kept in zip(images, old, strict=True)
        )
        for image, caption in zip(found.image_N.tolist(), found.captions, strict=True)
    ]


def plain_set(num_images=400, per_image=5):
    images = np.repeat(np.arange(num_images), per_image).tolist()
    words = ["many", "green", "trees", "stand", "around", "the", "large", "square", "of"]
    seen = ["lake", "farm", "port", "beach", "forest", "stadium", "bridge"]
    captions = [
        f"{' '.join(words[: 3 + row % 6])} {seen[image % 7]} place {image} {row}"
        for row, image in enumerate(images)
    ]
    return images, captions


@given(clean_rows(), st.sampled_from(KINDS), RATES, st.integers(0, 5))
def test_the_truth_is_that_of_the_captions_and_the_result_repeats(rows, kind, rate, seed):
    images, captions = rows
    found = inject(images, captions, kind, rate, seed, classes_for(images))
    assert found.known_noise.tolist() == truth(images, captions, found)
    moved = found.image_N != np.array(images)
    other = np.array([a != b for a, b in zip(captions, found.captions, strict=True)])
    assert (found.changed == (moved | other)).all()
    assert not moved.any() or kind in ("image", "mixture")
    assert not (found.known_noise & ~found.changed).any()
    again = inject(images, captions, kind, rate, seed, classes_for(images))
    assert (again.captions, again.donor.tolist()) == (found.captions, found.donor.tolist())


@given(clean_rows(), st.sampled_from(KINDS), RATES, st.integers(0, 5))
def test_a_caption_comes_from_its_donor_and_no_more_rows_change_than_were_chosen(rows, kind, rate, seed):
    images, captions = rows
    found = inject(images, captions, kind, rate, seed, classes_for(images))
    for row, donor in enumerate(found.donor.tolist()):
        if kind == "truncated":
            assert donor == row
            assert captions[row].startswith(found.captions[row])
        elif kind == "word":
            assert donor == row
        else:
            assert found.captions[row] == captions[donor]
    if kind not in ("image", "mixture"):
        assert found.changed.sum() <= round(rate * len(captions))


@given(clean_rows(), st.sampled_from(KINDS), st.integers(0, 5))
def test_no_noise_changes_nothing(rows, kind, seed):
    images, captions = rows
    found = inject(images, captions, kind, 0.0, seed, classes_for(images))
    assert found.captions == captions
    assert not found.known_noise.any()
    assert found.donor.tolist() == list(range(len(captions)))


@given(clean_rows(), st.sampled_from(EXCHANGES), RATES, st.integers(0, 5))
def test_exchanges_keep_every_caption(rows, kind, rate, seed):
    images, captions = rows
    found = inject(images, captions, kind, rate, seed, classes_for(images))
    assert Counter(found.captions) == Counter(captions)
    assert sorted(found.donor.tolist()) == list(range(len(captions)))


@given(clean_rows(), RATES, st.integers(0, 5))
def test_image_noise_moves_whole_images(rows, rate, seed):
    images, captions = rows
    found = inject(images, captions, "image", rate, seed)
    assert found.captions == captions
    before, moved = np.array(images), 0
    for image in set(images):
        givers = set(before[found.image_N == image].tolist())
        assert len(givers) == 1, "an image carries the captions of one image"
        assert (found.image_N[before == givers.pop()] == image).all(), "and all of them"
        moved += bool((found.image_N[before == image] != image).any())
    assert moved <= round(rate * len(set(images)))


@given(clean_rows(), RATES, st.integers(0, 5))
def test_class_noise_stays_within_the_class(rows, rate, seed):
    images, captions = rows
    classes = np.array(classes_for(images)) - 1
    found = inject(images, captions, "class", rate, seed, classes.tolist())
    class_N = classes[images]
    assert (class_N[found.donor] == class_N).all()
    assert not found.changed[class_N < 0].any()


@given(clean_rows(), RATES, st.integers(0, 5))
def test_block_noise_is_one_run_shifted_by_a_constant(rows, rate, seed):
    images, captions = rows
    found = inject(images, captions, "block", rate, seed)
    moved = np.flatnonzero(found.donor != np.arange(len(captions)))
    if len(moved):
        assert (np.diff(moved) == 1).all()
        assert len(moved) == round(rate * len(captions))
        assert len(set(((found.donor[moved] - moved) % len(moved)).tolist())) == 1


@given(clean_rows(), st.sampled_from(["caption", "donor", "class", "word"]), st.integers(0, 5))
def test_rows_chosen_at_a_lower_rate_are_chosen_at_a_higher_one(rows, kind, seed):
    images, captions = rows
    if kind == "donor" and len(set(captions)) == 1:
        return
    few, many = (inject(images, captions, kind, rate, seed, classes_for(images)) for rate in (0.3, 0.7))
    own = np.arange(len(captions))
    if kind == "word":
        assert (few.changed <= many.changed).all()
    assert ((few.donor == own) | (many.donor != own) | ~many.changed).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8])
def test_the_realised_rate_is_the_rate_asked_for(kind, rate):
    images, captions = plain_set()
    found = inject(images, captions, kind, rate, 3, np.arange(400) % 7)
    assert found.known_noise.mean() == pytest.approx(rate, abs=0.002)


def test_no_exchanged_row_keeps_a_caption_of_its_own_image():
    images = [row // 5 for row in range(50)]
    captions = [f"caption {row}" for row in range(50)]
    for seed in range(30):
        for kind in ("caption", "image", "donor", "block"):
            found = inject(images, captions, kind, 0.4, seed)
            assert found.known_noise.sum() == 20, (kind, seed)
            assert (found.known_noise == found.changed).all()


def test_captions_that_many_images_carry_are_given_to_those_that_do_not():
    images = list(range(40))
    captions = ["many buildings are here"] * 18 + [f"lake number {row}" for row in range(22)]
    for seed in range(20):
        assert inject(images, captions, "caption", 0.95, seed).known_noise.sum() == 38


def test_images_trade_with_any_other_whatever_the_number_of_captions():
    sizes = [1, 1, 1, 2, 2, 2, 2, 3, 5, 5]
    images = np.array([image for image, size in enumerate(sizes) for _ in range(size)])
    captions = [f"caption {row}" for row in range(len(images))]
    counts = np.bincount(images)
    met = set()
    for seed in range(60):
        found = inject(images.tolist(), captions, "image", 0.5, seed)
        moved = found.image_N != images
        assert len(set(images[moved].tolist())) == 5
        met |= set(zip(counts[images[moved]].tolist(), counts[found.image_N[moved]].tolist(), strict=True))
    assert met >= {(1, 5), (5, 1), (2, 3), (3, 2), (1, 2), (2, 2)}


def test_half_of_a_mixture_strikes_whole_images():
    images, captions = plain_set()
    found = inject(images, captions, "mixture", 0.4, 0)
    noisy = np.bincount(found.image_N[found.known_noise], minlength=400)
    assert (noisy == 5).sum() >= 80
    partly = noisy[(noisy > 0) & (noisy < 5)]
    assert partly.sum() == pytest.approx(0.2 * 2000, abs=30)


def test_a_block_slips_past_an_images_own_captions_both_ways():
    images, captions = plain_set(40)
    for seed in range(30):
        assert inject(images, captions, "block", 0.1, seed).known_noise.sum() == 20


def test_truncated_captions_lose_half_of_their_words_or_more():
    images, captions = plain_set()
    found = inject(images, captions, "truncated", 0.5, 0)
    assert found.changed.sum() == 1000
    for row in np.flatnonzero(found.changed):
        kept, had = len(found.captions[row].split()), len(captions[row].split())
        assert 1 <= kept <= had / 2
    kept = [
        len(found.captions[row].split()) / len(captions[row].split()) for row in np.flatnonzero(found.changed)
    ]
    assert min(kept) < 0.3
    assert max(kept) > 0.45


@given(clean_rows(), RATES, st.integers(0, 5))
def test_one_word_of_a_caption_becomes_one_that_its_image_never_has(rows, rate, seed):
    images, captions = rows
    found = inject(images, captions, "word", rate, seed)
    for row in np.flatnonzero(found.changed).tolist():
        old, new = captions[row].split(), found.captions[row].split()
        at = [place for place, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
        assert len(at) == 1
        own = {
            word.lower().strip(".")
            for image, caption in zip(images, captions, strict=True)
            if image == images[row]
            for word in caption.split()
        }
        everywhere = {word.lower().strip(".") for caption in captions for word in caption.split()}
        assert new[at[0]].lower().strip(".") in everywhere - own


def test_a_wrong_word_is_a_content_word_that_follows_the_same_word_elsewhere():
    images = list(range(12))
    kinds = ["lake", "farm", "port", "beach"]
    captions = [f"A photo of a {kinds[image % 4]}, near {image + 2} trucks" for image in images[:8]]
    captions += ["two cars", "Four cars", "beside", "of the"]
    found = {row: set() for row in images}
    for seed in range(60):
        new = inject(images, captions, "word", MAX_RATE, seed).captions
        for row in images:
            found[row].add(new[row])
    assert found[0] == {captions[0].replace("lake", one) for one in kinds[1:]}
    assert {"four cars"} < found[8]
    assert {"Two cars"} < found[9], "a capital stays one"
    assert found[11] == {"of the"}, "function words are left"


def test_inflections_are_no_wrong_words():
    images, captions = [0, 1, 2], ["the tree", "two trees", "ten treetops"]
    for seed in range(20):
        new = inject(images, captions, "word", MAX_RATE, seed).captions
        assert new[0] in ("the two", "the ten")
        assert new[1] != "two tree"
        assert new[2] != "ten tree"


@pytest.mark.parametrize(
    ("caption", "possible"),
    [
        ("a b", {"a"}),
        ("  airport  ", {"  a", "  ai", "  air"}),
        ("two planes .", {"two"}),
        ("一个大型体育场", {"一", "一个", "一个大"}),
        ("...", {"..."}),
        ("x", {"x"}),
        ("", {""}),
    ],
)
def test_a_single_word_is_cut_by_its_characters(caption, possible):
    found = {inject([0], [caption], "truncated", MAX_RATE, seed).captions[0] for seed in range(40)}
    assert found <= possible
    assert len(found) >= min(2, len(possible))


def test_a_cut_caption_that_is_another_of_the_images_own_is_clean():
    found = inject([0, 0], ["A lake. Boats", "a lake"], "truncated", 0.5, 0)
    chosen = int(np.flatnonzero(found.changed)[0])
    if chosen == 0:
        assert found.captions[0] == "A"
    lakes = inject([0, 0, 1], ["a lake", "a", "sea"], "truncated", MAX_RATE, 0)
    assert lakes.captions[0] == "a"
    assert lakes.known_noise.tolist()[0] is False
    assert lakes.changed.tolist()[0] is True


def test_what_cannot_be_moved_stays_clean():
    for kind in ("caption", "image", "donor", "block", "mixture"):
        found = inject([0, 1, 2, 3], ["the same"] * 4, kind, 0.75, 0)
        assert not found.known_noise.any()
    assert not inject([0], ["alone"], "caption", MAX_RATE, 0).changed.any()
    assert inject([], [], "caption", 0.5, 0).captions == []


def test_folding_keeps_the_first_of_equal_captions_of_an_image():
    images = [1, 0, 1, 0, 1]
    captions = ["Trees.", "trees", "trees !", "a road", "A  road"]
    assert fold_rows(images, captions).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "captoin"}, "unknown kind of noise 'captoin' (did you mean caption?)"),
        (
            {"kind": "zz"},
            "unknown kind of noise 'zz' (known: caption, image, donor, class, block, truncated, mixture, "
            "word)",
        ),
        (
            {"rate": 0.96},
            "a noise rate must lie between 0 and 0.95, got 0.96 "
            "(0.2, 0.4, 0.6 and 0.8 are usual; 0 is the control)",
        ),
        (
            {"rate": float("nan")},
            "a noise rate must lie between 0 and 0.95, got nan "
            "(0.2, 0.4, 0.6 and 0.8 are usual; 0 is the control)",
        ),
        (
            {"kind": "class"},
            "noise of kind class needs the class of each image (give classes, or clusters for them)",
        ),
        (
            {"kind": "class", "classes": [0, 1, 1]},
            "3 classes do not match 2 images (give one per image, not per row)",
        ),
        ({"images": [0, 1]}, "2 image indices do not match 3 captions (give one of each per row)"),
    ],
)
def test_what_is_wrong_is_said(change, message):
    asked = {"images": [0, 0, 1], "captions": ["a", "b", "c"], "kind": "caption", "rate": 0.2, "seed": 0}
    with pytest.raises(RecipeError) as caught:
        inject(**(asked | change))
    assert str(caught.value) == message


@pytest.mark.skipif(not UCM.is_dir(), reason="UCM-Captions is not beside the repository")
def test_real_captions_reach_the_rate():
    pairs = load_pairs(UCM).pairs
    names, captions = pairs["image"].to_pylist(), pairs["caption"].to_pylist()
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    classes = classes_of_names(list(place))
    assert classes.max() == 20
    kept = fold_rows([place[name] for name in names], captions)
    assert len(kept) == 9985
    images, captions = [place[names[row]] for row in kept], [captions[row] for row in kept]
    for kind in ("caption", "image", "donor", "word"):
        assert inject(images, captions, kind, 0.4, 0).known_noise.mean() == pytest.approx(0.4, abs=0.003)
    within = inject(images, captions, "class", 0.4, 0, classes).known_noise.mean()
    assert 0.3 < within < 0.38  # images of a class share many captions, which no exchange makes wrong
