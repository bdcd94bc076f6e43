"""Tables of pairs: csv, tsv, json lines, json records, and Parquet with paths, URLs or the images themselves."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from nc_audit.dataset.captions_json import encoding_of, parse_json
from nc_audit.dataset.extras import extra_names, scalar_columns
from nc_audit.dataset.guard import is_guarded, unguard
from nc_audit.dataset.ids import content_id
from nc_audit.dataset.images import bytes_of, embedded_columns, header_problem
from nc_audit.dataset.rows import (
    BATCH_ROWS,
    Batch,
    Embedded,
    LoadOptions,
    captions_of,
    counted,
    flag_of,
    in_batches,
    text_of,
)
from nc_audit.errors import DatasetError, nearest

_IMAGE_NAMES = (
    "image", "image_path", "img_path", "file_name", "filename", "filepath", "file_path", "image_file",
    "image_filename", "image_file_name", "image_name", "img_name", "img", "images", "path", "file", "jpg", "jpeg",
    "png", "photo", "picture", "image_bytes", "image_url", "img_url", "url", "uri", "image_id", "img_id",
)  # fmt: skip
_CAPTION_NAMES = (
    "caption", "captions", "text", "title", "sentence", "sentences", "raw", "description", "txt", "alt_text",
    "alttext", "alt", "comment", "prompt",
)  # fmt: skip
_NOISE_NAMES = ("known_noise", "is_noisy", "noise")
_NUMBERED = re.compile(r"(.*?[a-z])[_ -]?(\d+)", re.IGNORECASE | re.DOTALL)
_MAX_LINE = 1 << 24  # characters; also of a cell
_MAX_LIST_CELL = 1 << 16
EMBEDDED_ROWS = 32
_PEEKED = 1000


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `captions` are several where every image has `caption_0`, `caption_1`, ..."""

    image: str
    captions: tuple[str, ...]
    split: str | None
    known_noise: str | None

    @property
    def used(self) -> list[str]:
        """The columns to read, each once."""
        names = [self.image, *self.captions, self.split, self.known_noise]
        return list(dict.fromkeys(name for name in names if name is not None))


_MAX_LINES = 1 << 17  # of one row; more, and the rest of a large file would be taken for a caption
_COUNTED = {
    "short": ("row", "with fewer cells than its header"),
    "rejoined": (
        "row",
        "with more cells than its header; the surplus was given back to the caption, whose delimiters are not quoted",
    ),
    "long": ("row", "with more cells than its header; the surplus was left out"),
    "broken_lines": ("row", "with line breaks inside a cell"),
    "lists": ("cell", "with a list of captions; each caption is a row"),
    "blank_captions": ("blank cell", "in the caption columns, taken as no caption at all"),
    "bad_flags": ("value", "of known noise neither true nor false, left out"),
}


