"""Datasets that the `datasets` library saved to disk: Arrow files in the order that `state.json` lists them.

The files are mapped into memory, never read as a whole; every stretch is validated before it is used, since its
offsets come from a stranger. The library itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa

from nc_audit.dataset.images import arrow_batches, embedded_columns
from nc_audit.dataset.rows import BATCH_ROWS, Batch, LoadOptions
from nc_audit.dataset.tables import (
    EMBEDDED_ROWS,
    Counts,
    choose_columns,
    extra_names,
    scalar_columns,
    table_batch,
)
from nc_audit.errors import DatasetError

ARROW_ENDING = ".arrow"

_STATE, _DICT = "state.json", "dataset_dict.json"
_MAX_STATE = 1 << 26


@dataclass(frozen=True)
class SavedFile:
    """An Arrow file of a saved dataset, its name below the dataset's folder, and its split."""

    path: Path
    source: str
    split: str | None


def saved_files(folder: Path) -> list[SavedFile]:
    """The Arrow files of a Dataset or a DatasetDict on disk, in its order; none for another folder.

    Raises:
        DatasetError: a file or a split that is listed is not there, or a list is damaged.
    """
    if (folder / _DICT).is_file():
        names = _listed(folder / _DICT).get("splits")
        if not isinstance(names, list) or not all(_is_plain(name) for name in names):
            raise DatasetError(f"{folder / _DICT} lists no splits by name", "save the dataset again")
        files = []
        for name in names:
            if not (folder / name / _STATE).is_file():
                raise DatasetError(
                    f"{folder / _DICT} lists the split {name}, which is not there", "save the dataset again"
                )
            files += [SavedFile(one.path, f"{name}/{one.source}", name) for one in _files_of(folder / name)]
        return files
    return _files_of(folder) if (folder / _STATE).is_file() else []


def _files_of(folder: Path) -> list[SavedFile]:
    state = _listed(folder / _STATE)
    entries = state.get("_data_files")
    if entries is None:
        return []
    split = state.get("_split") if isinstance(state.get("_split"), str) else None
    files = []
    for entry in entries if isinstance(entries, list) else [None]:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not _is_plain(name):
            raise DatasetError(f"{folder / _STATE} does not list its files by name", "save the dataset again")
        if not (folder / name).is_file():
            message = f"{folder / _STATE} lists {name}, which is not there"
            raise DatasetError(message, "copy the whole folder again")
        files.append(SavedFile(folder / name, name, split))
    return files


def _is_plain(name: Any) -> TypeGuard[str]:
    """Whether a name is that of an entry of the folder itself."""
    return isinstance(name, str) and name not in {"", ".", ".."} and not set(name) & {"/", "\\", "\0"}


def _listed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_STATE:
            raise DatasetError(f"{path} has more than {_MAX_STATE:,} bytes", "check what wrote it")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise DatasetError(
            f"{path} cannot be read: {_one_line(problem)}", "save the dataset again"
        ) from problem
    return value if isinstance(value, dict) else {}


def arrow_names(path: Path, source: str) -> tuple[str, ...]:
    """The columns of an Arrow file.

    Raises:
        DatasetError: the file is no Arrow stream or file.
    """
    try:
        with arrow_batches(str(path)) as (schema, _):
            return tuple(schema.names)
    except (pa.ArrowException, OSError, ValueError) as problem:
        message = f"{source} cannot be read as Arrow: {_one_line(problem)}"
        raise DatasetError(message, "save the dataset again") from problem


def read_arrow(
    path: Path,
    source: str,
    split: str | None,
    options: LoadOptions,
    notes: list[str],
    is_inside: bool = True,
    on_rows: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """Rows of an Arrow file, one per caption, a few at a time where images are embedded.

    Args:
        path: the file, a stream as the `datasets` library writes it, or a file with a footer.
        source: its name below the dataset's folder.
        split: the split of rows that state none.
        options: columns and split wanted.
        notes: receives what was assumed and counted.
        is_inside: whether the file's real path is below a root, so that embedded images may be read.
        on_rows: told how many rows are read.

    Raises:
        DatasetError: the file is damaged, or no column fits.
    """
    counts, start = Counts(), 0
    try:
        with arrow_batches(str(path)) as (schema, batches):
            embedded = embedded_columns(schema)
            columns = choose_columns(schema.names, source, options, notes, embedded)
            has_bytes = columns.image in embedded
            extras = extra_names(scalar_columns(schema), columns.used, source, notes)
            suffix = "" if has_bytes and columns.image == embedded[0] else f":{columns.image}"
            uri = f"dataset:{source}#" + "{}" + suffix
            size = EMBEDDED_ROWS if has_bytes else BATCH_ROWS
            for whole in batches:
                wanted = whole.select([*columns.used, *extras])
                wanted.validate(full=True)
                for first in range(0, len(wanted), size):
                    stretch = wanted.slice(first, size)
                    yield table_batch(
                        stretch,
                        columns,
                        extras,
                        has_bytes,
                        source,
                        split,
                        options,
                        uri,
                        start,
                        is_inside,
                        counts,
                    )
                    start += len(stretch)
                    if on_rows:
                        on_rows(start)
    except (pa.ArrowException, OSError, ValueError) as problem:
        if isinstance(problem, DatasetError):
            raise
        message = f"{source} is damaged after row {start:,}: {_one_line(problem)}"
        raise DatasetError(message, "save the dataset again") from problem
    finally:
        notes.extend(counts.sentences(source))


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
