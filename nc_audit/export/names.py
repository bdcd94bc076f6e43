"""Names that are safe wherever an export may go: for files, splits and image endings.

Image names and splits come from strangers. Nothing here keeps a folder, a control character, a name that Windows
reserves, or two names that a file system without case would take for one.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

DEFAULT_SPLIT = "train"
UNNAMED_SPLIT = "unnamed"

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"|?*%#]')  # the last two are read as escapes and rows in addresses
_MAX_STEM, _MAX_ENDING = 150, 16

IMAGE_ENDINGS = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".jp2": "image/jp2",
    ".ppm": "image/x-portable-pixmap",
    ".pgm": "image/x-portable-graymap",
    ".avif": "image/avif",
    ".ico": "image/x-icon",
}
_STARTS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\0\0\0\x0cjP  ", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"\0\0\1\0", "ico"),
)


def split_names(splits: list[str | None]) -> dict[str | None, str]:
    """A file name for each split of a dataset, in the order given.

    Letters, digits and underscores stay, which is what `datasets` allows; two splits never share a name.

    Example:
        >>> split_names(["train", "../test", "TRAIN"])
        {'train': 'train', '../test': 'test', 'TRAIN': 'TRAIN_2'}
    """
    if splits == [None]:
        return {None: DEFAULT_SPLIT}
    names: dict[str | None, str] = {}
    taken: set[str] = set()
    for split in splits:
        words = unicodedata.normalize("NFKC", split or "").encode("utf-8")[:100].decode("utf-8", "ignore")
        stem = re.sub(r"\W+", "_", words).strip("_") or UNNAMED_SPLIT
        # `all` means every split to `datasets`, and Windows keeps some names for devices.
        stem = f"{stem}_" if stem.casefold() == "all" or _RESERVED.match(stem) else stem
        name, count = stem, 1
        while name.casefold() in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name.casefold())
        names[split] = name
    return names


def base_name(image: str | None, image_id: str) -> str:
    """The last part of a path or member name, harmless as a file name; `image_id` where nothing is left of it.

    Example:
        >>> base_name("C:\\\\images\\\\a b.jpg", "0f")
        'a b.jpg'
    """
    name = re.split(r"[\\/]", image or "")[-1]
    name = "".join(
        "_" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c for c in name
    ).strip()
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
    if len(name.encode("utf-8")) > 200:
        name = _cut(stem, _MAX_STEM) + _cut(suffix, _MAX_ENDING)
    return image_id if name in {"", ".", ".."} else name


def file_name(image: str | None, image_id: str, data: bytes) -> str:
    """A file name for an image: its base name, safe on every file system, with an ending that says image.

    Args:
        image: path, member or URL as the dataset gives it.
        image_id: stands in where nothing is left of the name.
        data: the file's bytes; they give the ending where the name has none of an image.

    Example:
        >>> file_name("../aux.png", "0f", b""), file_name("scan?", "0f", b"GIF89a")
        ('_aux.png', 'scan_.gif')
    """
    name = _FORBIDDEN.sub("_", base_name(image, image_id)).rstrip(". ")
    # Hidden files are passed over by most readers.
    name = f"_{name}" if name.startswith((".", "-", "~")) or _RESERVED.match(name) else name
    if PurePosixPath(name).suffix.lower() not in IMAGE_ENDINGS:
        name = f"{name or image_id}.{image_ending(data)}"
    return name


def image_ending(data: bytes) -> str:
    """The file ending, without a dot, of an image's format by its first bytes; `img` for one that is not known.

    Example:
        >>> image_ending(b"RIFF0000WEBPVP8 ")
        'webp'
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp" and data[8:12] in {b"avif", b"avis"}:
        return "avif"
    if re.match(rb"P[1-6]\s", data):
        return "ppm"
    return next((ending for start, ending in _STARTS if data.startswith(start)), "img")


def free_name(name: str, image_id: str, taken: set[str]) -> str:
    """The name, or one made of it and the image's id where another image has it; it is then taken.

    Names that differ only by case or by how accents are composed count as the same.
    """
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
    candidates = [name, f"{stem}_{image_id[:8]}{suffix}", f"{stem}_{image_id}{suffix}"]
    count = 1
    while _key(candidates[0]) in taken:
        candidates.pop(0)
        if not candidates:
            count += 1
            candidates = [f"{stem}_{image_id}_{count}{suffix}"]
    taken.add(_key(candidates[0]))
    return candidates[0]


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", name).casefold())


def _cut(text: str, size: int) -> str:
    return text.encode("utf-8")[:size].decode("utf-8", "ignore")