class Counts:
    """What was met while reading a file, and where first, for the notes."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def add(self, what: str, line: int, is_met: bool = True) -> None:
        """Count one more of `what`, a key of the sentences, on a line (1-based)."""
        if is_met:
            number, first = self._seen.get(what, (0, line))
            self._seen[what] = (number + 1, first)

    def sentences(self, source: str) -> list[str]:
        """The counts in words."""
        said = []
        for what, (number, first) in self._seen.items():
            noun, meaning = _COUNTED[what]
            said.append(f"{counted(number, noun)} of {source} {meaning} (first: line {first:,})")
        return said


def plain(name: str) -> str:
    """A column name as it is compared: no case, no outer spaces, underscores for spaces and hyphens."""
    return re.sub(r"[ -]+", "_", name.strip().casefold())


def guess_columns(
    names: Sequence[str], embedded: Sequence[str] = (), prefer: str = ""
) -> tuple[str | None, tuple[str, ...]]:
    """The image column and the caption columns that the names suggest.

    Args:
        names: the table's columns.
        embedded: those of them that hold images; they go before all others.
        prefer: a name that goes before the common ones, once plain.

    Returns:
        The image column or None, and the caption columns, none where no name fits.
    """
    by_plain: dict[str, str] = {}
    for name in names:
        by_plain.setdefault(plain(name), name)
    # A nameless column, such as the index pandas writes, is never the preferred one.
    images = [by_plain[common] for common in (prefer, *_IMAGE_NAMES) if common and common in by_plain]
    held = [name for name in embedded if name in images] or list(embedded)
    image = held[0] if held else images[0] if images else None
    numbered: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        parts = _NUMBERED.fullmatch(plain(name))
        if parts and parts[1].rstrip("_") in _CAPTION_NAMES:
            numbered.setdefault(parts[1].rstrip("_"), []).append((int(parts[2][:9]), name))
    for common in _CAPTION_NAMES:
        if common in by_plain and by_plain[common] != image:
            return image, (by_plain[common],)
        if common in numbered:
            return image, tuple(name for _, name in sorted(numbered[common]))
    return image, ()


def choose_columns(
    names: Sequence[str],
    source: str,
    options: LoadOptions,
    notes: list[str],
    embedded: Sequence[str] = (),
    prefer: str = "",
) -> Columns:
    """The columns to read: as the options name them, else guessed from common names.

    Raises:
        DatasetError: a named column is absent, or no column can be guessed; the message lists the columns.
    """
    image, captions = guess_columns(names, embedded, prefer)
    if options.image_column is not None:
        image = _named(options.image_column, names, source, "--image-column")
    if options.caption_column is not None:
        captions = (_named(options.caption_column, names, source, "--caption-column"),)
    listed = ", ".join(repr(name)[1:-1] for name in names[:30]) + (", ..." if len(names) > 30 else "")
    if image is None:
        message = f"{source}: no column is known to hold images; columns: {listed}"
        raise DatasetError(message, "name it with --image-column", columns=list(names))
    if not captions:
        message = f"{source}: no column is known to hold captions; columns: {listed}"
        raise DatasetError(message, "name it with --caption-column", columns=list(names))
    by_plain = {plain(name): name for name in reversed(names)}
    taken = {image, *captions}
    split = next((by_plain[name] for name in ("split",) if by_plain.get(name, image) not in taken), None)
    noise = next((by_plain[name] for name in _NOISE_NAMES if by_plain.get(name, image) not in taken), None)
    word = "columns" if len(captions) > 1 else "column"
    notes.append(f"images taken from column {image}, captions from {word} {', '.join(captions)}")
    return Columns(image, captions, split, noise)


def _named(wanted: str, names: Sequence[str], source: str, option: str) -> str:
    if wanted in names:
        return wanted
    for name in names:
        if plain(name) == plain(wanted):
            return name
    raise DatasetError(f"{source} has no column {wanted}, named with {option}", nearest(wanted, list(names)))


def read_delimited(
    path: Path, source: str, split: str | None, options: LoadOptions, notes: list[str], prefer: str = ""
) -> Iterator[Batch]:
    """Rows of a csv or tsv file, one per caption; rows with too few or too many cells keep their place.

    Surplus cells are given back to the caption, where there is one caption column: an unquoted delimiter in a
    caption is what makes them.

    Raises:
        DatasetError: no header, no fitting columns, or a quote that is never closed.
    """
    encoding = encoding_of(path, notes)
    delimiter = delimiter_of(path, encoding, options)
    # Tab-separated captions are seldom quoted: where a quote does not close, all quotes are part of the captions.
    with _long_cells_allowed():
        as_text = delimiter == "\t" and not _quotes_close(path, encoding, delimiter)
    counts = Counts()
    with path.open(encoding=encoding, newline="") as file, _long_cells_allowed():
        lines = _Lines(file)
        reader = csv.reader(
            lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if as_text else csv.QUOTE_MINIMAL
        )
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                raise DatasetError(f"{source} is empty", "it needs a header line with the columns' names")
            guarded = is_guarded(path)
            if guarded:
                header = [unguard(name) for name in header]
                notes.append(
                    f"{source} is an export of nc-audit; its apostrophes before formulas are not read"
                )
            columns = choose_columns(header, source, options, notes, prefer=prefer)
            for name, times in Counter(header).items():
                if name and times > 1:
                    kept = "each is a caption" if name in columns.captions else "the first is read"
                    notes.append(f"{source} has {times:,} columns {name}; {kept}")
            extras = extra_names(header, columns.used, source, notes)
            yield from _delimited_rows(
                reader, lines, header, columns, delimiter, source, split, counts, guarded, extras
            )
        except csv.Error as problem:
            raise DatasetError(
                f"{source} line {reader.line_num + 1:,}: {problem}", "repair the line"
            ) from problem
        finally:
            notes.extend(counts.sentences(source))


class _Lines:
    """The lines of a file, remembering those of the record that is being read; none may be of any length."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.record: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MAX_LINE + 1)
        if not line:
            raise StopIteration
        if len(line) > _MAX_LINE:
            raise csv.Error(f"it has more than {_MAX_LINE:,} characters")
        if len(self.record) >= _MAX_LINES:
            raise csv.Error(f"a quote opened {len(self.record):,} lines above is never closed")
        self.record.append(line)
        return line


