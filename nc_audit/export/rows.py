"""What the writers of all formats share: the kept rows as values, split by split, and images stored once each.

Rows pass a block at a time and one image is in memory at once, so that memory does not grow with the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.export.names import DEFAULT_SPLIT, IMAGE_ENDINGS, base_name, file_name, free_name, split_names

ReadImage = Callable[[str, str], bytes]
"""The bytes of an image, by image_id and image_uri; OSError or ValueError where it cannot be read."""

Progress = Callable[[int, int | None], None]

BLOCK_ROWS = 4096
_SOURCES = ["image", "image_uri", "caption"]
_OWN = [
    "row",
    "pair_id",
    "image_id",
    "split",
    "tag",
    "noise_probability",
    "weight",
    "original_caption",
    "known_noise",
]


def facts_of(kept: pa.Table, *, with_splits: bool) -> list[str]:
    """The columns to export besides image and caption: ours in a fixed order, then those of the input."""
    names = [name for name in _OWN if name in kept.column_names]
    names += [name for name in kept.column_names if name not in {*_SOURCES, *_OWN}]
    return [name for name in names if with_splits or name != "split"]


def names_of_splits(kept: pa.Table, *, with_splits: bool) -> dict[str | None, str]:
    """A safe name for each split, in the order of their first rows; one for all rows without splits."""
    splits: list[str | None] = pc.unique(kept["split"]).to_pylist()
    return split_names(splits) if with_splits else dict.fromkeys(splits, DEFAULT_SPLIT)


def split_series(kept: pa.Table, *, with_splits: bool) -> Iterator[tuple[str | None, str, pa.Table]]:
    """Each split as the dataset names it, a safe name for it, and its rows in their order."""
    if not with_splits:
        yield None, DEFAULT_SPLIT, kept
        return
    for split, name in names_of_splits(kept, with_splits=True).items():
        column = kept["split"]
        is_here = pc.is_null(column) if split is None else pc.fill_null(pc.equal(column, split), False)
        yield split, name, kept.filter(is_here)


def beside(names: Sequence[str], own: Sequence[str]) -> dict[str, str]:
    """What to call each fact in a record that has keys of the format's own; those get the prefix `input_`.

    Example:
        >>> beside(["row", "id"], ["id", "caption"])
        {'row': 'row', 'id': 'input_id'}
    """
    taken = {*names, *own}
    titles = {}
    for name in names:
        title = name
        while title in own or (title != name and title in taken):
            title = f"input_{title}"
        taken.add(title)
        titles[name] = title
    return titles


class Steady:
    """The facts of rows for readers that take the type of a column from the first rows they meet.

    A text that is null becomes empty, and a column of another kind without any value in one of the splits is left
    out.

    Attributes:
        names: the columns.
    """

    def __init__(self, kept: pa.Table, *, with_splits: bool) -> None:
        names = facts_of(kept, with_splits=with_splits)
        self._texts = {name for name in names if pa.types.is_string(kept.schema.field(name).type)}
        empty = {
            name
            for _, _, rows in split_series(kept, with_splits=with_splits)
            for name in names
            if rows[name].null_count == rows.num_rows
        }
        self.names = [name for name in names if name in self._texts or name not in empty]

    def of(self, row: dict[str, Any]) -> dict[str, Any]:
        """The facts of a row."""
        return {name: "" if row[name] is None and name in self._texts else row[name] for name in self.names}


def values_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as dictionaries that JSON can hold: float32 as the shortest decimal, what is not finite as None."""
    short = short_floats(table)
    for row in short.to_pylist():
        yield {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }


def short_floats(table: pa.Table) -> pa.Table:
    """The table with float32 as the shortest decimal that means the same: 0.2, not 0.20000000298."""
    for place, column in enumerate(table.schema):
        if column.type == pa.float32():
            short = table[column.name].cast(pa.string()).cast(pa.float64())
            table = table.set_column(place, column.name, short)
    return table


class Rows:
    """The kept rows with their images, as an iterable of (values, bytes of the image).

    Attributes:
        unreadable: rows whose image could not be read, with the reason; they are passed over.
    """

    def __init__(self, read: ReadImage, total: int, progress: Progress | None) -> None:
        self.read, self.total, self.progress = read, total, progress
        self.unreadable: dict[int, str] = {}
        self._done = 0

    def each(
        self, table: pa.Table, stored: Container[dict[str, Any]] = ()
    ) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """The rows of a table; those whose image is in `stored` are not read again and come as None."""
        for start in range(0, table.num_rows, BLOCK_ROWS):
            block = table.slice(start, BLOCK_ROWS)
            for row in values_of(block):
                data = None
                if row not in stored:
                    try:
                        data = self.read(row["image_id"], row["image_uri"])
                    except (OSError, ValueError) as problem:
                        self.unreadable[row["row"]] = str(problem)
                        continue
                yield row, data
            self._done += block.num_rows
            if self.progress:
                self.progress(self._done, self.total)


def image_key(image: str | None, image_id: str) -> tuple[str, str]:
    """What tells stored images apart: the content and, where the dataset gives its images file names, the name.

    So one image under two names stays two, as the dataset has it, and rows of a table without names share one.
    """
    name = base_name(image, image_id)
    return image_id, name if PurePosixPath(name).suffix.lower() in IMAGE_ENDINGS else ""


class ImageFiles:
    """Image files in one folder, each image of the dataset once, no two of one name; holds the rows it has seen."""

    def __init__(self, folder: Path, reserved: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._names: dict[tuple[str, str], str] = {}
        self._taken = {name.casefold() for name in reserved}

    def __contains__(self, row: object) -> bool:
        return isinstance(row, dict) and image_key(row["image"], row["image_id"]) in self._names

    def store(self, row: dict[str, Any], data: bytes | None) -> str:
        """The file name of a row's image, which is written when `data` is given for the first time."""
        key = image_key(row["image"], row["image_id"])
        if key not in self._names:
            assert data is not None
            image_id = row["image_id"]
            name = free_name(file_name(row["image"], image_id, data), image_id, self._taken)
            with (self.folder / name).open("xb") as file:
                file.write(data)
            self._names[key] = name
        return self._names[key]
