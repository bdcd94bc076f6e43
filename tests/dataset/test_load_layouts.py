"""Every layout is recognised, and the choice between several is stated or refused."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_checks import column, load
from PIL import Image

from nc_audit.dataset import ImageStore, content_id, decode_image, fold, load_pairs
from nc_audit.errors import DatasetError

KARPATHY = {
    "images": [
        {
            "filename": "a.png",
            "split": "train",
            "sentences": [{"raw": "A pond ."}, {"tokens": ["a", "lake"]}],
        },
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "A road", "known_noise": True}]},
    ]
}


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_karpathy_json_finds_images_in_a_subfolder(tmp_path, draw, write):
    draw("images/a.png", "images/b.png")
    write("dataset_small.json", KARPATHY)
    loaded = load(tmp_path)
    assert loaded.layout == "Karpathy json dataset_small.json beside its images"
    assert column(loaded, "caption") == ["A pond .", "a lake", "A road"]
    assert column(loaded, "split") == ["train", "train", "test"]
    assert column(loaded, "known_noise") == [None, None, True]
    assert column(loaded, "image_uri") == ["dataset:images/a.png"] * 2 + ["dataset:images/b.png"]
    assert column(loaded, "resolved_by") == ["file_name"] * 3
    assert column(loaded, "source") == ["dataset_small.json"] * 3
    assert loaded.counts == {"ok": 3}
    assert loaded.roots == {"dataset": str(tmp_path)}
    assert "3 rows with an image named by its file name alone, found in a subfolder" in loaded.notes


def test_karpathy_coco_splits_join_filepath_and_filename(tmp_path, draw, write):
    draw("val2014/a.png", "train2014/a.png")
    image = {"filepath": "val2014", "filename": "a.png", "sentences": [{"raw": "x y"}]}
    write("dataset_coco.json", {"images": [image]})
    loaded = load(tmp_path)
    assert column(loaded, "image_uri") == ["dataset:val2014/a.png"]
    assert column(loaded, "resolved_by") == ["path"]


def test_karpathy_entries_without_sentences_or_names_keep_a_row(tmp_path, draw, write):
    draw("a.png")
    write("dataset.json", {"images": [{"filename": "a.png", "sentences": []}, {"sentences": [{"raw": "x"}]}, 7,
                                      {"filename": "a.png", "sentences": ["a plain string"]}]})  # fmt: skip
    loaded = load(tmp_path)
    assert column(loaded, "status") == ["missing_caption", "missing_image", "missing_image", "ok"]
    assert column(loaded, "status_detail")[1] == "images[1] names no file"
    assert "2 images of dataset.json without sentences: a row without a caption each" in loaded.notes


def test_ambiguous_file_names_are_resolved_by_split_else_noted(tmp_path, draw, write):
    draw("x/test/a.png", "x/train/a.png", "z/c.png", "y/c.png")
    images = [
        {"filename": "a.png", "split": "test", "sentences": ["one"]},
        {"filename": "c.png", "sentences": ["two"]},
    ]
    write("dataset.json", {"images": images})
    loaded = load(tmp_path)
    assert column(loaded, "image_uri") == ["dataset:x/test/a.png", "dataset:y/c.png"]
    assert (
        "1 row with a file name that several images share: the shallowest, first by name, was taken; "
        "check these, or give paths" in loaded.notes
    )


def test_coco_captions_of_two_splits(tmp_path, draw, write):
    draw("train2017/1.png", "val2017/2.png")
    for split, number in (("train", 1), ("val", 2)):
        annotations = [{"image_id": number, "caption": f"{split} pond"}, {"image_id": 99, "caption": "lost"}]
        value = {"images": [{"id": number, "file_name": f"{number}.png"}, {"id": 5, "file_name": "5.png"}]}
        write(f"annotations/captions_{split}2017.json", value | {"annotations": annotations})
        write(f"annotations/instances_{split}2017.json", value | {"annotations": [{"bbox": [0, 0, 1, 1]}]})
    loaded = load(tmp_path)
    assert loaded.layout.startswith(
        "COCO captions json annotations/captions_train2017.json, annotations/captions_val"
    )
    assert column(loaded, "split") == ["train", "train", "val", "val"]
    assert column(loaded, "status") == ["ok", "missing_image", "ok", "missing_image"]
    assert (
        column(loaded, "status_detail")[1]
        == "annotations[1] names image_id 99, which is not among the images"
    )
    assert (
        "1 image of annotations/captions_val2017.json without an annotation, which makes no pair"
        in loaded.notes
    )
    assert column(load(tmp_path, split="val"), "caption") == ["val pond", "lost"]


def test_imagefolder_with_split_folders(tmp_path, draw, write):
    draw("train/a.png", "test/sub/b.png")
    write("train/metadata.csv", "file_name,text,known_noise\na.png,a pond,0\n")
    write("test/metadata.jsonl", '{"file_name": "sub/b.png", "text": "a road", "is_noisy": true}\n')
    with pytest.raises(DatasetError) as raised:
        load(tmp_path)
    assert (
        "2 files that could each be the dataset: test/metadata.jsonl, train/metadata.csv"
        in raised.value.message
    )
    (tmp_path / "test/metadata.jsonl").unlink()
    write("test/metadata.csv", "file_name,text,known_noise\nsub/b.png,a road,1\n")
    loaded = load(tmp_path)
    assert loaded.layout == "ImageFolder with test/metadata.csv, train/metadata.csv"
    assert column(loaded, "split") == ["test", "train"]
    assert column(loaded, "image_uri") == ["dataset:test/sub/b.png", "dataset:train/a.png"]
    assert column(loaded, "resolved_by") == ["path", "path"]
    assert column(loaded, "known_noise") == [True, False]


def test_imagefolder_metadata_at_the_root_takes_the_split_from_the_path(tmp_path, draw):
    draw("train/a.png", "test/b.png")
    table = pa.table({"file_name": ["train/a.png", "test/b.png"], "text": ["a pond", "a road"]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    loaded = load(tmp_path)
    assert column(loaded, "split") == ["train", "test"]
    assert "the split is taken from the first folder of the image's path" in loaded.notes


@pytest.mark.parametrize("path_kind", ["struct", "binary"])
def test_parquet_shards_with_images_inside(tmp_path, path_kind):
    for shard, split in enumerate(("test", "train", "train")):
        values = [png(10 * shard + at) for at in range(3)]
        values[2] = values[0]
        if path_kind == "struct":
            cells = [{"bytes": value, "path": f"{at}.png"} for at, value in enumerate(values)] + [None]
            images = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        else:
            images = pa.array([*values, None], pa.binary())
        captions = [["a pond", "a lake"], ["a road"], ["a pond"], ["none"]]
        table = pa.table({"image": images, "captions": captions})
        path = tmp_path / f"data/{split}-0000{shard}-of-00003.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path, row_group_size=2)
    loaded = load(tmp_path)
    assert len(loaded.pairs) == 15
    assert column(loaded, "split") == ["test"] * 5 + ["train"] * 10
    assert column(loaded, "status") == (["ok"] * 4 + ["missing_image"]) * 3
    assert column(loaded, "image_uri")[:3] == [
        "dataset:data/test-00000-of-00003.parquet#0",
        "dataset:data/test-00000-of-00003.parquet#0",
        "dataset:data/test-00000-of-00003.parquet#1",
    ]
    expected = "0.png" if path_kind == "struct" else "data/test-00000-of-00003.parquet#0"
    assert column(loaded, "image")[0] == expected
    assert column(loaded, "duplicate_of")[3] == 0
    folded = fold(loaded.pairs)
    store = ImageStore(loaded.roots)
    order = store.reading_order(folded.image_uris)
    assert sorted(order) == list(range(6))
    for at in order:
        assert content_id(store.read(folded.image_uris[at])) == folded.image_ids[at]
    assert decode_image(store.read("dataset:data/train-00001-of-00003.parquet#1")).getpixel((0, 0)) == (
        11,
        0,
        0,
    )
    assert column(load(tmp_path, split="test"), "split") == ["test"] * 5
    assert len(load(tmp_path, limit=7).pairs) == 7
    seen: list[tuple[int, int | None]] = []
    load_pairs(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 12), (8, 12), (12, 12)]


def test_parquet_struct_without_bytes_gives_its_path(tmp_path, draw):
    draw("pictures/a.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "/home/other/pictures/a.png"}], kind)
    pq.write_table(pa.table({"image": images, "text": ["a pond"]}), tmp_path / "t.parquet")
    loaded = load(tmp_path)
    assert column(loaded, "image_uri") == ["dataset:pictures/a.png"]
    assert column(loaded, "resolved_by") == ["path"]


def test_parquet_with_two_image_columns_reads_the_named_one(tmp_path):
    table = pa.table({"image": pa.array([png(1)]), "depth": pa.array([png(2)]), "caption": ["x y"]})
    pq.write_table(table, tmp_path / "t.parquet")
    loaded = load(tmp_path, image_column="depth")
    (uri,) = column(loaded, "image_uri")
    assert uri == "dataset:t.parquet#0:depth"
    assert ImageStore(loaded.roots).read(uri) == png(2)


def test_large_row_groups_are_streamed(tmp_path, monkeypatch):
    values = [png(at) for at in range(100)]
    pq.write_table(pa.table({"image": pa.array(values), "text": ["x"] * 100}), tmp_path / "t.parquet")
    monkeypatch.setattr("nc_audit.dataset.images._CACHED_ROW_GROUP", 1)
    store = ImageStore({"dataset": tmp_path})
    for row in (0, 1, 40, 99, 5, 5, 32, 31):
        assert store.read(f"dataset:t.parquet#{row}") == values[row]
    with pytest.raises(DatasetError, match="is beyond the 100 rows of its file"):
        store.read("dataset:t.parquet#100")


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (
            [{"image": "a.png", "caption": ["one", "two"]}, {"image": "b.png", "caption": None}],
            ["one", "two", None],
        ),
        ({"data": [{"file_name": "a.png", "text": "one"}]}, ["one"]),
        ({"a.png": ["one", "two"], "b.png": "three"}, ["one", "two", "three"]),
    ],
)
def test_json_tables_and_maps(tmp_path, draw, write, value, captions):
    draw("a.png", "b.png")
    write("notes.json", value)
    assert column(load(tmp_path), "caption") == captions


def test_json_lines_in_a_json_file(tmp_path, draw, write):
    draw("a.png")
    write("pairs.json", '{"image": "a.png", "text": "one"}\n{"image": "a.png", "text": "two"}\n')
    assert column(load(tmp_path), "caption") == ["one", "two"]


def test_a_karpathy_json_goes_before_a_csv_and_says_so(tmp_path, draw, write):
    draw("a.png", "b.png")
    write("dataset.json", KARPATHY)
    write("all.csv", "image,caption\na.png,x\n")
    write("LICENSE.txt", "free, as they say\n")
    write("classes.csv", "name\npond\n")
    loaded = load(tmp_path)
    assert len(loaded.pairs) == 3
    assert "a Karpathy json goes before other files, so all.csv was not read" in loaded.notes
    assert "not read, as no image-caption pairs were recognised: classes.csv" in loaded.notes


def test_two_unrelated_tables_are_a_coin_toss(tmp_path, draw, write):
    draw("a.png")
    write("one.csv", "image,caption\na.png,x\n")
    write("two.csv", "image,caption\na.png,y\n")
    with pytest.raises(DatasetError) as raised:
        load(tmp_path)
    assert (
        raised.value.message == f"{tmp_path} holds 2 files that could each be the dataset: one.csv, two.csv"
    )
    assert raised.value.hint == f"name one, for instance {tmp_path}/one.csv"
    assert column(load(tmp_path / "two.csv"), "caption") == ["y"]


def test_tables_of_splits_belong_together(tmp_path, draw, write):
    draw("a.png")
    write("captions_train.csv", "image,caption\na.png,x\n")
    write("captions_val.csv", "image,caption\na.png,y\n")
    loaded = load(tmp_path)
    assert column(loaded, "split") == ["train", "val"]
    assert "2 files are read one after the other: captions_train.csv, captions_val.csv" in loaded.notes
    with pytest.raises(DatasetError) as raised:
        load(tmp_path, split="test")
    assert raised.value.message == "no row has split test"
    assert raised.value.hint == "splits: train, val"


def test_runs_below_the_dataset_are_no_part_of_it(tmp_path, draw, write):
    draw("images/a.png", "runs/one/export/a.png")
    write("runs/one/run.json", {})
    write("runs/one/export/metadata.csv", "file_name,text\na.png,x\n")
    write("dataset.json", {"images": [{"filename": "a.png", "sentences": ["x"]}]})
    loaded = load(tmp_path)
    assert loaded.layout.startswith("Karpathy")
    assert column(loaded, "image_uri") == ["dataset:images/a.png"]


def test_limit_and_split_count_rows_of_what_is_loaded(tmp_path, draw, write):
    draw("a.png", "b.png")
    write("dataset.json", KARPATHY)
    assert column(load(tmp_path, split="test"), "row") == [0]
    limited = load(tmp_path, limit=2)
    assert len(limited.pairs) == 2
    assert "loaded only as far as --limit: 2 rows" in limited.notes
    with pytest.raises(DatasetError, match="the limit is 0 rows"):
        load(tmp_path, limit=0)


def test_nothing_there(tmp_path, draw):
    (tmp_path / "rsitmd").mkdir()
    with pytest.raises(DatasetError) as raised:
        load(tmp_path / "rsitmdd")
    assert raised.value.message == f"{tmp_path}/rsitmdd does not exist"
    assert raised.value.hint == f"did you mean {tmp_path}/rsitmd?"
    draw("rsitmd/a.png", "rsitmd/images/b.png")
    with pytest.raises(DatasetError) as raised:
        load(tmp_path / "rsitmd")
    assert raised.value.message == (
        f"{tmp_path}/rsitmd holds no file that states image-caption pairs: images/, 1 .png"
    )
    assert raised.value.hint.startswith("understood: a Karpathy or COCO captions json")
    with pytest.raises(DatasetError, match="states no image-caption pairs in a known form"):
        load(tmp_path / "rsitmd/a.png")


def test_malformed_json_names_the_place(tmp_path, write):
    path = write("dataset.json", '{"images": [\n  {"filename": }]}')
    for target in (path, tmp_path):
        with pytest.raises(DatasetError) as raised:
            load(target)
        assert raised.value.message == "dataset.json is not valid json: line 2 column 16: Expecting value"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"images": [' + "[" * 50_000 + "]" * 50_000 + "]}", '{"a":' * 90_000]
)
def test_deeply_nested_json_is_refused(write, text):
    path = write("dataset.json", text)
    with pytest.raises(DatasetError) as raised:
        load(path)
    assert raised.value.message == "dataset.json is nested too deeply to be a list of captions"


def test_damaged_parquet_is_refused(write):
    path = write("data.parquet", b"PAR1 and nothing more")
    with pytest.raises(DatasetError, match=r"data\.parquet cannot be read as Parquet"):
        load(path)


def test_surrogates_in_json_are_replaced(tmp_path, draw, write):
    draw("a.png")
    write(
        "dataset.json", '{"images": [{"filename": "a.png", "sentences": [{"raw": "half \\ud800 a pair"}]}]}'
    )
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["half ? a pair"]
    assert "1 cell with characters that are no Unicode text; each was replaced by ?" in loaded.notes
