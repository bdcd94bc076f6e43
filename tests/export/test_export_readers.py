"""What other people's readers make of our exports."""

from __future__ import annotations

import csv
import gc
import io
import json
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_run import Pair, make_run, picture, reader
from offline_datasets import offline_library
from PIL import Image

from nc_audit.errors import DatasetError
from nc_audit.export import FORMATS, export_run
from nc_audit.export.hub import write_hub
from nc_audit.export.plan import plan_export
from nc_audit.export.webdataset import write_webdataset

PAIRS = [
    Pair(0, "a red house", split="train", probability=0.25),
    Pair(0, "=a house, that is\n'red'", split="train", probability=0.125),
    Pair(1, "a plane", split="test", tag="noisy", probability=0.875),
    Pair(2, "一架飞机", split="train", image="../\x1b[2J飞机.PNG"),
]
UNSPLIT = [Pair(pair.number, pair.caption, tag=pair.tag, image=pair.image) for pair in PAIRS]
COLOURS = [(0, 255, 90), (1, 254, 90), (2, 253, 90)]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    return offline_library(tmp_path / "cache", monkeypatch)


def exported(folder, pairs, form, **options):
    out = folder / "out"
    export_run(make_run(folder / "run", pairs), out, format=form, read_image=reader(), **options)
    return out


def colour(image):
    return image.convert("RGB").getpixel((0, 0))


def test_datasets_reads_an_imagefolder(tmp_path, datasets):
    loaded = datasets.load_dataset(str(exported(tmp_path, PAIRS, "imagefolder", reweight=True)))
    assert {name: split.num_rows for name, split in loaded.items()} == {"train": 3, "test": 1}
    assert [row["text"] for row in loaded["train"]] == [PAIRS[0].caption, PAIRS[1].caption, PAIRS[3].caption]
    assert [colour(row["image"]) for row in loaded["train"]] == [COLOURS[0], COLOURS[0], COLOURS[2]]
    row = loaded["test"][0]
    assert (row["tag"], row["weight"], row["split"], row["row"]) == ("noisy", 0.125, "test", 2)


@pytest.mark.parametrize("pairs", [PAIRS, UNSPLIT], ids=["splits", "no splits"])
def test_datasets_reads_webdataset_shards(tmp_path, datasets, pairs):
    loaded = datasets.load_dataset(str(exported(tmp_path, pairs, "webdataset")))
    assert {name: split.num_rows for name, split in loaded.items()} == (
        {"train": 3, "test": 1} if pairs is PAIRS else {"train": 4}
    )
    row = loaded["train"][1]
    assert (row["txt"], row["json"]["tag"], row["__key__"]) == (PAIRS[1].caption, "clean", "000000001")
    assert colour(row["png"]) == COLOURS[0]


