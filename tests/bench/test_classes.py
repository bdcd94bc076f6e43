from __future__ import annotations

import numpy as np
import pytest

from nc_audit.bench.classes import classes_of_names, cluster_classes


def test_folders_are_classes():
    names = [f"data/{one}/{number}.jpg" for number in range(4) for one in ("park", "airport")]
    assert classes_of_names(names).tolist() == [1, 0] * 4
    assert classes_of_names([name.replace("/", "\\") for name in names]).tolist() == [1, 0] * 4


@pytest.mark.parametrize(
    "folders", [("train", "val", "test"), ("train2014", "val2014"), ("00000", "00001"), ("train", "")]
)
def test_splits_and_shards_are_no_classes(folders):
    names = [f"{folder}/{number:05d}.jpg" for number in range(9) for folder in folders]
    assert classes_of_names(names) is None


def test_file_names_without_digits_are_classes_whatever_the_split_folder():
    names = [
        f"{split}/{one}_{number}.jpg"
        for number in range(4)
        for split in ("train", "val")
        for one in ("Park", "a-b")
    ]
    assert classes_of_names(names).tolist() == [1, 0] * 8


def test_words_that_name_a_split_are_left_out_of_file_names():
    names = [f"COCO_{split}2014_{number:012d}.jpg" for number in range(6) for split in ("train", "val")]
    assert classes_of_names(names) is None


def test_a_class_called_train_is_a_class_among_others():
    names = [f"{one}/{number}.jpg" for number in range(4) for one in ("train", "car", "bus")]
    assert classes_of_names(names).tolist() == [2, 1, 0] * 4


def test_images_whose_name_says_nothing_have_no_class():
    names = (
        [f"park_{n}.jpg" for n in range(10)]
        + [f"pond_{n}.jpg" for n in range(10)]
        + ["00632.jpg", "00633.jpg"]
    )
    assert classes_of_names(names).tolist() == [0] * 10 + [1] * 10 + [-1] * 2
    assert classes_of_names(names[:4] + names[10:14] + ["001.jpg", "002.jpg", "003.jpg"]) is None


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["a.jpg"],
        [f"{number}.jpg" for number in range(30)],
        [f"img_{number}.jpg" for number in range(30)],
        [f"{chr(97 + number)}.jpg" for number in range(20)],
        [f"{chr(97 + number % 10)}/{number}.jpg" for number in range(20)],
    ],
    ids=["none", "one", "numbers", "one word", "all different", "folders of two"],
)
def test_names_that_divide_nothing_tell_no_classes(names):
    assert classes_of_names(names) is None


def test_separate_folders_give_way_to_file_names():
    names = [f"{number:04d}/{('park', 'pond')[number % 2]}.jpg" for number in range(12)]
    assert classes_of_names(names).tolist() == [0, 1] * 6


def test_clusters_find_groups_and_repeat():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 300)
    image_ID = np.eye(4)[truth] * 8 + rng.normal(size=(300, 4))
    found = cluster_classes(image_ID, 4, 1)
    assert found.dtype == np.int64
    assert (found == cluster_classes(image_ID, 4, 1)).all()
    for one in range(4):
        values, counts = np.unique(found[truth == one], return_counts=True)
        assert counts.max() > 0.95 * counts.sum(), (one, values)
    assert len(set(found.tolist())) == 4


def test_there_are_no_more_clusters_than_images():
    assert set(cluster_classes(np.eye(3), 10, 0).tolist()) == {0, 1, 2}
    assert set(cluster_classes(np.ones((6, 2)), 3, 0).tolist()) <= {0, 1, 2}


def test_an_image_without_an_embedding_has_no_class():
    image_ID = np.array([[0.0, 0.0], [9.0, 9.0], [np.nan, 0.0], [9.0, 9.1]])
    found = cluster_classes(image_ID, 2, 0)
    assert found[2] == -1
    assert found[1] == found[3] != found[0] >= 0
    assert cluster_classes(image_ID[2:3], 2, 0).tolist() == [-1]
    assert cluster_classes(image_ID[:1], 0, 0).tolist() == [0]