def _delimited_rows(
    reader: Iterator[list[str]],
    lines: _Lines,
    header: list[str],
    columns: Columns,
    delimiter: str,
    source: str,
    split: str | None,
    counts: Counts,
    guarded: bool = False,
    extras: Sequence[str] = (),
) -> Iterator[Batch]:
    width = len(header)
    image_at = header.index(columns.image)
    captions_at = [at for name in columns.captions for at, other in enumerate(header) if other == name]
    split_at = header.index(columns.split) if columns.split is not None else None
    noise_at = header.index(columns.known_noise) if columns.known_noise is not None else None
    extras_at = [(name, header.index(name)) for name in extras]
    batch, line, record = Batch(source), len(lines.record), lines.record
    lines.record = []
    for found in reader:
        record, lines.record = lines.record, []
        first, line = line + 1, line + len(record)
        if not found:
            continue
        cells: list[str | None] = [unguard(cell) for cell in found] if guarded else list(found)
        if len(record) > 1:
            counts.add("broken_lines", first)
        if len(cells) > width and any(cells[width:]):
            if len(captions_at) == 1:
                counts.add("rejoined", first)
                at, end = captions_at[0], captions_at[0] + len(cells) - width + 1
                cells[at:end] = [delimiter.join(found[at:end])]
            else:
                counts.add("long", first)
        elif len(cells) < width:
            counts.add("short", first)
            cells += [None] * (width - len(cells))
        image = cells[image_at]
        row_split = split if split_at is None else cells[split_at] or split
        noise = None
        if noise_at is not None:
            noise = flag_of(cells[noise_at])
            counts.add("bad_flags", first, noise is None and bool(cells[noise_at]))
        captions: list[str | None] = []
        for at in captions_at:
            caption = cells[at]
            # An export of ours has one caption in a cell, whatever it looks like.
            is_list = not guarded and caption and caption[0] in "[ "
            if is_list and caption and (listed := list_in(caption)) is not None:
                counts.add("lists", first)
                captions += captions_of(listed)
            elif len(captions_at) > 1 and not (caption and caption.strip()):
                counts.add("blank_captions", first)
            else:
                captions.append(caption)
        for caption in captions or [None]:
            row = batch.add(image, caption, row_split, noise)
            if extras_at:
                batch.extras[row] = {name: cells[at] for name, at in extras_at}
            if image is None:
                batch.image_remarks[row] = f"line {first:,} has {len(found):,} of {width:,} cells"
            if caption is None:
                what = "holds no caption" if len(found) >= width else f"has {len(found):,} of {width:,} cells"
                batch.caption_remarks[row] = f"line {first:,} {what}"
        if len(batch) >= BATCH_ROWS:
            yield batch
            batch = Batch(source)
    try:
        for _ in csv.reader(record, delimiter=delimiter, strict=True):
            pass
    except csv.Error as problem:
        if reader.dialect.quoting != csv.QUOTE_NONE and "unexpected end" in str(problem):  # type: ignore[attr-defined]
            first = line - len(record) + 1
            message = f"{source} line {first:,}: a quote is opened and never closed; it swallows {len(record):,} lines"
            raise DatasetError(
                message, "close the quote, or double it where it is part of a caption"
            ) from problem
    if batch:
        yield batch


