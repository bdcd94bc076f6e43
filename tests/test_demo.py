"""The demo: same bytes, a truth that holds, broken rows, and noise that simple features find."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nc_audit.dataset import load_pairs, normalise_caption
from nc_audit.demo import draw_demo
from nc_audit.errors import DatasetError

THINGS = {
    "house": {"house", "houses", "building", "buildings"},
    "plane": {"plane", "planes", "airplane", "airplanes"},
    "tank": {"tank", "tanks"},
    "boat": {"boat", "boats", "ship", "ships"},
    "court": {"court", "courts"},
    "tent": {"tent", "tents"},
}


def rows_of(folder):
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def digest(folder):
    parts = [
        (path.relative_to(folder).as_posix(), path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    ]
    return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()


def thing(caption):
    (kind,) = [kind for kind, words in THINGS.items() if words & set(normalise_caption(caption).split())]
    return kind


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        draw_demo(tmp_path / name, num_images=24, seed=seed)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") != digest(tmp_path / "other")


def test_the_folder_holds_what_the_facts_say(tmp_path):
    facts = draw_demo(tmp_path / "demo", num_images=40, noise=0.25)
    rows = rows_of(tmp_path / "demo")
    noisy = sum(row["known_noise"] == "true" for row in rows)
    assert facts == {
        "folder": str(tmp_path / "demo"),
        "images": 40,
        "rows": len(rows),
        "noisy": noisy,
        "broken": {"corrupt_image": 1, "missing_image": 1, "empty_caption": 1},
        "noise": noisy / len(rows),
        "seed": 0,
    }
    assert noisy == round(0.25 * (len(rows) - 3))
    captions = defaultdict(list)
    for row in rows[:-3]:
        captions[row["file_name"]].append(normalise_caption(row["caption"]))
    assert len(captions) == 40
    assert all(3 <= len(own) <= 5 for own in captions.values())


@settings(max_examples=6)
@given(num_images=st.integers(16, 24), noise=st.floats(0, 0.8), seed=st.integers(0, 2**32))
@example(num_images=16, noise=0.8, seed=0)
@example(num_images=16, noise=0.01, seed=0)
@example(num_images=16, noise=0.0, seed=0)
def test_a_planted_caption_names_a_thing_that_is_not_in_its_image(tmp_path_factory, num_images, noise, seed):
    folder = tmp_path_factory.mktemp("demo")
    clean, noisy = folder / "clean", folder / "noisy"
    draw_demo(clean, num_images=num_images, noise=0, seed=seed)
    draw_demo(noisy, num_images=num_images, noise=noise, seed=seed)
    truth, rows = rows_of(clean), rows_of(noisy)
    assert not any(row["known_noise"] == "true" for row in truth)
    own = defaultdict(set)
    for row in truth:
        own[row["file_name"]].add(normalise_caption(row["caption"]))
    changed = [row["known_noise"] == "true" for row in rows]
    for before, after, is_changed in zip(truth, rows, changed, strict=True):
        assert after["file_name"] == before["file_name"]
        if is_changed:
            assert normalise_caption(after["caption"]) not in own[after["file_name"]]
            assert thing(after["caption"]) != thing(before["caption"])
        else:
            assert after["caption"] == before["caption"]
    # Exchanged, not invented: every caption is still there as often as before.
    assert sorted(row["caption"] for row in rows) == sorted(row["caption"] for row in truth)


def test_the_loader_sees_the_rows_and_the_truth(tmp_path):
    facts = draw_demo(tmp_path / "demo", num_images=24)
    loaded = load_pairs(tmp_path / "demo")
    assert loaded.pairs.num_rows == facts["rows"]
    # A file cut in half is found out when it is decoded; its head is whole.
    assert loaded.counts == {"ok": facts["rows"] - 2, "missing_image": 1, "empty_caption": 1}
    assert sum(loaded.pairs["known_noise"].to_pylist()) == facts["noisy"]
    with Image.open(tmp_path / "demo" / "images" / "cut_in_half.png") as cut, pytest.raises(OSError):
        cut.load()


def test_every_other_image_decodes(tmp_path):
    draw_demo(tmp_path / "demo", num_images=16)
    paths = sorted((tmp_path / "demo" / "images").glob("scene_*"))
    assert [path.suffix for path in paths] == [".png", ".jpg"] * 8
    for path in paths:
        with Image.open(path) as image:
            assert image.convert("RGB").size == (128, 128)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError) as caught:
        draw_demo(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not empty (name a new folder; nothing is ever overwritten)"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_will_do(tmp_path):
    draw_demo(tmp_path, num_images=16)
    assert (tmp_path / "metadata.csv").exists()


def test_a_file_in_the_place_is_refused(tmp_path):
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(DatasetError) as caught:
        draw_demo(tmp_path / "demo")
    assert str(caught.value) == f"{tmp_path / 'demo'} cannot be made: File exists (name another folder)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 15}, "a demo needs at least 16 images, got 15 (a few hundred are good)"),
        ({"noise": 0.9}, "noise must lie between 0 and 0.8, got 0.9 (0.2 exchanges one caption in five)"),
        ({"noise": -0.1}, "noise must lie between 0 and 0.8, got -0.1 (0.2 exchanges one caption in five)"),
        (
            {"noise": float("nan")},
            "noise must lie between 0 and 0.8, got nan (0.2 exchanges one caption in five)",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, arguments, message):
    with pytest.raises(DatasetError) as caught:
        draw_demo(tmp_path / "demo", **arguments)
    assert str(caught.value) == message
    assert not (tmp_path / "demo").exists()


def test_colours_and_textures_alone_tell_planted_captions(tmp_path):
    """Ridge regression from crude image statistics to word counts, on other images than it is judged on."""
    draw_demo(tmp_path / "demo", num_images=240)
    rows = rows_of(tmp_path / "demo")[:-3]
    names = sorted({row["file_name"] for row in rows})
    features = np.stack([statistics(tmp_path / "demo" / name) for name in names])
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    words = sorted({word for row in rows for word in normalise_caption(row["caption"]).split()})
    counts = np.array(
        [[word in normalise_caption(row["caption"]).split() for word in words] for row in rows], float
    )
    counts -= counts.mean(0)
    image = np.array([names.index(row["file_name"]) for row in rows])
    guess = np.zeros_like(counts)
    for fold in range(4):
        is_judged = image % 4 == fold
        x, y = features[image[~is_judged]], counts[~is_judged]
        guess[is_judged] = features[image[is_judged]] @ np.linalg.solve(
            x.T @ x + 100 * np.eye(x.shape[1]), x.T @ y
        )
    fit = (guess * counts).sum(1) / np.linalg.norm(guess, axis=1) / np.linalg.norm(counts, axis=1)
    is_noisy = np.array([row["known_noise"] == "true" for row in rows])
    auroc = (fit[is_noisy][:, None] < fit[~is_noisy][None, :]).mean()
    assert auroc > 0.85


def statistics(path):
    """Colour histogram of the image and of its differences to the pixel beside and below."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((64, 64)), float)
    parts = [np.histogramdd(pixels.reshape(-1, 3), bins=5, range=[(0, 256)] * 3)[0].ravel()]
    for axis in (0, 1):
        parts.append(np.histogram(np.abs(np.diff(pixels, axis=axis)).mean(-1), bins=8, range=(0, 128))[0])
    return np.sqrt(np.concatenate(parts))
