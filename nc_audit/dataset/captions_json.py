"""The two json families of captioning: Karpathy's (images with their sentences) and COCO's (annotations)."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nc_audit.dataset.extras import scalars_of
from nc_audit.dataset.rows import BATCH_ROWS, Batch, caption_of, counted, flag_of, text_of
from nc_audit.errors import DatasetError

_BOMS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHUNK = 1 << 20
_USED_OF_IMAGE = {"filename", "file_name", "filepath", "split", "known_noise"}
_USED_OF_CAPTION = {"raw", "caption", "known_noise"}

MAX_JSON = 2 << 30


def encoding_of(path: Path, notes: list[str]) -> str:
    """The text encoding of a file: by its byte order mark, else UTF-8 when it is valid, else Windows-1252 or Latin-1.

    UTF-16 without a mark is known by the zero beside every byte of its first letters.

    Reads the file once, in chunks, so that it decodes without an error afterwards. A file that is not Unicode is
    noted.

    Raises:
        DatasetError: the byte order mark promises what the rest does not hold.
    """
    with path.open("rb") as handle:
        start = handle.read(32)
    for mark, encoding in _BOMS:
        if start.startswith(mark):
            if not _decodes(path, encoding):
                message = f"{path.name} begins as {encoding.upper()} text and goes on as something else"
                raise DatasetError(message, "write it as UTF-8")
            return encoding
    for encoding, zeros, letters in (("utf-16-le", 1, 0), ("utf-16-be", 0, 1)):
        # Valid UTF-8 as well, if one takes the zeros for letters.
        if (
            len(start) >= 16
            and not any(start[zeros::2])
            and all(start[letters::2])
            and _decodes(path, encoding)
        ):
            notes.append(f"{path.name} is read as {encoding.upper()}, which it does not say itself")
            return encoding
    if _decodes(path, "utf-8"):
        return "utf-8"
    encoding = "cp1252" if _decodes(path, "cp1252") else "latin-1"
    name = "Windows-1252, the superset of Latin-1" if encoding == "cp1252" else "Latin-1"
    notes.append(f"{path.name} is not valid UTF-8 and was read as {name}; check accented letters")
    return encoding


def decode_text(data: bytes) -> tuple[str, str | None]:
    """Bytes as text, by the rules of `encoding_of`, and the encoding's name where it is not Unicode.

    Bytes that follow a byte order mark and break its promise are replaced.

    Example:
        >>> decode_text("an île".encode()), decode_text(b"an \\xeele")
        (('an île', None), ('an île', 'Windows-1252, the superset of Latin-1'))
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data.decode(encoding, "replace"), None
    for encoding, name in (
        ("utf-8", None),
        ("cp1252", "Windows-1252, the superset of Latin-1"),
        ("latin-1", "Latin-1"),
    ):
        try:
            return data.decode(encoding), name
        except UnicodeDecodeError:
            continue
    raise AssertionError("Latin-1 decodes everything")


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeError:
        return False
    return True


def parse_json(text: str, where: str, line: int | None = None) -> Any:
    """The value of a json text; `where` names the file, and `line` the line of a jsonl file.

    Raises:
        DatasetError: the text is not json, or is nested too deeply; with the line and the column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        at = f"line {line or problem.lineno} column {problem.colno}"
        message, hint = (
            f"{where} is not valid json: {at}: {problem.msg}",
            "repair the file, or write it again",
        )
        raise DatasetError(message, hint, line=line or problem.lineno, column=problem.colno) from problem
    except RecursionError:
        # The traceback of a thousand nested calls helps nobody.
        raise DatasetError(
            f"{where} is nested too deeply to be a list of captions", "check what wrote it"
        ) from None
    except ValueError as problem:
        raise DatasetError(f"{where} cannot be read as json: {problem}", "check what wrote it") from problem


def read_json(path: Path, notes: list[str]) -> Any:
    """The value of a json file.

    Raises:
        DatasetError: the file is not json, is nested too deeply, is not text, or is too large to be read whole.
    """
    size = path.stat().st_size
    if size > MAX_JSON:
        raise DatasetError(
            f"{path.name} has {size:,} bytes; json is read whole, up to {MAX_JSON:,}",
            "write it as jsonl or Parquet",
        )
    with path.open("rb") as handle:
        start = handle.read(1 << 16)
    if len(start) == 1 << 16 and not start.strip(b"\0 \t\r\n"):
        raise DatasetError(
            f"{path.name} is not json: it begins with {len(start):,} empty bytes", "replace it"
        )
    return parse_json(path.read_text(encoding=encoding_of(path, notes)), path.name)


def is_karpathy(value: Any) -> bool:
    """Whether a json value lists images that carry their sentences."""
    images = value.get("images") if isinstance(value, dict) else value
    return isinstance(images, list) and any(
        isinstance(image, dict) and isinstance(image.get("sentences"), list) for image in images[:100]
    )


def is_coco(value: Any) -> bool:
    """Whether a json value is COCO's, with captions among its annotations."""
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        return False
    annotations = value.get("annotations")
    return isinstance(annotations, list) and any(
        isinstance(annotation, dict) and "caption" in annotation for annotation in annotations[:100]
    )