def list_in(cell: str) -> list[str] | None:
    """The strings of a cell that is a list, written as json or by Python; None for any other cell.

    Example:
        >>> list_in('["a", "b"]'), list_in("['it''s']"), list_in("[untitled]")
        (['a', 'b'], ['its'], None)
    """
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")) or len(cell) > _MAX_LIST_CELL:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's parser comments on escapes
                value = parse(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
    return None


def delimiter_of(path: Path, encoding: str, options: LoadOptions) -> str:
    """The delimiter that splits a header into the columns looked for, else the most frequent one in it."""
    with path.open(encoding=encoding, newline="") as file:
        lines = iter(lambda: file.readline(_MAX_LIST_CELL), "")
        header = next((line for line in lines if line.strip()), "")
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    best, most = ",", 0
    for delimiter in (",", "\t", ";", "|"):
        names = next(csv.reader([header], delimiter=delimiter), [])
        image, captions = guess_columns(names)
        named = sum(
            plain(name or "") in map(plain, names) for name in (options.image_column, options.caption_column)
        )
        found = 1000 * ((image is not None) + bool(captions) + named) + len(names)
        if found > most and len(names) > 1:
            best, most = delimiter, found
    return best


def _quotes_close(path: Path, encoding: str, delimiter: str) -> bool:
    with path.open(encoding=encoding, newline="") as file:
        try:
            for _ in csv.reader(
                iter(lambda: file.readline(_MAX_LINE + 1), ""), delimiter=delimiter, strict=True
            ):
                pass
        except csv.Error:
            return False
    return True


@contextmanager
def _long_cells_allowed() -> Iterator[None]:
    before = csv.field_size_limit(_MAX_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_json_lines(
    path: Path, source: str, split: str | None, options: LoadOptions, notes: list[str], prefer: str = ""
) -> Iterator[Batch]:
    """Rows of a json lines file, one per caption; blank lines are no rows.

    Raises:
        DatasetError: a line is not a json object or too long to be one pair, with its number; or no column fits.
    """
    encoding = encoding_of(path, notes)

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        with path.open(encoding=encoding) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MAX_LINE + 1), ""), 1):
                if len(line) > _MAX_LINE:
                    message = f"{source} line {number:,} has more than {_MAX_LINE:,} characters"
                    raise DatasetError(message, "repair the line")
                if line.strip():
                    record = parse_json(line, source, number)
                    if not isinstance(record, dict):
                        kind = type(record).__name__
                        message = f"{source} line {number:,} is a {kind}, not an object"
                        raise DatasetError(message, "repair the line")
                    yield number, record

    names = list(dict.fromkeys(name for _, record in itertools.islice(records(), _PEEKED) for name in record))
    yield from _record_rows(records(), "line", names, source, split, options, notes, prefer)


def read_records(
    value: list[Any], source: str, split: str | None, options: LoadOptions, notes: list[str]
) -> Iterator[Batch]:
    """Rows of a json list of records, one per caption; an entry that is no record gives a row without an image.

    Raises:
        DatasetError: no column fits.
    """
    records = [(number, one if isinstance(one, dict) else {}) for number, one in enumerate(value, 1)]
    names = list(dict.fromkeys(name for _, record in records[:_PEEKED] for name in record))
    return _record_rows(iter(records), "record", names, source, split, options, notes, "")


