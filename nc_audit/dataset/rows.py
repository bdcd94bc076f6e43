"""What a user may choose when loading, and rows as a file states them, before any image is looked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

BATCH_ROWS = 1 << 16

_SPLIT_WORD = r"(?<![a-z])(train(?:ing|val)?|val(?:id(?:ation)?)?|dev|test(?:ing)?|restval)(?![a-z])"
_SPLIT = re.compile(_SPLIT_WORD, re.IGNORECASE)
_SPLIT_AND_YEAR = re.compile(_SPLIT_WORD + r"\d*", re.IGNORECASE)
_TRUE = {"1", "1.0", "true", "yes", "t", "y"}
_FALSE = {"0", "0.0", "false", "no", "f", "n"}
_CAPTION_KEYS = ("raw", "caption", "text", "sentence", "sent")


@dataclass(frozen=True)
class LoadOptions:
    """What a user may say about a dataset; None leaves it to be recognised.

    `downloads` is the folder for images given by URL; without it nothing is fetched.
    """

    image_root: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    subset: str | None = None
    split: str | None = None
    limit: int | None = None
    downloads: Path | None = None


@dataclass(frozen=True)
class Embedded:
    """An image that lies in the table itself: where, its content hash, and what is wrong with it, if anything."""

    uri: str
    image_id: str | None
    status: str = "ok"
    detail: str | None = None


@dataclass
class Batch:
    """Consecutive rows of one file, column by column.

    `image_remarks` and `caption_remarks` say, by position in the batch, why a row has no image or no caption;
    an image with a remark is not looked for. `embedded` holds, by position, the images inside the file;
    `extras` the values of the input's other columns.
    """

    source: str
    image: list[str | None] = field(default_factory=list)
    caption: list[str | None] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)
    known_noise: list[bool | None] = field(default_factory=list)
    image_remarks: dict[int, str] = field(default_factory=dict)
    caption_remarks: dict[int, str] = field(default_factory=dict)
    embedded: dict[int, Embedded] = field(default_factory=dict)
    extras: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image)

    def add(self, image: str | None, caption: str | None, split: str | None, known_noise: bool | None) -> int:
        """Append a row and return its position in the batch."""
        self.image.append(image)
        self.caption.append(caption)
        self.split.append(split)
        self.known_noise.append(known_noise)
        return len(self.image) - 1

    def extend(self, other: Batch) -> None:
        """Append the rows of another batch."""
        shift = len(self)
        self.image += other.image
        self.caption += other.caption
        self.split += other.split
        self.known_noise += other.known_noise
        self.image_remarks.update((at + shift, remark) for at, remark in other.image_remarks.items())
        self.caption_remarks.update((at + shift, remark) for at, remark in other.caption_remarks.items())
        self.embedded.update((at + shift, held) for at, held in other.embedded.items())
        self.extras.update((at + shift, values) for at, values in other.extras.items())

    def take(self, positions: list[int]) -> Batch:
        """The rows at these positions."""
        renumbered = {old: new for new, old in enumerate(positions)}

        def kept(values: dict[int, Any]) -> dict[int, Any]:
            return {renumbered[old]: value for old, value in values.items() if old in renumbered}

        return Batch(
            self.source,
            [self.image[at] for at in positions],
            [self.caption[at] for at in positions],
            [self.split[at] for at in positions],
            [self.known_noise[at] for at in positions],
            kept(self.image_remarks),
            kept(self.caption_remarks),
            kept(self.embedded),
            kept(self.extras),
        )


def split_named_by(relative: str) -> str | None:
    """The split that a file's name, or else the nearest of its folders, names.

    Example:
        >>> split_named_by("annotations/captions_val2014.json"), split_named_by("train/metadata.csv")
        ('val', 'train')
        >>> split_named_by("constraints.csv")
    """
    for part in reversed(PurePosixPath(relative).parts):
        found = _SPLIT.search(part)
        if found:
            return found[1].lower()
    return None


def is_split_word(word: str) -> bool:
    """Whether a folder called `word` is a split of an ImageFolder."""
    return _SPLIT.fullmatch(word) is not None


def family_of(relative: str) -> str:
    """The name that files share when they are the splits of one dataset.

    Example:
        >>> family_of("captions_train2014.json") == family_of("captions_val2014.json")
        True
    """
    return _SPLIT_AND_YEAR.sub("*", relative).lower()


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "row"), counted(5135, "row")
        ('1 row', '5,135 rows')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def text_of(value: Any) -> str | None:
    """A cell as text; None where it holds nothing."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def caption_of(value: Any) -> str | None:
    """One caption from a cell: a string, a list of tokens, or a record with the string or the tokens."""
    if isinstance(value, dict):
        for key in _CAPTION_KEYS:
            if isinstance(value.get(key), str):
                return value[key]
        return caption_of(value["tokens"]) if isinstance(value.get("tokens"), list) else None
    if isinstance(value, list):
        return " ".join(str(token) for token in value)
    return text_of(value)


def captions_of(value: Any) -> list[str | None]:
    """The captions of a cell; a list gives several, an empty one the single caption None."""
    if isinstance(value, list):
        return [caption_of(one) for one in value] or [None]
    return [caption_of(value)]


def flag_of(value: Any) -> bool | None:
    """A boolean from true/false, yes/no or 0/1 as value or text; None for anything else."""
    if value is None or isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def in_batches(
    source: str, rows: Iterator[tuple[str | None, str | None, str | None, bool | None]]
) -> Iterator[Batch]:
    """Rows (image, caption, split, known_noise) gathered into batches."""
    batch = Batch(source)
    for row in rows:
        batch.add(*row)
        if len(batch) >= BATCH_ROWS:
            yield batch
            batch = Batch(source)
    if batch:
        yield batch
