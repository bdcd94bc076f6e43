"""Images that are there twice, and images under too many captions."""

from __future__ import annotations

from finding_case import NUM, Case, told


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
