"""What is found in whole sets, and what becomes of it."""

from __future__ import annotations

import numpy as np
from finding_case import NUM, Case, told

from nc_audit.findings import Found
from nc_audit.schema import FINDING_KINDS
from nc_audit.tag import Thresholds, tag_scores


def test_nothing_is_found_in_a_set_without_faults() -> None:
    assert Case().find() == []


def test_nothing_is_found_in_an_empty_set() -> None:
    case = Case(1)
    case.status = ["missing_image"]
    assert case.find() == []


def test_rows_whose_caption_the_encoder_cuts_are_listed() -> None:
    case = Case()
    case.row_caption[7] = case.row_caption[2]
    case.status[9] = "missing_image"
    cut = [caption in (2, 9, 30) for caption in range(NUM)]
    assert told(case.find(is_cut=cut), "cut_caption") == dict.fromkeys(
        (2, 7, 30), "caption is longer than the encoder reads"
    )


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
