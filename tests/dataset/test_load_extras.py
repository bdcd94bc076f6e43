"""Columns of the input that the audit does not need are kept, whatever they are called and hold."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_run import picture

from nc_audit.dataset import LoadOptions, load_pairs
from nc_audit.dataset.extras import MAX_EXTRAS
from nc_audit.schema import PAIRS, check_table


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def extras(pairs):
    return pairs.drop_columns(PAIRS.names).to_pylist()


def test_csv_cells_stay_text(folder):
    (folder / "captions.csv").write_text(
        "image,caption,uid,width\n0.png,a red house,0f0f,07\n1.png,\"['a boat', 'a ship']\",,8\n2.png,a tent\n"
    )
    pairs = load_pairs(folder).pairs
    assert extras(pairs) == [
        {"uid": "0f0f", "width": "07"},
        {"uid": "", "width": "8"},
        {"uid": "", "width": "8"},
        {"uid": None, "width": None},
    ]
    assert check_table("pairs", pairs) is pairs


def test_json_values_keep_their_type_and_mixtures_become_json(folder):
    records = [
        {
            "image": "0.png",
            "caption": "a",
            "n": 7,
            "f": 0.5,
            "b": True,
            "mixed": 1,
            "list": [1, "x"],
            "big": 2**70,
        },
        {"image": "1.png", "caption": "b", "mixed": "two", "odd\ud800": "\udfff", "empty": None},
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    assert extras(load_pairs(folder).pairs) == [
        {
            "n": 7,
            "f": 0.5,
            "b": True,
            "mixed": "1",
            "list": '[1, "x"]',
            "big": str(2**70),
            "odd?": None,
            "empty": None,
        },
        {
            "n": None,
            "f": None,
            "b": None,
            "mixed": "two",
            "list": None,
            "big": None,
            "odd?": "?",
            "empty": None,
        },
    ]


def test_parquet_gives_plain_values_and_no_bytes_or_vectors(folder):
    table = pa.table(
        {
            "image": ["0.png", "1.png"],
            "caption": ["a", "b"],
            "aesthetic": pa.array([5.5, None], pa.float32()),
            "sha256": ["x", "y"],
            "thumb": [b"1", b"2"],
            "vector": [[1.0], [2.0]],
        }
    )
    pq.write_table(table, folder / "pairs.parquet")
    assert extras(load_pairs(folder, LoadOptions(image_column="image")).pairs) == [
        {"aesthetic": 5.5, "sha256": "x"},
        {"aesthetic": None, "sha256": "y"},
    ]


def test_names_that_a_run_uses_itself_get_a_prefix(folder):
    (folder / "captions.csv").write_text(
        "image,caption,row,weight,input_row\n0.png,a,5,0.5,9\n1.png,b,6,0.6,8\n"
    )
    pairs = load_pairs(folder).pairs
    assert pairs["row"].to_pylist() == [0, 1]
    assert extras(pairs) == [
        {"input_weight": "0.5", "input_row": "9"},
        {"input_weight": "0.6", "input_row": "8"},
    ]


def test_a_split_and_a_limit_take_their_own_rows(folder):
    (folder / "captions.csv").write_text(
        "image,caption,split,k\n0.png,a,train,x\n1.png,b,test,y\n2.png,c,test,z\n"
    )
    assert extras(load_pairs(folder, LoadOptions(split="test")).pairs) == [{"k": "y"}, {"k": "z"}]
    assert extras(load_pairs(folder, LoadOptions(split="test", limit=1)).pairs) == [{"k": "y"}]


def test_a_table_as_wide_as_a_trap_is_bounded(folder):
    names = [f"c{i}" for i in range(5000)]
    (folder / "captions.csv").write_text(
        f"image,caption,{','.join(names)}\n0.png,a,{','.join('x' for _ in names)}\n"
    )
    loaded = load_pairs(folder)
    assert len(extras(loaded.pairs)[0]) == MAX_EXTRAS
    assert "captions.csv has 5,000 further columns; the first 100 are kept for exports" in loaded.notes


def test_karpathy_and_coco_fields_are_kept(folder):
    sentences = [{"raw": "a house", "tokens": ["a", "house"], "sentid": 8}, {"raw": "a hut", "sentid": 9}]
    karpathy = {"images": [{"filename": "0.png", "split": "train", "cocoid": 7, "sentences": sentences}]}
    (folder / "dataset.json").write_text(json.dumps(karpathy))
    assert extras(load_pairs(folder).pairs) == [{"cocoid": 7, "sentid": 8}, {"cocoid": 7, "sentid": 9}]
    coco = {
        "images": [{"id": 5, "file_name": "0.png", "license": 3, "width": 8}],
        "annotations": [{"id": 11, "image_id": 5, "caption": "a house"}],
    }
    (folder / "captions.json").write_text(json.dumps(coco))
    assert extras(load_pairs(folder / "captions.json").pairs) == [
        {"id": 11, "license": 3, "width": 8, "input_image_id": 5}
    ]
