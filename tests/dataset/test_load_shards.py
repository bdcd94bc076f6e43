"""Webdataset shards and img2dataset output: every pair a row, hostile members a status, damage a clear line."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_checks import check_images, column, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nc_audit.dataset import shards
from nc_audit.errors import AuditError, DatasetError


def picture(colour: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def shard(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, value in members:
            info = tarfile.TarInfo(name)
            if isinstance(value, bytes):
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
            else:
                info.type, info.linkname = value
                tar.addfile(info)
    return path


PAIRS = [
    ("a/0.jpg", picture(10, "JPEG")), ("a/0.txt", b"a pond\n"),
    ("1.png", picture(20)), ("1.caption", b"\xef\xbb\xbfa road"),
    ("2.json", json.dumps({"text": ["a lake", "a boat"]}).encode()), ("2.webp", picture(30, "WEBP")),
    ("__key__.cls", b"3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode"), [("train-0.tar", "w"), ("train-0.tar.gz", "w:gz"), ("train-0.tgz", "w:gz")]
)
def test_a_shard_gives_its_pairs_and_its_images(tmp_path, name, mode):
    shard(tmp_path / name, PAIRS, mode)
    loaded = load(tmp_path)
    assert loaded.layout == f"webdataset {name}"
    assert column(loaded, "caption") == ["a pond", "a road", "a lake", "a boat"]
    assert column(loaded, "image") == ["a/0.jpg", "1.png", "2.webp", "2.webp"]
    assert column(loaded, "split") == ["train"] * 4
    check_images(loaded)
    assert all(uri.startswith(f"dataset:{name}#") for uri in column(loaded, "image_uri"))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_images_of_more_than_a_block_are_whole(tmp_path, mode):
    noise = Image.effect_noise((1100, 1100), 90)
    members = []
    for number, form in enumerate(("PNG", "TIFF", "BMP", "WEBP", "AVIF", "GIF", "JPEG2000", "PPM", "JPEG")):
        buffer = io.BytesIO()
        (noise if form in {"PNG", "TIFF", "BMP", "GIF", "PPM"} else noise.resize((64, 64))).save(buffer, form)
        ending = {"JPEG2000": "jp2"}.get(form, form.lower())
        # What follows an image's end is nothing to its reader.
        data = buffer.getvalue() + bytes((1 << 20) + 1)
        members += [(f"{number}.{ending}", data), (f"{number}.txt", b"a pond")]
    shard(tmp_path / ("a.tar" if mode == "w" else "a.tar.gz"), members, mode)
    loaded = load(tmp_path)
    assert column(loaded, "status") == ["ok"] * 9
    check_images(loaded)


# Peak memory is of a process's whole life, so that each is a process of its own.
PEAK = """
import resource, sys
from pathlib import Path
from nc_audit.dataset import load_pairs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = load_pairs(Path(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
print(*loaded.pairs["status"].to_pylist(), loaded.pairs["status_detail"][1])
"""


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_huge_member_that_is_no_image_is_never_held_whole(tmp_path, mode):
    name = "a.tar" if mode == "w" else "a.tar.gz"
    zeros = tarfile.TarInfo("1.png")
    zeros.size = 192 << 20
    with tarfile.open(tmp_path / name, mode) as tar:
        for member, value in (("0.png", picture(1)), ("0.txt", b"fine"), ("1.txt", b"zeros")):
            info = tarfile.TarInfo(member)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
        with (tmp_path / "zeros").open("w+b") as file:
            file.truncate(zeros.size)
            tar.addfile(zeros, file)
    (tmp_path / "zeros").unlink()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown, said = done.stdout.splitlines()
    assert said == "ok corrupt_image the file is not an image of a known format"
    assert int(grown) < 100  # MiB


def test_hostile_members_are_rows_with_a_status(tmp_path):
    link = (tarfile.SYMTYPE, "/etc/passwd")
    members = [("0.png", picture(1)), ("0.txt", b"fine"), ("1.png", link), ("1.txt", b"link"),
               ("../2.png", picture(2)), ("../2.txt", b"up"), ("/3.png", picture(3)), ("/3.txt", b"absolute"),
               ("4.png", b"no image"), ("4.txt", b"broken"), ("5.txt", b"alone"), ("6.png", picture(6)),
               ("7.png", (tarfile.CHRTYPE, "")), ("7.txt", b"device"),
               ("8.png", picture(8)), ("8.json", b"{"), ("8.png", picture(9)), ("8.txt", b"same name")]  # fmt: skip
    shard(tmp_path / "a.tar", members)
    loaded = load(tmp_path)
    assert column(loaded, "status") == ["ok", "missing_image", "outside_root", "outside_root", "corrupt_image",
                                        "missing_image", "missing_caption", "missing_image", "missing_caption",
                                        "ok"]  # fmt: skip
    assert column(loaded, "status_detail")[1] == "1.png is a link, not a file with bytes of its own"
    assert column(loaded, "status_detail")[2] == "the member's name leads outside the shard"


def test_a_truncated_shard_keeps_what_came_before_and_says_so(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        [("0.png", picture(1)), ("0.txt", b"fine"), ("1.txt", b"cut"), ("1.png", b"x" * 2000)],
    )
    path.write_bytes(path.read_bytes()[:4096])
    loaded = load(tmp_path)
    assert column(loaded, "status") == ["ok", "corrupt_image"]
    assert "a.tar is damaged, and what follows was not read: unexpected end of data" in loaded.notes


def test_rows_that_img2dataset_could_not_fetch_stay_rows(tmp_path):
    shard(tmp_path / "00000.tar", [("000000001.jpg", picture(1, "JPEG")), ("000000001.txt", b"a pond")])
    table = {"url": ["http://x/0", "http://x/1"], "caption": ["gone", "a pond"], "key": ["000000000", "000000001"],
             "status": ["failed_to_download", "success"],
             "error_message": ["HTTP Error 404: Not Found", None]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["gone", "a pond"]
    assert column(loaded, "status") == ["missing_image", "ok"]
    assert column(loaded, "status_detail")[0] == "img2dataset: failed_to_download: HTTP Error 404: Not Found"
    assert not any("was not read" in note for note in loaded.notes)


def test_a_file_that_is_no_tar_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DatasetError) as error:
        load(path)
    assert error.value.message == f"{path} states no image-caption pairs in a known form"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.integers(0, 12000), st.integers(0, 255)), max_size=8),
    end=st.integers(0, 12000),
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_damaged_shards_never_crash(tmp_path, mode, places, end):
    path = shard(tmp_path / "a.tar", PAIRS, mode)
    data = bytearray(path.read_bytes())
    for at, value in places:
        data[at % len(data)] = value
    path.write_bytes(data[: max(end, 1)])
    with contextlib.suppress(AuditError):
        assert len(load(path).pairs) > 0


def test_shards_of_which_nothing_was_fetched_give_their_failed_rows(tmp_path):
    table = {"url": ["http://x/0"], "caption": ["gone"], "key": ["000000000"], "status": ["failed_to_download"],
             "error_message": ["timed out"]}  # fmt: skip
    shard(tmp_path / "00000.tar", [("000000000.jpg", picture(1, "JPEG")), ("000000000.txt", b"a pond")])
    shard(tmp_path / "00001.tar", [])
    (tmp_path / "00002.tar").write_bytes(b"")
    for name in ("00001", "00002"):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    loaded = load(tmp_path)
    assert column(loaded, "source") == ["00000.tar", "00001.tar", "00002.tar"]
    assert column(loaded, "status") == ["ok", "missing_image", "missing_image"]
    assert column(loaded, "status_detail")[1] == "img2dataset: failed_to_download: timed out"


def test_a_damaged_place_costs_only_what_stands_there(tmp_path):
    members = [
        (f"{i}.{end}", value) for i in range(4) for end, value in (("png", picture(i)), ("txt", b"c%d" % i))
    ]
    data = bytearray(shard(tmp_path / "a.tar", members).read_bytes())
    data[0:512] = b"\xff" * 512  # the first header
    data[5 * 1024 : 5 * 1024 + 512] = b"\xff" * 512  # the third caption's
    (tmp_path / "a.tar").write_bytes(data)
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["c0", "c1", None, "c3"]
    assert column(loaded, "status") == ["missing_image", "ok", "missing_caption", "ok"]
    assert sum("a.tar is damaged, and reading goes on at byte" in note for note in loaded.notes) == 2


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tgz", "w:gz")])
def test_captions_that_follow_all_images_are_found(tmp_path, name, mode):
    one = picture(1)
    shard(
        tmp_path / name,
        [(f"{i:04}.png", one) for i in range(1200)] + [(f"{i:04}.txt", b"c%d" % i) for i in range(1200)],
        mode,
    )
    loaded = load(tmp_path)
    assert loaded.counts == {"ok": 1200}


def test_keys_of_several_folders_are_told_apart(tmp_path):
    members = []
    for folder in ("x", "y"):
        members += [(f"{folder}/7.png", picture(ord(folder))), (f"{folder}/7.txt", folder.encode())]
    members += [("z/8.png", picture(8)), ("z/8.txt", b"z")]
    shard(tmp_path / "a.tar", members)
    table = {"key": ["y/7", "8", "7"], "caption": ["y", "z", "which?"], "url": ["u"] * 3,
             "status": ["success", "success", "failed_to_resize"], "error_message": [None, None, "bad"]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["y", "z", "which?", "x"]
    assert column(loaded, "status") == ["ok", "ok", "missing_image", "ok"]


def test_captions_that_are_no_utf8_are_noted_with_their_name(tmp_path):
    shard(
        tmp_path / "a.tar",
        [("0.png", picture(1)), ("0.txt", "an île".encode("cp1252")),
         ("1.png", picture(2)), ("1.txt", "a château".encode("utf-16"))],
    )  # fmt: skip
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["an île", "a château"]
    assert (
        "1 caption of a.tar is not valid UTF-8 and read as Windows-1252, the superset of Latin-1 "
        "(first: 0.txt); check accented letters" in loaded.notes
    )


def test_a_compressed_shard_that_unfolds_too_far_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SMALL", 100_000)
    members = [("0.png", picture(1)), ("0.txt", b"fine"), ("1.bin", bytes(2_000_000)), ("2.png", picture(2))]
    shard(tmp_path / "a.tgz", members, "w:gz")
    loaded = load(tmp_path)
    assert column(loaded, "caption") == ["fine"]
    assert any("it decompresses to more than" in note for note in loaded.notes)


def test_the_split_of_a_member_goes_before_that_of_the_file(tmp_path):
    said = json.dumps({"caption": "b", "split": "test"}).encode()
    shard(
        tmp_path / "train.tar",
        [("0.png", picture(1)), ("0.txt", b"a"), ("1.png", picture(2)), ("1.json", said)],
    )
    assert column(load(tmp_path), "split") == ["train", "test"]
    assert column(load(tmp_path, split="test"), "caption") == ["b"]
