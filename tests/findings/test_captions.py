"""Captions that no caption should be, and those that are unlike the others."""

from __future__ import annotations

import numpy as np
import pytest
from finding_case import NUM, Case, told
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.findings import script_of


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


@given(st.text(max_size=40))
def test_any_caption_is_looked_at(caption: str) -> None:
    case = Case(4)
    case.captions[0] = caption
    assert all(one["row"] == 0 or one["kind"] != "short_caption" for one in case.find())
    script = script_of(caption)
    assert (script is not None) == any(letter.isalpha() for letter in caption)


def test_generic_captions_are_those_of_pairs_that_look_right() -> None:
    case, rank = Case(), np.ones(NUM, np.int64)
    rank[[3, 4]], case.noise[4] = 101, 0.9
    assert told(case.find(rank), "generic_caption") == {3: "generic: 100 other images fit the caption better"}


def test_a_noisy_caption_unlike_the_images_others() -> None:
    case = Case(per_image=4)
    case.caption[9], case.noise[9] = case.caption[900], 0.9
    case.noise[13] = 0.9
    assert told(case.find(), "disagrees") == {9: "disagrees with the image's other captions"}
