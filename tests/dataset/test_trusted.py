from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nc_audit.dataset import read_trusted
from nc_audit.errors import DatasetError

PAIRS = pa.table(
    {
        "pair_id": ["p0", "p1", "p2", "p3", "p4"],
        "image": ["a/one.jpg", "a/one.jpg", "a/two.jpg", "b/two.jpg", "a/three.jpg"],
        "caption": ["A tree.", "Two trees", "A road", "A lake", "Broken"],
        "status": ["ok", "ok", "ok", "ok", "corrupt_image"],
    }
)


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_pairs_by_id_in_any_kind_of_file(tmp_path, kind):
    path = tmp_path / f"trusted.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"pair_id": ["p1", "p0", "nobody"]}), path)
    elif kind == "jsonl":
        write(path, "".join(json.dumps({"pair_id": one}) + "\n" for one in ("p1", "p0", "nobody")))
    else:
        write(path, "\ufeffpair_id,x\np1,\np0,\nnobody,\n".replace(",", "\t" if kind == "tsv" else ","))
    found = read_trusted(path, PAIRS)
    assert found.pair_ids == ["p0", "p1"]
    assert found.num_unknown == 1


def test_pairs_by_image_and_caption_as_folding_compares_them(tmp_path):
    path = write(
        tmp_path / "t.csv", "image,caption\na/one.jpg,a TREE\none.jpg,two trees.\na/three.jpg,Broken\n"
    )
    found = read_trusted(path, PAIRS)
    assert found.pair_ids == ["p0", "p1"]
    assert found.num_unknown == 1, "a pair that is not ok cannot be vouched for"


def test_a_last_part_that_several_images_share_tells_nothing(tmp_path):
    path = write(tmp_path / "t.csv", "filename,caption\ntwo.jpg,a road\nb/two.jpg,a lake\n")
    found = read_trusted(path, PAIRS)
    assert found.pair_ids == ["p3"]
    assert found.num_unknown == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "id,x\n1,2\n", "t.csv: no column pair_id, and no image and caption columns (found id, x)"),
        ("t.csv", "pair_id\nnobody\n", "t.csv: none of its 1 rows is a pair of the dataset"),
        ("t.jsonl", "[1]\n", "--trusted: t.jsonl cannot be read: a line is no JSON object"),
    ],
)
def test_a_file_that_vouches_for_nothing_is_refused(tmp_path, name, text, message):
    with pytest.raises(DatasetError) as caught:
        read_trusted(write(tmp_path / name, text), PAIRS)
    assert caught.value.message == message


def test_no_file(tmp_path):
    with pytest.raises(DatasetError) as caught:
        read_trusted(tmp_path / "none.csv", PAIRS)
    assert caught.value.message == f"--trusted: there is no file {tmp_path / 'none.csv'}"


def test_binary_rubbish_is_refused_in_a_line(tmp_path):
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        path = tmp_path / name
        path.write_bytes(bytes(range(128, 256)) * 9)
        with pytest.raises(DatasetError) as caught:
            read_trusted(path, PAIRS)
        assert "\n" not in caught.value.message