def read_mapping(value: dict[str, Any], source: str, split: str | None) -> Iterator[Batch]:
    """Rows of a json object from file name to a caption or a list of captions."""
    return in_batches(
        source,
        (
            (image, caption, split, None)
            for image, captions in value.items()
            for caption in captions_of(captions)
        ),
    )


def _record_rows(
    records: Iterator[tuple[int, dict[str, Any]]],
    word: str,
    names: list[str],
    source: str,
    split: str | None,
    options: LoadOptions,
    notes: list[str],
    prefer: str,
) -> Iterator[Batch]:
    if not names:
        raise DatasetError(f"{source} holds no records", "each needs an image and a caption")
    columns = choose_columns(names, source, options, notes, prefer=prefer)
    extras = extra_names(names, columns.used, source, notes)
    batch, counts = Batch(source), Counts()
    try:
        for number, record in records:
            image = record.get(columns.image)
            if isinstance(image, dict):
                image = image.get("path")
            captions = _captions_in([record.get(name) for name in columns.captions], number, counts)
            stated = record.get(columns.known_noise) if columns.known_noise else None
            noise = flag_of(stated)
            counts.add("bad_flags", number, noise is None and stated is not None)
            row_split = (text_of(record.get(columns.split)) if columns.split else None) or split
            for caption in captions:
                row = batch.add(text_of(image), caption, row_split, noise)
                if extras:
                    batch.extras[row] = {name: record.get(name) for name in extras}
                if image is None:
                    batch.image_remarks[row] = f"{word} {number:,} has no {columns.image}"
                if caption is None:
                    batch.caption_remarks[row] = f"{word} {number:,} has no {', '.join(columns.captions)}"
            if len(batch) >= BATCH_ROWS:
                yield batch
                batch = Batch(source)
    finally:
        notes.extend(counts.sentences(source))
    if batch:
        yield batch


def _captions_in(values: list[Any], number: int, counts: Counts) -> list[str | None]:
    """The captions of one record; blank ones among several columns are no captions."""
    captions: list[str | None] = []
    for value in values:
        if isinstance(value, list):
            counts.add("lists", number)
        found = captions_of(value)
        if len(values) > 1:
            said = [caption for caption in found if caption is not None and caption.strip()]
            counts.add("blank_captions", number, len(said) < len(found))
            found = list(said)
        captions += found
    return captions or [None]


def _parquet_schema(path: Path, source: str) -> pa.Schema:
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise DatasetError(
            f"{source} cannot be read as Parquet: {_one_line(problem)}", "write it again"
        ) from problem


def parquet_names(path: Path, source: str) -> tuple[str, ...]:
    """The columns of a Parquet file.

    Raises:
        DatasetError: the file is not Parquet.
    """
    return tuple(_parquet_schema(path, source).names)


def num_parquet_rows(path: Path) -> int:
    """The number of rows of a Parquet file, from its footer."""
    return pq.read_metadata(path).num_rows