def test_datasets_opens_what_it_could_have_saved_itself(tmp_path, datasets):
    loaded = datasets.load_from_disk(exported(tmp_path, PAIRS, "hf", reweight=True))
    assert {name: split.num_rows for name, split in loaded.items()} == {"train": 3, "test": 1}
    assert loaded["train"].features["image"] == datasets.Image()
    assert [row["caption"] for row in loaded["train"]] == [
        PAIRS[0].caption,
        PAIRS[1].caption,
        PAIRS[3].caption,
    ]
    assert colour(loaded["test"][0]["image"]) == COLOURS[1]
    assert (loaded["test"][0]["weight"], str(loaded["test"].split)) == (0.125, "test")
    raw = loaded["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert raw == {"bytes": picture(0), "path": "0.png"}


def test_datasets_opens_a_set_without_splits(tmp_path, datasets):
    out = exported(tmp_path, UNSPLIT, "hf")
    loaded = datasets.load_from_disk(out)
    assert loaded.num_rows == 4
    assert [path.name for path in out.glob(".*")] == []


@pytest.mark.parametrize("form", ["imagefolder", "webdataset", "hf"])
def test_datasets_reads_splits_of_any_name(tmp_path, datasets, form):
    splits = [
        "../../etc/x",
        "all",
        "Train",
        "train",
        "a-b",
        "a b",
        "训练",
        "x" * 300,
        "=1",
        "con",
        "a*[b]",
        None,
    ]
    pairs = [Pair(i, f"caption {i}", split=split) for i, split in enumerate(splits)]
    out = exported(tmp_path, pairs, form)
    loaded = datasets.load_from_disk(out) if form == "hf" else datasets.load_dataset(str(out))
    rows = [row["json"] if form == "webdataset" else row for split in loaded.values() for row in split]
    told = {row["row"]: row["split"] if form == "hf" else row["split"] or None for row in rows}
    assert told == dict(enumerate(splits))
    assert len(loaded) == len(splits)


@pytest.mark.parametrize("form", ["imagefolder", "webdataset"])
def test_gaps_do_not_mislead_a_reader_that_guesses_types(tmp_path, datasets, form):
    late = {"note": "late", "score": 0.5, "n": 3}
    pairs = [
        Pair(i, f"caption {i}", split="test" if i > 9 else "train", columns=late if i > 7 else {"n": 1})
        for i in range(12)
    ]
    pairs[8] = replace(pairs[8], tag="noisy", rematch_row=0, rematch_probability=0.1)
    out = exported(tmp_path, pairs, form, rematch=True)
    loaded = datasets.load_dataset(str(out))
    rows = [row["json"] if form == "webdataset" else row for split in loaded.values() for row in split]
    assert [row["note"] for row in rows] == [""] * 8 + ["late"] * 4
    assert [row["original_caption"] for row in rows] == [""] * 8 + ["caption 8"] + [""] * 3
    assert [row["n"] for row in rows] == [1] * 8 + [3] * 4
    assert [row["score"] for row in rows] == [None] * 8 + [0.5] * 4


def test_shards_of_several_kinds_of_images_are_told(tmp_path):
    run = make_run(tmp_path / "run", [Pair(0, "a"), Pair(1, "b")])
    files = [picture(0), picture(1, form="JPEG")]
    out = tmp_path / "out"
    result = export_run(run, out, format="webdataset", read_image=lambda uri: files[int(uri[-5])])
    assert result.notes == [
        "images are of 2 kinds (jpg, png): webdataset reads them, datasets.load_dataset wants shards of one kind; "
        "--format parquet suits it"
    ]
    assert "configs:" not in (out / "README.md").read_text(encoding="utf-8")


def test_datasets_opens_several_shards_in_order(tmp_path, datasets):
    run = make_run(tmp_path / "run", [Pair(i, f"caption {i}") for i in range(20)])
    kept = plan_export(run, drop=[], reweight=False, rematch=False).kept
    (tmp_path / "out").mkdir()
    read = reader()
    write_hub(
        kept, tmp_path / "out", lambda _, uri: read(uri), with_splits=False, shard_bytes=1, block_bytes=300
    )
    assert len(list((tmp_path / "out").glob("data-*-of-00005.arrow"))) == 5
    loaded = datasets.load_from_disk(tmp_path / "out")
    assert loaded["caption"][:] == [f"caption {i}" for i in range(20)]
    assert colour(loaded[19]["image"]) == (19, 236, 90)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_datasets_reads_a_table_without_splits(tmp_path, datasets, form):
    loaded = datasets.load_dataset(str(exported(tmp_path, UNSPLIT, form)))
    assert loaded["train"].num_rows == 4
    assert loaded["train"][0]["image"] == "images/0.png"


def test_webdataset_reads_its_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    out = exported(tmp_path, PAIRS, "webdataset", reweight=True)
    urls = [str(path) for path in sorted((out / "data").glob("train-*.tar"))]
    with warnings.catch_warnings():
        # The library leaves the shard to the garbage collector to close.
        warnings.simplefilter("ignore", ResourceWarning)
        shards = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        found = list(shards.decode("pil").to_tuple("png", "txt", "json"))
        del shards
        gc.collect()
    assert [caption for _, caption, _ in found] == [PAIRS[0].caption, PAIRS[1].caption, PAIRS[3].caption]
    assert [colour(image) for image, _, _ in found] == [COLOURS[0], COLOURS[0], COLOURS[2]]
    assert (found[1][2]["weight"], found[1][2]["pair_id"]) == (
        0.875,
        pq.read_table(tmp_path / "run" / "pairs.parquet")["pair_id"][1].as_py(),
    )
    assert found[2][2]["image"] == "_[2J飞机.PNG"


def test_shards_have_a_limit_of_pairs_and_of_bytes(tmp_path):
    run = make_run(tmp_path / "run", [Pair(i, f"caption {i}") for i in range(25)])
    kept = plan_export(run, drop=[], reweight=False, rematch=False).kept
    for name, limit, sizes in (
        ("pairs", {"shard_rows": 10}, [10, 10, 5]),
        ("bytes", {"shard_bytes": 6200}, [2] * 12 + [1]),
        ("tiny", {"shard_bytes": 1}, [1] * 25),
    ):
        (tmp_path / name).mkdir()
        read = reader()
        written = write_webdataset(
            kept, tmp_path / name, lambda _, uri, read=read: read(uri), with_splits=False, **limit
        )
        assert list(written.data) == [f"data/train-{i:06d}.tar" for i in range(len(sizes))]
        found = []
        for file in written.data:
            with tarfile.open(tmp_path / name / file) as tar:
                members = tar.getmembers()
            assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
            found.append(len(members) // 3)
        assert found == sizes


def test_members_carry_the_ending_of_their_content(tmp_path):
    forms = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
    files = [picture(i, form=form) for i, form in enumerate(forms)]
    pairs = [Pair(i, f"caption {i}", image=f"{i}.jpg") for i in range(len(files))]
    export_run(
        make_run(tmp_path / "run", pairs),
        tmp_path / "out",
        format="webdataset",
        read_image=lambda uri: files[int(uri[-5])],
    )
    with tarfile.open(tmp_path / "out" / "data" / "train-000000.tar") as tar:
        names = [name for name in tar.getnames() if not name.endswith((".txt", ".json"))]
        assert names == [f"{i:09d}.{ending}" for i, ending in enumerate(forms.values())]
        assert tar.extractfile(names[3]).read() == files[3]


def test_torchvision_reads_coco_captions(tmp_path, capsys):
    torchvision = pytest.importorskip("torchvision", reason="torchvision cannot be imported")
    pytest.importorskip("pycocotools", reason="torchvision reads COCO through pycocotools")
    out = exported(tmp_path, PAIRS, "coco", reweight=True)
    loaded = torchvision.datasets.CocoCaptions(out / "images", out / "annotations" / "captions_train.json")
    assert [captions for _, captions in loaded] == [[PAIRS[0].caption, PAIRS[1].caption], [PAIRS[3].caption]]
    assert [colour(image) for image, _ in loaded] == [COLOURS[0], COLOURS[2]]
    other = json.loads((out / "annotations" / "captions_test.json").read_text(encoding="utf-8"))
    (annotation,) = other["annotations"]
    assert (annotation["id"], annotation["weight"], annotation["tag"]) == (4, 0.125, "noisy")
    assert other["images"] == [{"id": 3, "file_name": "1.png", "content_id": "image0001", "split": "test"}]


def test_karpathy_json_is_as_its_readers_expect(tmp_path):
    pairs = [*PAIRS, Pair(0, "It's a well-lit House.", split="train")]
    out = exported(tmp_path, pairs, "karpathy", reweight=True)
    images = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["images"]
    assert [(one["imgid"], one["split"], one["sentids"]) for one in images] == [
        (0, "train", [0, 1, 2]), (1, "test", [3]), (2, "train", [4]),
    ]  # fmt: skip
    last = images[0]["sentences"][2]
    assert (last["raw"], last["tokens"]) == (pairs[4].caption, ["it's", "a", "well-lit", "house"])
    assert (last["imgid"], last["sentid"], last["row"], last["weight"]) == (0, 2, 4, 0.9)
    for one in images:
        assert (out / one["filepath"] / one["filename"]).is_file()


def test_pandas_and_duckdb_read_csv_and_jsonl(tmp_path):
    pandas, duckdb = pytest.importorskip("pandas"), pytest.importorskip("duckdb")
    for form in ("csv", "jsonl"):
        out = exported(tmp_path / form, PAIRS, form, reweight=True)
        path = out / f"captions.{form}"
        frame = pandas.read_csv(path) if form == "csv" else pandas.read_json(path, lines=True)
        captions = [pair.caption for pair in PAIRS]
        guarded = [captions[0], "'" + captions[1], *captions[2:]] if form == "csv" else captions
        assert frame["caption"].tolist() == guarded
        assert frame["weight"].tolist() == [0.75, 0.875, 0.125, 0.9]
        assert frame["split"].tolist() == ["train", "train", "test", "train"]
        scan = "read_csv" if form == "csv" else "read_json"
        rows = duckdb.sql(f"SELECT caption, weight FROM {scan}('{path}') ORDER BY row").fetchall()
        assert rows == list(zip(guarded, [0.75, 0.875, 0.125, 0.9], strict=True))
        for name in frame["image"]:
            with Image.open(io.BytesIO((out / name).read_bytes())) as image:
                assert image.size == (8, 8)


def test_duckdb_reads_parquet(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    out = exported(tmp_path, PAIRS, "parquet", reweight=True)
    query = f"SELECT caption, weight, image.path FROM read_parquet('{out}/data/*.parquet') ORDER BY row"
    assert duckdb.sql(query).fetchall()[2] == ("a plane", 0.125, "1.png")


def test_no_cell_of_the_csv_is_a_formula(tmp_path):
    pairs = [Pair(0, "@SUM(1)", split="=1", image="=2.png", columns={"note": "-3", "+key": "\t4"})]
    out = exported(tmp_path, pairs, "csv")
    with (out / "captions.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for record in csv.reader(file) for cell in record]
    assert {"'@SUM(1)", "'=1", "'-3", "'+key", "'\t4", "images/=2.png"} <= set(cells)
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r\n"))]


def datacomp_ids(folder, pairs, **options):
    out = exported(folder, pairs, "datacomp", **options)
    return {path.name: np.load(path, allow_pickle=False) for path in out.glob("*.npy")}


def test_datacomp_ids_are_sorted_pairs_of_64_bits(tmp_path):
    ids = [f"{number:032x}" for number in (2**100 + 7, 5, 2**64 - 1, 2**127)]
    pairs = [Pair(i, f"caption {i}", columns={"uid": uid}) for i, uid in enumerate([*ids, ids[0]])]
    found = datacomp_ids(tmp_path, pairs)
    (array,) = found.values()
    assert (list(found), array.dtype) == (["uids.npy"], np.dtype("u8,u8"))
    # As DataComp itself makes them.
    expected = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in ids], np.dtype("u8,u8"))
    expected.sort()
    assert array.tolist() == expected.tolist()


def test_datacomp_takes_pair_ids_where_a_uid_is_missing(tmp_path):
    pairs = [Pair(0, "a", split="train", columns={"uid": "0" * 32}), Pair(1, "b", split="test", tag="noisy")]
    pairs.append(Pair(2, "c", split="test", columns={"uid": "xyz"}))
    found = datacomp_ids(tmp_path, pairs, drop=["noisy"])
    pair_ids = pq.read_table(tmp_path / "run" / "pairs.parquet")["pair_id"].to_pylist()
    assert {name: [f"{a:016x}{b:016x}" for a, b in array.tolist()] for name, array in found.items()} == {
        "uids_train.npy": [pair_ids[0]],
        "uids_test.npy": [pair_ids[2]],
    }


@pytest.mark.parametrize(("option", "what"), [("reweight", "weights"), ("rematch", "captions")])
def test_ids_carry_neither_weights_nor_captions(tmp_path, option, what):
    with pytest.raises(DatasetError) as caught:
        exported(tmp_path, PAIRS, "datacomp", **{option: True})
    assert str(caught.value) == (
        f"--{option}: datacomp is a list of ids, which cannot carry {what} (take another --format)"
    )
    assert not (tmp_path / "out").exists()


def test_columns_of_the_input_travel_along(tmp_path, datasets):
    columns = [{"licence": "=x", "width": 7, "ratio": 0.5, "tags": ["a", "b"], "safe": True}, {"width": 8}]
    pairs = [Pair(i, f"caption {i}", columns=more) for i, more in enumerate(columns)]
    expected = {"licence": "=x", "width": 7, "ratio": 0.5, "tags": '["a", "b"]', "safe": True}
    for form in FORMATS:
        if form != "datacomp":
            exported(tmp_path / form, pairs, form)
    records = {
        "parquet": pq.read_table(tmp_path / "parquet/out/data").to_pylist()[0],
        "hf": datasets.load_from_disk(tmp_path / "hf/out")[0],
        "jsonl": json.loads((tmp_path / "jsonl/out/captions.jsonl").read_text().splitlines()[0]),
        "imagefolder": json.loads(
            (tmp_path / "imagefolder/out/train/metadata.jsonl").read_text().splitlines()[0]
        ),
        "coco": json.loads((tmp_path / "coco/out/annotations/captions.json").read_text())["annotations"][0],
        "karpathy": json.loads((tmp_path / "karpathy/out/dataset.json").read_text())["images"][0][
            "sentences"
        ][0],
    }
    for form, record in records.items():
        assert {name: record[name] for name in expected} == expected, form
    card = (tmp_path / "csv" / "out" / "README.md").read_text(encoding="utf-8")
    assert "| `licence` | a column of the input |" in card


def test_columns_of_the_input_never_stand_in_for_those_of_the_format(tmp_path, datasets):
    names = [
        "id",
        "raw",
        "tokens",
        "imgid",
        "sentid",
        "file_name",
        "thumb_file_name",
        "text",
        "input_id",
        "__key__",
    ]
    pairs = [Pair(0, "a house", columns=dict.fromkeys(names, "evil"))]
    for form in ("coco", "karpathy", "imagefolder", "webdataset"):
        exported(tmp_path / form, pairs, form)
    (annotation,) = json.loads((tmp_path / "coco/out/annotations/captions.json").read_text())["annotations"]
    assert (annotation["id"], annotation["image_id"], annotation["caption"]) == (1, 1, "a house")
    assert (annotation["input_id"], annotation["input_input_id"]) == ("evil", "evil")
    (image,) = json.loads((tmp_path / "karpathy/out/dataset.json").read_text())["images"]
    (sentence,) = image["sentences"]
    assert (sentence["raw"], sentence["tokens"], sentence["sentid"]) == ("a house", ["a", "house"], 0)
    assert (sentence["input_raw"], image["filename"]) == ("evil", "0.png")
    row = datasets.load_dataset(str(tmp_path / "imagefolder/out"))["train"][0]
    assert colour(row["image"]) == COLOURS[0]
    assert (row["caption"], row["text"], row["input_filename"], row["thumb_filename"]) == (
        "a house", "evil", "evil", "evil",
    )  # fmt: skip
    row = datasets.load_dataset(str(tmp_path / "webdataset/out"))["train"][0]
    assert (row["txt"], row["json"]["__key__"], row["__key__"]) == ("a house", "evil", "000000000")


def test_croissant_describes_the_files_and_the_columns(tmp_path):
    out = exported(tmp_path, PAIRS, "csv", reweight=True)
    document = json.loads((out / "croissant.json").read_text(encoding="utf-8"))
    assert document["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    files = {one["@id"]: one for one in document["distribution"]}
    assert set(files) == {"captions.csv", "images/*.png", "images/*.PNG"}
    assert len(files["captions.csv"]["sha256"]) == 64
    (records,) = document["recordSet"]
    types = {field["name"]: field["dataType"] for field in records["field"]}
    assert types["caption"] == "sc:Text"
    assert types["weight"] == "sc:Float"
    assert types["row"] == "sc:Integer"
    assert list(types) == (out / "captions.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    for field in records["field"]:
        assert field["source"]["fileObject"]["@id"] == "captions.csv"


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_metadata_of_its_files(tmp_path, form):
    out = exported(tmp_path, PAIRS, form)
    document = json.loads((out / "croissant.json").read_text(encoding="utf-8"))
    assert document["distribution"]
    for one in document["distribution"]:
        assert list(out.glob(one["includes"] if "includes" in one else one["contentUrl"])), one
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"\n## What is here\n\n{FORMATS[form].about}\n" in card
