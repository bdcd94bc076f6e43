"""Awkward images, captions and file systems, as they are met: every row stays, nothing hangs, memory stays small."""

from __future__ import annotations

import io
import os
import resource
import socket
import struct
import time
import zlib

import numpy as np
import pytest
from dataset_checks import column, load
from PIL import Image, features

from nc_audit.dataset import ImageStore, decode_image
from nc_audit.errors import DatasetError

OK, GONE, BROKEN, OUT = "ok", "missing_image", "corrupt_image", "outside_root"
EMPTY, MUTE = "empty_caption", "missing_caption"


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb(red: int = 200, green: int = 30, blue: int = 10, size=(8, 6)) -> Image.Image:
    return Image.new("RGB", size, (red, green, blue))


PNG = saved(rgb(), "PNG")


def rotated() -> bytes:
    """A left half of red, a right half of blue, to be turned by 90 degrees: red comes to the top."""
    image = rgb(size=(8, 4))
    image.paste((0, 0, 255), (4, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, "JPEG", exif=exif, quality=95)


def transparent_palette() -> bytes:
    image = Image.new("P", (8, 6), 0)
    image.putpalette([0, 0, 0, 200, 30, 10])
    image.paste(1, (0, 0, 4, 6))
    return saved(image, "PNG", transparency=0)


def sixteen_bits() -> bytes:
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    return saved(Image.fromarray(values), "PNG")


def animated() -> bytes:
    return saved(
        rgb(), "GIF", save_all=True, append_images=[rgb(0, 200, 0), rgb(0, 0, 200)], duration=50, loop=0
    )


def huge_header() -> bytes:
    """A PNG that promises 4 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 65_000, 65_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


def top_left(data: bytes) -> tuple[int, int, int]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def near(colour, wanted, by=12):
    return all(abs(one - other) <= by for one, other in zip(colour, wanted, strict=True))


IMAGES = {
    "CMYK jpeg": (saved(rgb().convert("CMYK"), "JPEG", quality=95), (200, 30, 10)),
    "YCCK-like grey jpeg": (saved(Image.new("L", (8, 6), 90), "JPEG"), (90, 90, 90)),
    "progressive jpeg": (saved(rgb(), "JPEG", progressive=True, quality=95), (200, 30, 10)),
    "rotated by EXIF": (rotated(), (200, 30, 10)),
    "16-bit png": (sixteen_bits(), (0, 0, 0)),
    "palette with transparency": (transparent_palette(), (200, 30, 10)),
    "1-bit png": (saved(Image.new("1", (8, 6), 1), "PNG"), (255, 255, 255)),
    "grey with alpha": (saved(Image.new("LA", (8, 6), (90, 0)), "PNG"), (255, 255, 255)),
    "transparent png": (saved(Image.new("RGBA", (8, 6), (1, 2, 3, 0)), "PNG"), (255, 255, 255)),
    "tiff, lzw": (saved(rgb(), "TIFF", compression="tiff_lzw"), (200, 30, 10)),
    "tiff, float": (saved(Image.new("F", (8, 6), 1.0), "TIFF"), (255, 255, 255)),
    "webp, lossless": (saved(rgb(), "WEBP", lossless=True), (200, 30, 10)),
    "animated gif": (animated(), (200, 30, 10)),
    "bmp": (saved(rgb(), "BMP"), (200, 30, 10)),
    "jpeg with rubbish behind it": (saved(rgb(), "JPEG", quality=95) + b"\0" * 5000, (200, 30, 10)),
    "one pixel": (saved(rgb(size=(1, 1)), "PNG"), (200, 30, 10)),
    "very wide": (saved(rgb(size=(5000, 1)), "PNG"), (200, 30, 10)),
}
if features.check("avif"):
    IMAGES["avif"] = (saved(rgb(), "AVIF", quality=100), (200, 30, 10))


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_kind_are_rgb_the_right_way_up(tmp_path, name):
    data, colour = IMAGES[name]
    (tmp_path / "a.img").write_bytes(data)
    (tmp_path / "p.csv").write_bytes(b"image,caption\na.img,x\n")
    loaded = load(tmp_path)
    assert column(loaded, "status") == [OK]
    read = ImageStore(loaded.roots).read(column(loaded, "image_uri")[0])
    assert near(top_left(read), colour)


WHOLE = saved(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG", quality=95)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("half a jpeg", WHOLE[: len(WHOLE) // 2]),
        ("half a png", saved(Image.effect_noise((64, 64), 80), "PNG")[:900]),
        ("a jpeg of its header", WHOLE[:200]),
    ],
)
def test_a_truncated_image_keeps_its_row_and_is_corrupt_where_decoded(tmp_path, name, data):
    (tmp_path / "a.img").write_bytes(data)
    (tmp_path / "b.img").write_bytes(PNG)
    (tmp_path / "p.csv").write_bytes(b"image,caption\na.img,x\nb.img,y\n")
    loaded = load(tmp_path)
    assert len(loaded.pairs) == 2
    if column(loaded, "status")[0] == OK:  # its header is whole; its pixels are not
        with pytest.raises(DatasetError, match="the image cannot be decoded"):
            decode_image(ImageStore(loaded.roots).read(column(loaded, "image_uri")[0]))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"GIF89a", huge_header(), b"<html>404</html>", b"RIFF"]
)
def test_what_is_no_image_is_a_corrupt_row(tmp_path, data):
    (tmp_path / "a.img").write_bytes(data)
    (tmp_path / "b.img").write_bytes(PNG)
    (tmp_path / "p.csv").write_bytes(b"image,caption\na.img,x\nb.img,y\n")
    assert column(load(tmp_path), "status") == [BROKEN, OK]


CAPTIONS = {
    "Arabic": "طائرة على المدرج",
    "Thai": "เครื่องบินบนรันเวย์",
    "Chinese": "机场跑道上的飞机",
    "Hindi": "रनवे पर विमान",
    "combining": "e\u0301 a\u0300 ñ",
    "right-to-left marks": "\u202eplane\u202c",
    "zero width": "a\u200b plane",
}


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_of_every_script_come_back_as_they_are(tmp_path, name, encoding):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "p.csv").write_bytes(f'image,caption\na.png,"{CAPTIONS[name]}"\n'.encode(encoding))
    loaded = load(tmp_path)
    assert (column(loaded, "status"), column(loaded, "caption")) == ([OK], [CAPTIONS[name]])


TABLES = {
    "emoji only": ("image,caption\na.png,✈️🛫\na.png,x\n".encode(), [OK, OK]),
    "only a zero-width space": ("image,caption\na.png,\u200b\na.png,x\n".encode(), [EMPTY, OK]),
    "UTF-16, big end first": ("image,caption\na.png,é\n".encode("utf-16-be"), [OK]),
    "UTF-16 with BOM and CRLF": ("\ufeffimage,caption\r\na.png,é\r\na.png,ü\r\n".encode("utf-16-le"), [OK, OK]),
    "Latin-1": ("image,caption\na.png,café\na.png,x\n".encode("latin-1"), [OK, OK]),
    "CR only": (b"image,caption\ra.png,x\ra.png,y\r", [OK, OK]),
    "line ends mixed": (b"image,caption\ra.png,x\r\na.png,y\na.png,z", [OK, OK, OK]),
    "null byte in a caption": (b"image,caption\na.png,x\0y\na.png,z\n", [OK, OK]),
    "null byte alone": (b"image,caption\na.png,\0\na.png,z\n", [EMPTY, OK]),
    "duplicated caption columns": (b"image,caption,caption\na.png,x,y\na.png,z,\n", [OK, OK, OK]),
    "duplicated other columns": (b"image,caption,extra,extra\na.png,x,1,2\n", [OK]),
    "one caption per column": (b"image,caption_1,caption_2,caption_3\na.png,x,y,z\na.png,u,,w\n", [OK] * 5),
    "a caption of 1 MB": (b"image,caption\na.png," + b"word " * 200_000 + b"\na.png,y\n", [OK, OK]),
    "a quote never closed": (b'image,caption\na.png,"x\na.png,y\na.png,z\n', DatasetError),
    "a quote in the middle": (b'image,caption\na.png,a 5" gun\na.png,y\n', [OK, OK]),
    "newlines in quotes": (b'image,caption\na.png,"x\n\ny"\na.png,z\n', [OK, OK]),
    "too many cells": (b"image,caption\na.png,x,y,z\na.png,w\n", [OK, OK]),
    "only a header": (b"image,caption\n", DatasetError),
    "nothing": (b"", DatasetError),
    "a header twice": (b"image,caption\na.png,x\nimage,caption\na.png,y\n", [OK, GONE, OK]),
    "spaces around": (b"image, caption\n a.png , x \n", [OK]),
    "a column without a name": (b",image,caption\n0,a.png,x\n1,a.png,y\n", [OK, OK]),
    "percent-encoded path": (b"image,caption\na%2epng,x\na.png,y\n", [GONE, OK]),
    "a path of 5,000 characters": (b"image,caption\n" + b"a" * 5000 + b".png,x\na.png,y\n", [GONE, OK]),
    "a path of 500 folders": (b"image,caption\n" + b"d/" * 500 + b"a.png,x\na.png,y\n", [OK, OK]),
    "home and variables": (b"image,caption\n~/a.png,x\n$HOME/b.png,x\na.png,y\n", [OK, GONE, OK]),
    "5,000 columns": (b"image,caption," + b",".join(b"c%d" % n for n in range(5000)) + b"\na.png,x\n", [OK]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_they_are_met_keep_every_row(tmp_path, name):
    data, statuses = TABLES[name]
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "p.csv").write_bytes(data)
    if statuses is DatasetError:
        with pytest.raises(DatasetError):
            load(tmp_path / "p.csv")
    else:
        assert column(load(tmp_path / "p.csv"), "status") == statuses


def test_a_doubled_column_of_captions_is_read_twice_and_another_told(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "p.csv").write_bytes(b"image,caption,extra,extra,caption\na.png,x,1,2,y\n")
    loaded = load(tmp_path)
    assert (column(loaded, "caption"), column(loaded, "extra")) == (["x", "y"], ["1", "1"])
    assert "p.csv has 2 columns caption; each is a caption" in loaded.notes
    assert "p.csv has 2 columns extra; the first is read" in loaded.notes


def memory() -> int:
    """The most memory this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def special(folder, kind):
    """Something in the folder that is no image file, called `bad.jpg`."""
    path = folder / "bad.jpg"
    match kind:
        case "folder":
            path.mkdir()
            (path / "inner.png").write_bytes(PNG)
        case "loop":
            path.symlink_to("bad.jpg")
        case "chain":
            for number in range(60):
                (folder / f"link{number}").symlink_to(f"link{number + 1}")
            path.symlink_to("link0")
        case "link to nothing":
            path.symlink_to("gone.jpg")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "fifo":
            os.mkfifo(path)
        case "socket":
            end = socket.socket(socket.AF_UNIX)
            here = os.getcwd()  # noqa: PTH109
            os.chdir(folder)  # a socket's address has 108 bytes
            end.bind("bad.jpg")
            os.chdir(here)
            end.close()
        case "sparse":
            with path.open("wb") as handle:
                handle.truncate(10 << 30)
        case "unreadable":
            path.write_bytes(PNG)
            path.chmod(0)


@pytest.mark.parametrize(
    ("kind", "statuses"),
    [
        ("folder", {GONE}),
        ("loop", {GONE}),
        ("chain", {GONE}),
        ("link to nothing", {GONE}),
        ("link to a device", {OUT}),
        ("fifo", {GONE}),
        ("socket", {GONE}),
        ("sparse", {BROKEN}),
        ("unreadable", {BROKEN, OK}),  # the administrator reads it nevertheless
    ],
)
@pytest.mark.parametrize("form", ["csv", "imagefolder", "bare name"])
def test_what_is_no_image_file_neither_hangs_nor_fills_memory(tmp_path, kind, statuses, form):
    inner = tmp_path / ("sub" if form == "bare name" else ".")
    inner.mkdir(exist_ok=True)
    special(inner, kind)
    (tmp_path / "a.png").write_bytes(PNG)
    if form == "imagefolder":
        (tmp_path / "metadata.jsonl").write_bytes(
            b'{"file_name": "a.png", "text": "x"}\n{"file_name": "bad.jpg", "text": "y"}\n'
        )
    else:
        (tmp_path / "p.csv").write_bytes(b"image,caption\na.png,x\nbad.jpg,y\n")
    before, start = memory(), time.monotonic()
    loaded = load(tmp_path)
    assert column(loaded, "status")[0] == OK
    assert column(loaded, "status")[1] in statuses
    assert time.monotonic() - start < 5
    assert memory() - before < 200 << 20


@pytest.mark.parametrize(
    "name", ["p.csv", "p.json", "p.jsonl", "p.parquet", "p.arrow", "p.tar", "metadata.csv"]
)
@pytest.mark.parametrize("kind", ["fifo", "loop", "folder"])
def test_a_pipe_or_loop_in_the_place_of_a_table_is_passed_over(tmp_path, name, kind):
    special(tmp_path, kind)
    (tmp_path / "bad.jpg").rename(tmp_path / name)
    start = time.monotonic()
    with pytest.raises(DatasetError):
        load(tmp_path)
    with pytest.raises(DatasetError):
        load(tmp_path / name)
    assert time.monotonic() - start < 5


def test_folders_within_folders_and_a_loop_of_folders_end(tmp_path):
    deep = tmp_path
    for number in range(120):
        deep /= f"d{number}"
        deep.mkdir()
    (deep / "a.png").write_bytes(PNG)
    (deep / "back").symlink_to(tmp_path)
    (tmp_path / "p.csv").write_bytes(b"image,caption\na.png,x\nback/a.png,y\n")
    start = time.monotonic()
    assert column(load(tmp_path), "status") == [OK, OK]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl", "metadata.csv"])
def test_a_table_of_one_endless_line_is_not_read(tmp_path, name):
    with (tmp_path / name).open("wb") as handle:
        handle.truncate(10 << 30)
    before, start = memory(), time.monotonic()
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert error.value.message == f"{name} is not a table: its first line has more than 16,777,216 bytes"
    assert time.monotonic() - start < 5
    assert memory() - before < 200 << 20


@pytest.mark.parametrize(("name", "start"), [("p.csv", b"image,caption\n"), ("p.tsv", b"image\tcaption\n")])
def test_a_line_of_any_length_is_not_read_whole(tmp_path, name, start):
    with (tmp_path / name).open("wb") as handle:
        handle.write(start)
        handle.truncate(1 << 29)
    before, begun = memory(), time.monotonic()
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert error.value.message == f"{name} line 2: it has more than 16,777,216 characters"
    assert time.monotonic() - begun < 10
    assert memory() - before < 300 << 20


def test_a_quote_that_swallows_a_large_file_is_told_before_it_has(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "p.csv").write_bytes(b'image,caption\na.png,x\na.png,"y\n' + b"a.png,z\n" * 140_000)
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert error.value.message == "p.csv line 131,075: a quote opened 131,072 lines above is never closed"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10 << 30, "p.json has 10,737,418,240 bytes; json is read whole, up to 2,147,483,648"),
        (1 << 30, "p.json is not json: it begins with 65,536 empty bytes"),
    ],
)
def test_json_that_would_fill_memory_is_not_read(tmp_path, size, message):
    with (tmp_path / "p.json").open("wb") as handle:
        handle.truncate(size)
    before = memory()
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert error.value.message == message
    assert memory() - before < 200 << 20
