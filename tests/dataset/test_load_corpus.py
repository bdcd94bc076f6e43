"""Awkward datasets of every layout, each with the statuses of its rows; and bytes no reader may trip over."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_checks import column, load
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nc_audit.dataset import LoadOptions, load_pairs
from nc_audit.errors import AuditError


def picture(colour: int = 1, form: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 3), colour if len(mode) < 3 else (colour,) * len(mode)).save(buffer, form)
    return buffer.getvalue()


def tar(*members: tuple[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def arrow(**columns) -> bytes:
    buffer = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def karpathy(*images) -> bytes:
    entries = [{"filename": name, "sentences": [{"raw": one} for one in said]} for name, said in images]
    return json.dumps({"images": entries}).encode()


def coco(images, annotations) -> bytes:
    return json.dumps(
        {
            "images": [{"id": number, "file_name": name} for number, name in images],
            "annotations": [
                {"id": at, "image_id": number, "caption": caption}
                for at, (number, caption) in enumerate(annotations)
            ],
        }
    ).encode()


A, B = {"a.png": picture(1)}, {"b.png": picture(2)}
OK, GONE, BROKEN, OUT, URL = "ok", "missing_image", "corrupt_image", "outside_root", "remote_image"
EMPTY, MUTE = "empty_caption", "missing_caption"
PNG = picture(1)

CASES = {
    "csv, empty caption": ({**A, "p.csv": b"image,caption\na.png,x\na.png,\na.png,  \n"}, [OK, EMPTY, EMPTY]),
    "csv, only punctuation": ({**A, "p.csv": b"image,caption\na.png,x\na.png,...\n"}, [OK, EMPTY]),
    "csv, short row": ({**A, "p.csv": b"image,caption\na.png,x\na.png\n"}, [OK, MUTE]),
    "csv, blank lines": ({**A, "p.csv": b"image,caption\n\na.png,x\n\n\na.png,y\n"}, [OK, OK]),
    "csv, BOM and CRLF": ({**A, "p.csv": b"\xef\xbb\xbfimage,caption\r\na.png,x\r\n"}, [OK]),
    "csv, carriage returns only": ({**A, "p.csv": b"image,caption\ra.png,x\ra.png,y\r"}, [OK, OK]),
    "csv, semicolons": ({**A, "p.csv": b"image;caption\na.png;x, y\n"}, [OK]),
    "csv, tabs": ({**A, "p.tsv": b"image\tcaption\na.png\ta \"b\n"}, [OK]),
    "csv, upper-case header": ({**A, "p.csv": b"IMAGE, Caption \na.png,x\n"}, [OK]),
    "csv, formula": ({**A, "p.csv": b"image,caption\na.png,=1+1\n"}, [OK]),
    "csv, null bytes": ({**A, "p.csv": b"image,caption\na.png,x\0y\na\0.png,z\n"}, [OK, GONE]),
    "csv, path upwards": ({**A, "p.csv": b"image,caption\na.png,x\n../../etc/passwd,y\n"}, [OK, OUT]),
    "csv, absolute path": ({**A, "p.csv": b"image,caption\na.png,x\n/etc/passwd,y\n"}, [OK, OUT]),
    "csv, Windows path": ({**A, "p.csv": b"image,caption\nC:\\x\\a.png,x\n"}, [OK]),
    "csv, URL": ({**A, "p.csv": b"image,caption\na.png,x\nhttp://x/a.png,y\n"}, [OK, URL]),
    "csv, folder as image": ({**A, "d/b.png": PNG, "p.csv": b"image,caption\na.png,x\nd,y\n"}, [OK, GONE]),
    "csv, duplicate rows": ({**A, "p.csv": b"image,caption\na.png,x\na.png,x\na.png,x\n"}, [OK, OK, OK]),
    "csv, long caption": ({**A, "p.csv": b"image,caption\na.png," + b"x" * 500_000 + b"\n"}, [OK]),
    "csv, terminal escapes": ({**A, "p.csv": b"image,caption\na.png,\x1b[2Jx\n"}, [OK]),
    "image, empty file": ({**A, "e.png": b"", "p.csv": b"image,caption\na.png,x\ne.png,y\n"}, [OK, BROKEN]),
    "image, text": ({**A, "e.png": b"text", "p.csv": b"image,caption\na.png,x\ne.png,y\n"}, [OK, BROKEN]),
    "image, wrong ending": ({"a.png": picture(1, "JPEG"), "p.csv": b"image,caption\na.png,x\n"}, [OK]),
    "image, CMYK": ({"a.jpg": picture(1, "JPEG", "CMYK"), "p.csv": b"image,caption\na.jpg,x\n"}, [OK]),
    "image, grey": ({"a.png": picture(1, "PNG", "L"), "p.csv": b"image,caption\na.png,x\n"}, [OK]),
    "image, svg": ({**A, "e.svg": b"<svg/>", "p.csv": b"image,caption\na.png,x\ne.svg,y\n"}, [OK, BROKEN]),
    "jsonl, null caption": ({**A, "p.jsonl": b'{"image":"a.png","caption":"x"}\n{"image":"a.png","caption":null}\n'},
                            [OK, MUTE]),
    "jsonl, no image": ({**A, "p.jsonl": b'{"image":"a.png","caption":"x"}\n{"caption":"y"}\n'}, [OK, GONE]),
    "jsonl, list of captions": ({**A, "p.jsonl": b'{"image":"a.png","caption":["x","y"]}\n'}, [OK, OK]),
    "jsonl, number as caption": ({**A, "p.jsonl": b'{"image":"a.png","caption":7}\n'}, [OK]),
    "json, records": ({**A, "p.json": b'[{"image":"a.png","caption":"x"}, 3]'}, [OK, GONE]),
    "json, map": ({**A, **B, "p.json": b'{"a.png":["x","y"],"b.png":"z"}'}, [OK, OK, OK]),
    "karpathy": ({**A, "dataset.json": karpathy(("a.png", ["x", "y"]), ("gone.png", ["z"]))}, [OK, OK, GONE]),
    "karpathy, no sentences": ({**A, "dataset.json": karpathy(("a.png", ["x"]), ("a.png", []))}, [OK, MUTE]),
    "karpathy, path upwards": ({**A, "dataset.json": karpathy(("a.png", ["x"]), ("a/../../etc/passwd", ["y"]))},
                               [OK, OUT]),
    "coco": ({**A, "captions.json": coco([(1, "a.png")], [(1, "x"), (1, "y")])}, [OK, OK]),
    "coco, unknown image": ({**A, "captions.json": coco([(1, "a.png")], [(1, "x"), (9, "y")])}, [OK, GONE]),
    "coco, image without caption": ({**A, **B, "captions.json": coco([(1, "a.png"), (2, "b.png")], [(1, "x")])},
                                    [OK]),
    "imagefolder": ({"train/a.png": PNG, "train/metadata.csv": b"file_name,text\na.png,x\ngone.png,y\n"}, [OK, GONE]),
    "imagefolder, jsonl": ({**A, "metadata.jsonl": b'{"file_name":"a.png","text":"x"}\n'}, [OK]),
    "imagefolder, Parquet": ({**A, "metadata.parquet": parquet(file_name=["a.png"], text=["x"])}, [OK]),
    "parquet, bytes": ({"p.parquet": parquet(image=[PNG, b"", None], caption=["x", "y", "z"])}, [OK, BROKEN, GONE]),
    "parquet, struct": ({"p.parquet": parquet(image=[{"bytes": PNG, "path": "../x"}, None], caption=["x", "y"])},
                        [OK, GONE]),
    "parquet, null caption": ({"p.parquet": parquet(image=[PNG, PNG], caption=["x", None])}, [OK, MUTE]),
    "parquet, lists": ({"p.parquet": parquet(image=[PNG, PNG], caption=[["x", "y"], []])}, [OK, OK, MUTE]),
    "parquet, paths": ({**A, "p.parquet": parquet(image=["a.png", "b.png"], caption=["x", "y"])}, [OK, GONE]),
    "arrow, struct": ({"p.arrow": arrow(image=[{"bytes": PNG, "path": None}, None], caption=["x", "y"])}, [OK, GONE]),
    "arrow, lists": ({"p.arrow": arrow(image=[PNG], captions=[["x", "y"]])}, [OK, OK]),
    "save_to_disk": ({"state.json": b'{"_data_files":[{"filename":"x.arrow"}]}',
                      "x.arrow": arrow(image=[PNG], text=["x"]), "cache-1.arrow": b"?"}, [OK]),
    "save_to_disk, splits": ({"dataset_dict.json": b'{"splits":["b","a"]}',
                              "a/state.json": b'{"_data_files":[{"filename":"x.arrow"}]}',
                              "a/x.arrow": arrow(image=[b"?"], text=["x"]),
                              "b/state.json": b'{"_data_files":[{"filename":"x.arrow"}]}',
                              "b/x.arrow": arrow(image=[PNG], text=["x"])}, [OK, BROKEN]),
    "tar": ({"s.tar": tar(("0.png", PNG), ("0.txt", b"x"), ("1.txt", b"y"))}, [OK, GONE]),
    "tar, json captions": ({"s.tar": tar(("0.png", PNG), ("0.json", b'{"captions":["x","y"]}'))}, [OK, OK]),
    "tar, json of nothing": ({"s.tar": tar(("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG), ("1.json", b"[]"))},
                             [OK, MUTE]),
    "tar, deep json": ({"s.tar": tar(("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG), ("1.json", b"[" * 99_999))},
                       [OK, MUTE]),
    "tar, mixed kinds": ({"s.tar": tar(("0.png", PNG), ("0.txt", b"x"), ("1.webp", picture(2, "WEBP")),
                                       ("1.caption", b"y"))}, [OK, OK]),
    "tar, empty caption": ({"s.tar": tar(("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG), ("1.txt", b"\n"))},
                           [OK, EMPTY]),
    "tar, upwards": ({"s.tar": tar(("0.png", PNG), ("0.txt", b"x"), ("../1.png", PNG), ("../1.txt", b"y"))},
                     [OK, OUT]),
    "tar, gz": ({"s.tar.gz": tar(("0.png", PNG), ("0.txt", b"x"), mode="w:gz")}, [OK]),
    "tar, two shards": ({"s-0.tar": tar(("0.png", PNG), ("0.txt", b"x")),
                         "s-1.tar": tar(("0.png", b"?"), ("0.txt", b"x"))}, [OK, BROKEN]),
    "tar, img2dataset": ({"s.tar": tar(("7.png", PNG), ("7.txt", b"x")),
                          "s.parquet": parquet(key=["7", "8"], status=["success", "failed_to_download"],
                                               caption=["x", "y"], url=["u", "v"])}, [OK, GONE]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_awkward_datasets_keep_every_row(tmp_path, name):
    files, statuses = CASES[name]
    for file, data in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert column(load(tmp_path), "status") == statuses


SEEDS = {
    "p.csv": b'image,caption,split\na.png,"a ""red"" house",train\na.png,b,test\n',
    "p.json": karpathy(("a.png", ["x", "y"]), ("b.png", ["z"])),
    "captions.json": coco([(1, "a.png")], [(1, "x"), (2, "y")]),
    "p.jsonl": b'{"image": "a.png", "caption": ["x"]}\n{"image": "a.png", "caption": "y"}\n',
    "p.parquet": parquet(image=[{"bytes": PNG, "path": "a.png"}] * 3, caption=["x", "y", None]),
    "p.arrow": arrow(image=[{"bytes": PNG, "path": "a.png"}] * 3, caption=["x", "y", None]),
    "p.tar": tar(("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG), ("1.json", b'{"caption": "y"}')),
    "p.tgz": tar(("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG), ("1.txt", b"y"), mode="w:gz"),
}

MUTATIONS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(["set", "cut", "put", "copy"]), st.binary(max_size=6)),
    max_size=6,
)


def mutated(data: bytes, mutations) -> bytes:
    """Bytes with some replaced, removed, inserted or repeated."""
    for place, kind, value in mutations:
        at = place % (len(data) + 1)
        match kind:
            case "set":
                data = data[:at] + value + data[at + len(value) :]
            case "cut":
                data = data[:at] + data[at + 7 * len(value) :]
            case "put":
                data = data[:at] + value + data[at:]
            case _:
                data = data[:at] + data[at // 2 : at] + data[at:]
    return data


def check_mutations(folder, name, mutations):
    (folder / "a.png").write_bytes(PNG)
    (folder / name).write_bytes(mutated(SEEDS[name], mutations))
    with contextlib.suppress(AuditError):
        loaded = load_pairs(folder / name, LoadOptions())
        assert sum(loaded.counts.values()) == len(loaded.pairs) > 0


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=40)
@given(mutations=MUTATIONS)
def test_mutated_files_raise_nothing_but_our_errors(tmp_path_factory, name, mutations):
    check_mutations(tmp_path_factory.getbasetemp(), name, mutations)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=12_500)
@given(mutations=MUTATIONS)
def test_a_hundred_thousand_mutated_files_raise_nothing_but_our_errors(tmp_path_factory, name, mutations):
    check_mutations(tmp_path_factory.getbasetemp(), name, mutations)


def test_a_column_name_of_a_parquet_file_that_is_no_text_is_our_error(tmp_path):
    changes = [(56962, "set", b"\xf2c"), (46423, "set", b"F\xaaz"), (8175, "cut", b"WeX\x84\xa7\xe2"),
               (56182, "cut", b"&D\x02\xe2"), (17999, "set", b"\x87")]  # fmt: skip
    check_mutations(tmp_path, "p.parquet", changes)
