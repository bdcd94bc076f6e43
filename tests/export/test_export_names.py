"""File names made of what strangers call their images."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nc_audit.export.names import IMAGE_ENDINGS, file_name, free_name, image_ending, split_names

NASTY = st.text(st.sampled_from('aA.é\u0301É/\\:*?"<>|\n\x00\x1b\u202e %#-~ßſKK\ufeff🛩\ud800'), max_size=12)


@given(st.lists(st.tuples(NASTY | st.text(max_size=30), st.integers(0, 9)), max_size=12))
@example([("a.png", 0), ("A.PNG", 1), ("a.png", 2), ("a_00000000.png", 3)])
@example([("é.png", 0), ("e\u0301.png", 1), ("É.png", 2)])
@example([("ß.png", 0), ("ss.png", 1), ("SS.png", 2)])
def test_names_are_safe_and_no_two_are_one(entries):
    taken: set[str] = set()
    names = [
        free_name(file_name(image, f"{number:032x}", b"\x89PNG\r\n\x1a\n"), f"{number:032x}", taken)
        for image, number in entries
    ]
    keys = {unicodedata.normalize("NFC", name).casefold() for name in names}
    assert len(keys) == len(names)
    for name in names:
        assert 0 < len(name.encode("utf-8")) < 255
        assert not set(name) & set('/\\:*?"<>|%#\n\x00\x1b\u202e')
        assert not name.startswith((".", "-", "~", " "))
        assert name[-1] not in ". "
        assert f".{name.rpartition('.')[2].lower()}" in IMAGE_ENDINGS


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("airport_1.jpg", "airport_1.jpg"),
        ("a/b/airport 1.JPG", "airport 1.JPG"),
        ("../../etc/passwd", "passwd.png"),
        ("CON", "_CON.png"),
        ("com1.png", "_com1.png"),
        ("comic.png", "comic.png"),
        ("lpt¹.png", "_lpt¹.png"),
        ("aux .png", "_aux .png"),
        (".htaccess", "_.htaccess.png"),
        ("page.html", "page.html.png"),
        ("x.php.png", "x.php.png"),
        (None, "0f.png"),
        ("...", "0f.png"),
        ("=1+1.png", "=1+1.png"),
    ],
)
def test_a_file_name(image, name):
    assert file_name(image, "0f", b"\x89PNG\r\n\x1a\n") == name


@pytest.mark.parametrize(
    ("start", "ending"),
    [
        (b"\xff\xd8\xff\xe0", "jpg"), (b"GIF89a", "gif"), (b"BM\x00", "bmp"), (b"II*\x00", "tiff"),
        (b"RIFF\x00\x00\x00\x00WEBP", "webp"), (b"\x00\x00\x00\x20ftypavif", "avif"), (b"P6\n1 1", "ppm"),
        (b"\x00\x00\x00\x0cjP  \r\n", "jp2"), (b"\x00\x00\x01\x00", "ico"), (b"<svg", "img"), (b"", "img"),
    ],
)  # fmt: skip
def test_the_ending_of_an_image_by_its_first_bytes(start, ending):
    assert image_ending(start) == ending


def test_splits_that_windows_reserves_get_another_name():
    assert split_names(["con", "aux", "train"]) == {"con": "con_", "aux": "aux_", "train": "train"}
