"""Where images are found and where they must not be read; what decoding accepts, and what hostile bytes give."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from dataset_checks import column, load
from PIL import Image

from nc_audit.dataset import ImageStore, decode_image, fold, load_pairs, mark_corrupt
from nc_audit.errors import DatasetError
from nc_audit.schema import check_table


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG header that promises so many pixels, and none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def csv_of(*images: str) -> str:
    return "image,caption\n" + "".join(f'"{image}",caption {at}\n' for at, image in enumerate(images))


@pytest.fixture
def places(tmp_path, draw):
    """A dataset, a folder of images elsewhere, and a secret that belongs to neither."""
    draw(
        "ds/in.png",
        "ds/sub/deep.png",
        "elsewhere/images/out.png",
        "elsewhere/images/cls/far.png",
        "secret.png",
    )
    return tmp_path / "ds"


def test_foreign_paths_are_resolved_by_ending_and_base_name(places):
    (places / "p.csv").write_text(
        csv_of(
            "in.png",
            "/data/x/sub/deep.png",
            "C:\\Users\\me\\deep.png",
            "sub\\deep.png",
            "../other/in.png",
            "./sub/deep.png",
        )
    )
    loaded = load(places)
    assert column(loaded, "status") == ["ok"] * 6
    assert column(loaded, "resolved_by") == ["path", "path", "base_name", "path", "base_name", "path"]
    assert column(loaded, "image_uri")[4:] == ["dataset:in.png", "dataset:sub/deep.png"]
    assert (
        "2 rows with an image whose path does not exist here, found by its base name, which is unique"
        in loaded.notes
    )
    assert "1 row with an image whose path does not exist here, found by the path's ending" in loaded.notes


def test_image_root(places, tmp_path):
    names = (
        "images/out.png",
        "/home/x/images/out.png",
        "out.png",
        "far.png",
        "/home/x/far.png",
        "in.png",
        "gone.png",
    )
    (places / "p.csv").write_text(csv_of(*names, "/home/x/gone.png"))
    loaded = load(places, image_root=tmp_path / "elsewhere")
    assert column(loaded, "image_uri") == [
        *["image_root:images/out.png"] * 3,
        *["image_root:images/cls/far.png"] * 2,
        "dataset:in.png",
        None,
        None,
    ]
    assert column(loaded, "resolved_by") == [
        *["image_root", "image_root", "file_name", "file_name", "base_name", "path", None, None]
    ]
    assert column(loaded, "status")[6:] == ["missing_image"] * 2
    assert loaded.roots == {"dataset": str(places), "image_root": str(tmp_path / "elsewhere")}
    store = ImageStore(loaded.roots)
    assert store.read("image_root:images/out.png") == (tmp_path / "elsewhere/images/out.png").read_bytes()
    with pytest.raises(DatasetError, match=r"--image-root .*p\.csv is not a folder"):
        load(places, image_root=places / "p.csv")


def test_paths_outside_are_never_read(places, tmp_path):
    secret = tmp_path / "secret.png"
    (places / "link.png").symlink_to(secret)
    (places / "folder").symlink_to(tmp_path / "elsewhere")
    (places / "fine.png").symlink_to(places / "in.png")
    (places / "p.csv").write_text(
        csv_of(
            *(
                "in.png",
                "../secret.png",
                str(secret),
                "sub/../../secret.png",
                "link.png",
                "folder/images/out.png",
            ),
            *("fine.png", "/nowhere/x.png", f"file://{secret}", "out.png"),
        )
    )
    loaded = load(places)
    assert column(loaded, "status") == [
        "ok",
        *["outside_root"] * 5,
        "ok",
        *["outside_root"] * 2,
        "missing_image",
    ]
    assert all(image_id is None for image_id in column(loaded, "image_id")[1:6])
    details = column(loaded, "status_detail")
    assert details[1] == "the path leads outside the dataset's folder"
    assert details[4] == f"link.png leads through a symbolic link to {secret}, outside the dataset's folder"
    assert (
        "8 rows with an image outside the dataset's folder: name its folder with --image-root DIR"
        not in loaded.notes
    )
    assert (
        "7 rows with an image outside the dataset's folder: name its folder with --image-root DIR"
        in loaded.notes
    )
    store = ImageStore(loaded.roots)
    for uri in (
        "dataset:../secret.png",
        "dataset:link.png",
        f"dataset:{secret}",
        "dataset:folder/images/out.png",
    ):
        with pytest.raises(DatasetError, match="leads outside the dataset's folder"):
            store.read(uri)


def test_traversal_in_json_is_not_followed(places, write):
    images = [{"filename": "../secret.png", "sentences": ["x"]}, {"filename": "in.png", "sentences": ["y"]}]
    write("ds/dataset.json", {"images": images})
    loaded = load(places)
    assert column(loaded, "status") == ["outside_root", "ok"]
    assert column(loaded, "image_id")[0] is None


def test_a_linked_folder_outside_is_named(places, tmp_path):
    (places / "images").symlink_to(tmp_path / "elsewhere" / "images")
    (places / "p.csv").write_text(csv_of("in.png", "out.png"))
    loaded = load(places)
    target = tmp_path / "elsewhere" / "images"
    assert column(loaded, "status") == ["ok", "outside_root"]
    detail = f"images is a symbolic link to {target}, outside the dataset's folder"
    assert column(loaded, "status_detail")[1] == detail
    assert (
        f"images is a symbolic link to {target}, outside the dataset; --image-root {target} lets it be read"
        in loaded.notes
    )
    assert load(places, image_root=target).counts == {"ok": 2}


def test_a_base_name_must_be_unique_for_a_foreign_path(places, draw):
    draw("ds/one/same.png", "ds/two/same.png")
    (places / "p.csv").write_text(csv_of("in.png", "/data/same.png"))
    loaded = load(places)
    assert column(loaded, "status") == ["ok", "missing_image"]
    assert column(loaded, "status_detail")[1] == "2 files are called same.png: one/same.png, two/same.png"


def test_missing_among_foreign_paths_that_were_found_is_missing_not_outside(places):
    (places / "p.csv").write_text(csv_of("/data/gone.png", "/data/deep.png", "/other/gone.png"))
    assert column(load(places), "status") == ["missing_image", "ok", "outside_root"]


def test_odd_names(places):
    (places / "p.csv").write_bytes(
        csv_of(
            "in.png",
            "sub",
            " in.png ",
            "x" * 5000,
            "pipe",
            "https://example.org/in.png",
            "S3://bucket/in.png",
            "",
        ).encode()
        + b"nul\0l.png,caption\n"
    )
    os.mkfifo(places / "pipe")
    loaded = load(places)
    status = ["ok", "missing_image", "ok", "missing_image", "missing_image", "remote_image", "remote_image"]
    assert column(loaded, "status") == [*status, "missing_image", "missing_image"]
    assert column(loaded, "status_detail")[1] == "sub is a folder"
    assert column(loaded, "status_detail")[4] == "pipe is not a regular file"
    assert column(loaded, "status_detail")[8] == "the path holds a null character"
    assert "2 rows with an image given by URL: --allow-network fetches http and https" in loaded.notes


def test_decomposed_file_names_are_the_same_names(places, draw):
    draw("ds/img/e\u0301te\u0301.png")
    (places / "p.csv").write_text(csv_of("\u00e9t\u00e9.png"))
    assert column(load(places), "status") == ["ok"]


def test_corrupt_images(places):
    broken = {
        "zero.png": b"",
        "text.jpg": b"not an image at all",
        "bomb.png": png_of_size(60_000, 60_000),
        "big.png": png_of_size(20_000, 20_000),
        "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "head.png": png_of_size(3, 3)[:20],
    }
    for name, data in broken.items():
        (places / name).write_bytes(data)
    (places / "p.csv").write_text(csv_of("in.png", *broken))
    loaded = load(places)
    assert column(loaded, "status") == ["ok"] + ["corrupt_image"] * 6
    details = column(loaded, "status_detail")
    assert details[1:6] == [
        "the file is empty (0 bytes)",
        "the file is not an image of a known format",
        "the image has more than 178,956,970 pixels",
        "the image has more than 178,956,970 pixels",
        "the file is not an image of a known format",
    ]
    assert all(column(loaded, "image_id"))


def test_large_images_within_the_limit_warn_nobody(places):
    (places / "large.png").write_bytes(png_of_size(10_000, 10_000))
    (places / "p.csv").write_text(csv_of("large.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_pairs(places).counts == {"ok": 1}


def test_no_usable_pair(places):
    (places / "p.csv").write_text(csv_of("gone.png", "gone too.png", "https://example.org/x.png"))
    with pytest.raises(DatasetError) as raised:
        load(places)
    assert raised.value.message == (
        f"{places} has no usable pair among 3 rows: 2 missing_image, 1 remote_image; "
        "row 0: 'gone.png': no such file below the dataset's folder"
    )
    assert raised.value.hint == "name the folder of the images with --image-root DIR"
    assert raised.value.context["counts"] == {"missing_image": 2, "remote_image": 1}


def test_progress_counts_image_files(places):
    (places / "p.csv").write_text(csv_of("in.png", "in.png", "sub/deep.png"))
    seen: list[tuple[int, int | None]] = []
    load_pairs(places, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 2)]


def test_store_refuses_unknown_roots_and_reports_lost_files(places):
    store = ImageStore({"dataset": places})
    with pytest.raises(DatasetError) as raised:
        store.read("home:in.png")
    assert (raised.value.message, raised.value.hint) == ("home:in.png names no known root", "roots: dataset")
    with pytest.raises(DatasetError, match=r"dataset:lost\.png cannot be read: No such file"):
        store.read("dataset:lost.png")
    with pytest.raises(DatasetError, match="is not a path"):
        store.read("dataset:nul\0l.png")


def test_mark_corrupt(places):
    (places / "p.csv").write_text(csv_of("in.png", "sub/deep.png", "in.png", "gone.png"))
    pairs = load(places).pairs
    image_id = pairs["image_id"][0].as_py()
    marked = check_table("pairs", mark_corrupt(pairs, {image_id: "truncated", "unknown": "x"}))
    assert marked["status"].to_pylist() == ["corrupt_image", "ok", "corrupt_image", "missing_image"]
    assert marked["status_detail"].to_pylist()[:3] == ["truncated", None, "truncated"]
    assert marked["pair_id"] == pairs["pair_id"]
    assert mark_corrupt(marked, {image_id: "another reason"}).equals(marked)
    assert mark_corrupt(pairs, {}).equals(pairs)
    folded = fold(marked)
    assert folded.row_pair.tolist() == [-1, 0, -1, -1]
    assert len(folded.image_ids) == 1


# Decoding


def test_modes_become_rgb():
    square = Image.new("RGB", (8, 8), (200, 100, 50))
    assert decode_image(saved(square, "PNG")).getpixel((0, 0)) == (200, 100, 50)
    cmyk = decode_image(saved(square.convert("CMYK"), "JPEG", quality=100)).getpixel((0, 0))
    assert np.abs(np.array(cmyk) - (200, 100, 50)).max() <= 3
    assert decode_image(saved(square.convert("L"), "PNG")).getpixel((0, 0)) == (124, 124, 124)
    assert decode_image(saved(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(saved(square.quantize(4), "GIF")).getpixel((0, 0)) == (200, 100, 50)


def test_transparency_lies_over_white():
    assert decode_image(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (
        255,
        255,
        255,
    )
    assert decode_image(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "PNG")).getpixel((0, 0)) == (
        204,
        204,
        204,
    )
    assert decode_image(saved(Image.new("LA", (2, 2), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] * 256)
    hidden = saved(palette, "PNG", transparency=bytes([0] * 256))
    assert decode_image(hidden).getpixel((0, 0)) == (255, 255, 255)


def test_deep_greys_are_scaled_not_clipped():
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        decoded = np.asarray(decode_image(saved(Image.fromarray(levels), form)))[0, :, 0]
        assert decoded.tolist() == [0, 1, 128, 255]
    unit = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    assert np.asarray(decode_image(saved(Image.fromarray(unit), "TIFF")))[0, :, 0].tolist() == [
        0,
        128,
        255,
        0,
    ]
    wide = np.array([[-1000.0, 0.0, 1000.0]], np.float32)
    assert np.asarray(decode_image(saved(Image.fromarray(wide), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    flat = np.full((1, 2), -7, np.int32)
    assert np.asarray(decode_image(saved(Image.fromarray(flat), "TIFF"))).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(saved(Image.fromarray(pixels), "PNG", exif=exif))
    flips = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.T,
             6: pixels[::-1].T, 7: pixels[::-1, ::-1].T, 8: pixels.T[::-1]}  # fmt: skip
    assert np.array_equal(np.asarray(decoded)[:, :, 0], flips[orientation])
    assert decoded.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_jpeg_is_scaled_while_decoding_but_never_below_the_hint(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.new("RGB", (1600, 800), (9, 99, 199)), "JPEG", exif=exif)
    expected = (400, 200) if orientation == 1 else (200, 400)
    hint = (300, 200) if orientation == 1 else (200, 300)
    assert decode_image(data, hint).size == expected
    assert decode_image(data).size == tuple(4 * side for side in expected)
    assert decode_image(data, (5000, 5000)).size == decode_image(data).size


def test_truncated_and_broken_images_raise():
    data = saved(Image.effect_noise((64, 64), 90), "JPEG")
    with pytest.raises(DatasetError, match="the image cannot be decoded: image file is truncated"):
        decode_image(data[: len(data) // 2])
    with pytest.raises(DatasetError, match="the image has more than 178,956,970 pixels"):
        decode_image(png_of_size(50_000, 50_000))
    with pytest.raises(DatasetError, match="the image cannot be decoded"):
        decode_image(png_of_size(30, 30))
    for data in (b"", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP", bytes(100)):
        with pytest.raises(DatasetError):
            decode_image(data)


def test_no_damaged_byte_escapes_as_another_error():
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = np.frombuffer(saved(picture, form), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[generator.integers(0, min(len(whole), 200), 6)] = generator.integers(0, 255, 6)
            try:
                assert decode_image(damaged.tobytes()).mode == "RGB"
            except DatasetError:
                continue