def read_karpathy(value: Any, source: str, split: str | None, notes: list[str]) -> Iterator[Batch]:
    """One row per sentence; an image without sentences gives one row without a caption.

    Args:
        value: what `is_karpathy` recognised.
        source: the file, for the rows.
        split: split of images that state none.
        notes: receives what was found, once the rows are read.
    """
    images = value["images"] if isinstance(value, dict) else value
    batch, num_bare = Batch(source), 0
    for position, entry in enumerate(images):
        image = entry if isinstance(entry, dict) else {}
        name = _file_of(image)
        sentences = image.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            sentences, num_bare = [None], num_bare + 1
        for sentence in sentences:
            noise = sentence.get("known_noise") if isinstance(sentence, dict) else None
            noise = image.get("known_noise") if noise is None else noise
            at = batch.add(name, caption_of(sentence), text_of(image.get("split")) or split, flag_of(noise))
            if extras := scalars_of(image, _USED_OF_IMAGE) | scalars_of(sentence, _USED_OF_CAPTION):
                batch.extras[at] = extras
            if name is None:
                batch.image_remarks[at] = f"images[{position}] names no file"
            if batch.caption[at] is None:
                batch.caption_remarks[at] = f"images[{position}] holds no sentence here"
        if len(batch) >= BATCH_ROWS:
            yield batch
            batch = Batch(source)
    if num_bare:
        notes.append(
            f"{counted(num_bare, 'image')} of {source} without sentences: a row without a caption each"
        )
    if batch:
        yield batch


def read_coco(value: Any, source: str, split: str | None, notes: list[str]) -> Iterator[Batch]:
    """One row per annotation, in their order; one that names an unknown image keeps its row.

    Args:
        value: what `is_coco` recognised.
        source: the file, for the rows.
        split: split of images that state none.
        notes: receives what was found.
    """
    images: dict[str, dict[str, Any]] = {}
    num_repeated = 0
    for image in value["images"]:
        if isinstance(image, dict):
            num_repeated += str(image.get("id")) in images
            images.setdefault(str(image.get("id")), image)
    if num_repeated:
        notes.append(f"{counted(num_repeated, 'image')} of {source} with the id of an earlier one, left out")
    described: set[str] = set()
    batch = Batch(source)
    for position, entry in enumerate(value["annotations"]):
        annotation = entry if isinstance(entry, dict) else {}
        key = str(annotation.get("image_id"))
        known = images.get(key)
        image = known or {}
        name = _file_of(image)
        described.add(key)
        noise = annotation.get("known_noise", image.get("known_noise"))
        at = batch.add(
            name, caption_of(annotation.get("caption")), text_of(image.get("split")) or split, flag_of(noise)
        )
        if extras := scalars_of(image, _USED_OF_IMAGE) | scalars_of(annotation, _USED_OF_CAPTION):
            batch.extras[at] = extras
        if known is None:
            batch.image[at] = f"image_id {key}"
            batch.image_remarks[at] = (
                f"annotations[{position}] names image_id {key}, which is not among the images"
            )
        elif name is None:
            batch.image[at] = f"image_id {key}"
            batch.image_remarks[at] = f"image_id {key} names no file"
        if batch.caption[at] is None:
            batch.caption_remarks[at] = f"annotations[{position}] holds no caption"
        if len(batch) >= BATCH_ROWS:
            yield batch
            batch = Batch(source)
    num_bare = len(images.keys() - described)
    if num_bare:
        notes.append(f"{counted(num_bare, 'image')} of {source} without an annotation, which makes no pair")
    if batch:
        yield batch


def _file_of(image: dict[str, Any]) -> str | None:
    """The path of an image entry; Karpathy's COCO splits keep the folder in `filepath`."""
    for key in ("filename", "file_name", "file", "path", "image", "coco_url", "url"):
        name = text_of(image.get(key))
        if name:
            folder = text_of(image.get("filepath"))
            return f"{folder.rstrip('/')}/{name}" if folder and key in ("filename", "file_name") else name
    return text_of(image.get("filepath")) or None