def read_parquet(
    path: Path,
    source: str,
    split: str | None,
    options: LoadOptions,
    notes: list[str],
    prefer: str = "",
    is_inside: bool = True,
    on_rows: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """Rows of a Parquet file, one per caption, a few at a time where images are embedded.

    Embedded images are hashed and their headers read here, unless the file's real path is outside the roots
    (`is_inside`); a struct without bytes gives its path.

    Raises:
        DatasetError: the file is not Parquet or is damaged, or no column fits.
    """
    schema = _parquet_schema(path, source)
    embedded = embedded_columns(schema)
    columns = choose_columns(schema.names, source, options, notes, embedded, prefer)
    has_bytes = columns.image in embedded
    extras = extra_names(scalar_columns(schema), columns.used, source, notes)
    if options.split is not None and columns.split is None and split != options.split:
        yield Batch(
            source, [None], [None], [split], [None]
        )  # names the split; nothing else of the file is wanted
        return
    uri = (
        f"dataset:{source}#"
        + "{}"
        + ("" if has_bytes and columns.image == embedded[0] else f":{columns.image}")
    )
    counts, start = Counts(), 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            size = EMBEDDED_ROWS if has_bytes else BATCH_ROWS
            for table in file.iter_batches(size, columns=[*columns.used, *extras], use_threads=False):
                yield table_batch(
                    table, columns, extras, has_bytes, source, split, options, uri, start, is_inside, counts
                )
                start += len(table)
                if on_rows:
                    on_rows(start)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise DatasetError(
            f"{source} is damaged after row {start:,}: {_one_line(problem)}", "write it again"
        ) from problem
    finally:
        notes.extend(counts.sentences(source))


def table_batch(
    table: pa.RecordBatch,
    columns: Columns,
    extras: Sequence[str],
    has_bytes: bool,
    source: str,
    split: str | None,
    options: LoadOptions,
    uri: str,
    start: int,
    is_inside: bool,
    counts: Counts,
) -> Batch:
    """Rows of a stretch of an Arrow table, one per caption.

    Args:
        table: the stretch.
        columns: which columns hold what.
        extras: further columns to keep.
        has_bytes: whether the image column holds image files.
        source: the file.
        split: the split that the file names.
        options: the split wanted.
        uri: an image's URI, `{}` in the place of its row.
        start: the row in the file of the stretch's first row.
        is_inside: whether embedded images may be read.
        counts: receives what is worth telling.
    """
    images = table.column(columns.image)
    data = bytes_of(images) if has_bytes else None
    names = _names_of(images) if not has_bytes or pa.types.is_struct(images.type) else [None] * len(table)
    captions = [_values(table.column(name)) for name in columns.captions]
    splits = _split_values(table.column(columns.split)) if columns.split else None
    noises = _values(table.column(columns.known_noise)) if columns.known_noise else None
    others = [(name, _values(table.column(name))) for name in extras]
    batch = Batch(source)
    for at in range(len(table)):
        row_split = (splits[at] if splits else None) or split
        if options.split is not None and row_split != options.split:
            # Kept for the split's name only: the images of other splits need not be read.
            batch.add(None, None, row_split, None)
            continue
        number = start + at
        noise = flag_of(noises[at]) if noises else None
        counts.add("bad_flags", number + 1, noises is not None and noise is None and noises[at] is not None)
        held = (
            _embedded(data[at], uri.format(number), is_inside)
            if data is not None and data[at].is_valid
            else None
        )
        name = names[at] or (f"{source}#{number}" if held else None)
        for caption in _captions_in([values[at] for values in captions], number + 1, counts):
            row = batch.add(name, caption, row_split, noise)
            if others:
                batch.extras[row] = {other: values[at] for other, values in others}
            if held:
                batch.embedded[row] = held
            elif name is None:
                batch.image_remarks[row] = f"row {number:,} of the file holds no image"
            if caption is None:
                batch.caption_remarks[row] = f"row {number:,} of the file holds no caption"
    return batch


def _embedded(value: pa.Scalar, uri: str, is_inside: bool) -> Embedded:
    if not is_inside:
        detail = "the file is a symbolic link that leads outside the dataset's folder"
        return Embedded(uri, None, "outside_root", detail)
    data = value.as_py()
    problem = header_problem(data)
    return Embedded(uri, content_id(data), "corrupt_image" if problem else "ok", problem)


def _names_of(images: pa.Array) -> list[str | None]:
    """Paths in an image column: its strings, or the `path` of its structs."""
    if pa.types.is_struct(images.type):
        at = images.type.get_field_index("path")
        return (
            [None] * len(images)
            if at < 0
            else [text_of(name) or None for name in _values(images.flatten()[at])]
        )
    return [text_of(name) for name in _values(images)]


def _split_values(column: pa.Array) -> list[str | None]:
    return [text_of(value) for value in _values(column)]


def _values(column: pa.Array) -> list[Any]:
    """The cells as Python values; text that is not UTF-8 with its bad bytes replaced."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [text_of(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200]
