"""The shards: what the `datasets` library makes of them, splits, sizes, names."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from make_run import Pair, make_run, picture, reader
from offline_datasets import offline_library

from nc_audit.dataset import LoadOptions, load_pairs
from nc_audit.errors import DatasetError
from nc_audit.export import export_run
from nc_audit.export.names import base_name, split_names
from nc_audit.export.parquet import IMAGE, write_shards

HOSTILE = [
    "../../etc/x",
    "a/b",
    "all",
    "ALL",
    "Train",
    "train",
    "",
    " ",
    "a-b",
    "a b",
    "训练",
    "x" * 300,
    "=1",
    "\x1b[2J",
    "a*[b]",
]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    return offline_library(tmp_path / "cache", monkeypatch)


def kept_table(images: list[int]) -> pa.Table:
    rows = list(range(len(images)))
    return pa.table(
        {
            "row": rows,
            "pair_id": [f"pair{row}" for row in rows],
            "image_id": [f"image{number}" for number in images],
            "image": [f"{number}.png" for number in images],
            "image_uri": [f"dataset:{number}.png" for number in images],
            "caption": [f"caption {row}" for row in rows],
            "split": pa.array([None] * len(rows), pa.string()),
            "tag": ["clean"] * len(rows),
            "noise_probability": pa.array([0.5] * len(rows), pa.float32()),
        }
    )


def test_the_datasets_library_shows_images(tmp_path, datasets):
    pairs = [Pair(0, "a red house"), Pair(1, "a plane", tag="noisy", probability=0.875), Pair(2, "a boat")]
    export_run(
        make_run(tmp_path / "run", pairs), tmp_path / "out", reweight=True, rematch=True, read_image=reader()
    )
    loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train")
    assert loaded.num_rows == 3
    assert loaded.features["image"] == datasets.Image()
    assert loaded.features["weight"] == datasets.Value("float32")
    assert loaded.column_names == [
        "image", "caption", "row", "pair_id", "image_id", "tag", "noise_probability", "weight", "original_caption",
    ]  # fmt: skip
    assert loaded[1]["image"].size == (8, 8)
    assert loaded[1]["image"].getpixel((0, 0)) == (1, 254, 90)
    assert (loaded[1]["caption"], loaded[1]["tag"], loaded[1]["weight"]) == ("a plane", "noisy", 0.125)


def test_the_card_tells_the_library_of_every_split_and_of_nothing_else(tmp_path, datasets):
    pairs = [Pair(i, f"caption {i}", split=split) for i, split in enumerate([*HOSTILE, None])]
    pairs.append(Pair(99, "no image", status="missing_image", split="gone"))
    result = export_run(make_run(tmp_path / "run", pairs), tmp_path / "out", read_image=reader())
    assert result.kept == len(HOSTILE) + 1
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert len(loaded) == len(HOSTILE) + 1
    told = {row["row"]: row["split"] for split in loaded.values() for row in split.remove_columns("image")}
    assert told == dict(enumerate([*HOSTILE, None]))
    assert {path.parent for path in (tmp_path / "out").rglob("*.parquet")} == {tmp_path / "out" / "data"}


def test_the_schema_is_what_the_library_itself_would_write(tmp_path, datasets):
    pairs = [Pair(0, split="train")]
    export_run(
        make_run(tmp_path / "run", pairs), tmp_path / "out", reweight=True, rematch=True, read_image=reader()
    )
    schema = pq.read_schema(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    text, number = datasets.Value("string"), datasets.Value("float32")
    features = datasets.Features(
        {
            "image": datasets.Image(), "caption": text, "row": datasets.Value("int64"), "pair_id": text,
            "image_id": text, "split": text, "tag": text, "noise_probability": number, "weight": number,
            "original_caption": text,
        }
    )  # fmt: skip
    assert schema.equals(features.arrow_schema)
    assert json.loads(schema.metadata[b"huggingface"]) == json.loads(
        features.arrow_schema.metadata[b"huggingface"]
    )


def test_images_of_any_format_travel_byte_for_byte(tmp_path):
    forms = ["PNG", "JPEG", "WEBP", "BMP"]
    files = {f"image{i}": picture(i, form=form) for i, form in enumerate(forms)}
    written = write_shards(
        kept_table([0, 1, 2, 3]), tmp_path, lambda image_id, uri: files[image_id], with_splits=False
    )
    table = pq.read_table(tmp_path / next(iter(written.data)))
    assert table.schema.field("image").type == IMAGE
    assert [image["bytes"] for image in table["image"].to_pylist()] == list(files.values())


def test_shards_are_numbered_and_row_groups_small(tmp_path):
    data = {f"image{i}": bytes([i]) * 1000 for i in range(20)}
    table = kept_table([i // 2 for i in range(40)])
    written = write_shards(
        table,
        tmp_path,
        lambda image_id, uri: data[image_id],
        with_splits=False,
        shard_bytes=1,
        row_group_bytes=7000,
    )
    names = [f"data/train-{i:05d}-of-00006.parquet" for i in range(6)]
    assert written.data == dict.fromkeys(names)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == names
    assert [pq.read_metadata(tmp_path / name).num_rows for name in names] == [7, 7, 7, 7, 7, 5]
    rows = pa.concat_tables(pq.read_table(tmp_path / name) for name in names)
    assert rows["caption"].to_pylist() == table["caption"].to_pylist()
    assert [image["bytes"] for image in rows["image"].to_pylist()] == [
        data[f"image{i // 2}"] for i in range(40)
    ]


def test_one_shard_holds_several_row_groups_with_a_page_index(tmp_path):
    write_shards(
        kept_table(list(range(20))), tmp_path, lambda *_: b"x" * 1000, with_splits=False, row_group_bytes=5000
    )
    metadata = pq.read_metadata(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert metadata.num_row_groups == 4
    assert metadata.row_group(0).column(2).has_offset_index


def test_copies_of_an_image_in_a_row_group_are_stored_once(tmp_path):
    noise = {i: bytes((i * 7919 + j * j * 31) % 251 for j in range(20_000)) for i in range(4)}
    sizes = []
    for name, images in (("once", [0, 1, 2, 3]), ("five_times", [i // 5 for i in range(20)])):
        (tmp_path / name).mkdir()
        write_shards(
            kept_table(images),
            tmp_path / name,
            lambda image_id, uri: noise[int(image_id[5:])],
            with_splits=False,
        )
        sizes.append(sum(path.stat().st_size for path in (tmp_path / name).rglob("*.parquet")))
    assert sizes[1] < 1.5 * sizes[0]


def test_a_split_whose_rows_are_all_dropped_is_left_out(tmp_path):
    pairs = [Pair(0, split="train"), Pair(1, split="val", tag="noisy"), Pair(2, split="test")]
    export_run(
        make_run(tmp_path / "run", pairs), tmp_path / "out", drop=["noisy"], read_image=reader(gone=[2])
    )
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == ["train-00000-of-00001.parquet"]
    assert "val" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("tags:")[0]


@given(st.lists(st.none() | st.text(max_size=8), unique=True, min_size=1))
@example(HOSTILE)
def test_split_names_are_safe_and_distinct(splits):
    names = list(split_names(splits).values())
    assert len(names) == len(splits) == len({name.casefold() for name in names})
    for name in names:
        assert re.fullmatch(r"\w+", name)
        assert len(name.encode("utf-8")) < 200
        assert name.casefold() != "all"


def test_ordinary_split_names_stay():
    ordinary = ["train", "val", "test", "restval", "validation_2"]
    assert split_names(list(ordinary)) == dict(zip(ordinary, ordinary, strict=True))


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("images/airport_348.jpg", "airport_348.jpg"),
        ("/home/somebody/RSICD_images/a.jpg", "a.jpg"),
        ("C:\\data\\..\\a.jpg", "a.jpg"),
        ("../../etc/passwd", "passwd"),
        ("..", "0f0f"),
        ("folder/", "0f0f"),
        (None, "0f0f"),
        ("a\x1b[2J\u202egpj.exe", "a_[2J_gpj.exe"),
        ("照片.png", "照片.png"),
        ("x" * 300 + ".jpeg", "x" * 150 + ".jpeg"),
    ],
)
def test_only_a_harmless_base_name_is_exported(image, name):
    assert base_name(image, "0f0f") == name


def test_without_images_their_names_stand_in_their_place_and_nothing_is_read(tmp_path):
    pairs = [
        Pair(i, f"caption {i}", split=["train", None][i % 2], tag=["clean", "noisy"][i == 3])
        for i in range(6)
    ]
    calls: list[str] = []
    result = export_run(
        make_run(tmp_path / "run", pairs),
        tmp_path / "out",
        drop=["noisy"],
        reweight=True,
        with_images=False,
        read_image=reader(calls),
    )
    assert calls == []
    assert (result.rows, result.kept, result.dropped) == (6, 5, {"tag: noisy": 1})
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out/data").iterdir())]
    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["row"])
    assert [row["image"] for row in rows] == [f"images/{i}.png" for i in (0, 1, 2, 4, 5)]
    assert [row["caption"] for row in rows] == [f"caption {i}" for i in (0, 1, 2, 4, 5)]
    assert all(row["weight"] == pytest.approx(0.9) for row in rows)
    assert "without the images" in (tmp_path / "out/README.md").read_text()
    described = json.loads((tmp_path / "out/croissant.json").read_text())
    assert "sc:ImageObject" not in json.dumps(described)


def test_without_images_it_is_read_again_where_they_lie(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i))
    pairs = [Pair(i, f"caption {i}") for i in range(3)]
    out = tmp_path / "cleaned"
    export_run(make_run(tmp_path / "run", pairs), out, with_images=False, read_image=reader())
    loaded = load_pairs(out, LoadOptions(image_root=tmp_path))
    assert loaded.counts == {"ok": 3}
    assert loaded.pairs["caption"].to_pylist() == [f"caption {i}" for i in range(3)]


def test_other_formats_come_with_their_images(tmp_path):
    run = make_run(tmp_path / "run", [Pair()])
    with pytest.raises(DatasetError) as caught:
        export_run(run, tmp_path / "out", format="webdataset", with_images=False, read_image=reader())
    assert str(caught.value) == (
        "webdataset comes with its images (--no-images goes with --format parquet; datacomp has none)"
    )
