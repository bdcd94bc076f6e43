"""Recognising a dataset: which of its files state the pairs, in which form, and for which split.

A folder is searched by evidence, the first kind that is there wins, and what was passed over is noted:

1. `metadata.csv|jsonl|parquet` in the folder or its subfolders (ImageFolder);
2. a Karpathy json; 3. a COCO captions json;
4. webdataset shards (tar); 5. Parquet files; 6. Arrow files, those of `datasets.save_to_disk` as it lists them;
7. any other csv, tsv, json lines or json table with an image and a caption column.

The folder itself is searched before its subfolders, and those before theirs. Files whose names differ only by the
split (`captions_train2014.json`, `captions_val2014.json`) belong together; of two unrelated files of one kind
neither is guessed.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nc_audit.dataset import captions_json, saved, shards, subsets, tables
from nc_audit.dataset.guard import data_files, lists_of
from nc_audit.dataset.images import MANIFEST, PARQUET_ENDINGS
from nc_audit.dataset.places import files_of, is_pattern, root_of
from nc_audit.dataset.rows import Batch, LoadOptions, counted, family_of, split_named_by
from nc_audit.errors import DatasetError

_DELIMITED = (".csv", ".tsv", ".tab", ".txt")
_JSON_LINES = (".jsonl", ".ndjson")
_ENDINGS = (*_DELIMITED, *_JSON_LINES, ".json", *PARQUET_ENDINGS, saved.ARROW_ENDING, *shards.SHARD_ENDINGS)
_UNDERSTOOD = (
    "understood: a Karpathy or COCO captions json, metadata.csv|jsonl|parquet beside images, a csv, tsv, jsonl or "
    "json table with an image and a caption column, Parquet with images or paths, webdataset tar shards, a folder of "
    "datasets.save_to_disk"
)
_KINDS = {
    "metadata": "ImageFolder metadata",
    "karpathy": "a Karpathy json",
    "coco": "a COCO captions json",
    "webdataset": "a webdataset",
    "parquet": "Parquet",
    "saved": "a dataset of datasets.save_to_disk",
    "table": "a table",
}
_MAX_DEPTH = 2
_MAX_OTHER_JSON = 20
_MAX_TEXTS = 20
_MAX_FIRST_LINE = 16 << 20


@dataclass(frozen=True)
class DatasetFile:
    """A file that states pairs: its form, its split by name, and its value where it is one json value."""

    path: Path
    source: str
    kind: str
    form: str
    split: str | None
    value: Any = None
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What will be read, from which root, and what was assumed."""

    root: Path
    layout: str
    files: list[DatasetFile]
    notes: list[str] = field(default_factory=list)


def recognise(path: Path, options: LoadOptions) -> Plan:
    """The files of a dataset that state its pairs.

    Raises:
        DatasetError: there is no such path, nothing in it is recognised, or several files are equally likely.
    """
    if is_pattern(path) or path.is_file():
        subsets.choose(path, [], options.subset)
    if is_pattern(path):
        return _recognise_pattern(path, options)
    if not path.exists():
        parent = path.absolute().parent
        siblings = [one.name for one in parent.iterdir()] if parent.is_dir() else []
        close = get_close_matches(path.name, siblings, n=1)
        hint = (
            f"did you mean {path.with_name(close[0])}?"
            if close
            else "name a folder, or a json, csv, jsonl or Parquet file"
        )
        raise DatasetError(f"{path} does not exist", hint)
    if path.is_dir():
        return _recognise_folder(path, options)
    if not path.is_file():  # opening a pipe would wait for ever
        raise DatasetError(f"{path} is neither a file nor a folder", "write it to a file first")
    file = _sniff(path, path.name, options)
    if file is None:
        raise DatasetError(f"{path} states no image-caption pairs in a known form", _UNDERSTOOD)
    return _planned(path.absolute().parent, [file], [])


def read_file(
    file: DatasetFile,
    options: LoadOptions,
    notes: list[str],
    is_inside: bool = True,
    on_rows: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """The rows of one file, in its order.

    Args:
        file: what was recognised.
        options: columns and split wanted.
        notes: receives what was assumed and counted.
        is_inside: whether the file's real path is below a root, so that embedded images may be read.
        on_rows: told how many rows of a Parquet file are read.
    """
    if file.form in ("karpathy", "coco", "mapping") and (options.image_column or options.caption_column):
        notes.append(f"--image-column and --caption-column say nothing about {file.source}: it is no table")
    prefer = "file_name" if file.kind == "metadata" else ""
    match file.form:
        case "karpathy":
            return captions_json.read_karpathy(file.value, file.source, file.split, notes)
        case "coco":
            return captions_json.read_coco(file.value, file.source, file.split, notes)
        case "records":
            return tables.read_records(file.value, file.source, file.split, options, notes)
        case "mapping":
            return tables.read_mapping(file.value, file.source, file.split)
        case "json lines":
            return tables.read_json_lines(file.path, file.source, file.split, options, notes, prefer)
        case "tar":
            return shards.read_shard(file.path, file.source, file.split, options, notes, is_inside)
        case "arrow":
            return saved.read_arrow(file.path, file.source, file.split, options, notes, is_inside, on_rows)
        case "parquet":
            return tables.read_parquet(
                file.path, file.source, file.split, options, notes, prefer, is_inside, on_rows
            )
        case _:
            return tables.read_delimited(file.path, file.source, file.split, options, notes, prefer)


def _recognise_folder(folder: Path, options: LoadOptions) -> Plan:
    exported = _export_of_ours(folder, options)
    if exported and options.subset is None:
        return _planned(folder, exported, ["an export of nc-audit, which names its files and their splits"])
    listed = _subset(folder, options)
    if listed:
        return listed
    arrows = _saved(folder)
    if arrows:
        return _planned(folder, arrows, [])
    problems: list[DatasetError] = []
    unfit: list[DatasetFile] = []
    lists = {folder / name for name in lists_of(folder)}
    for level, below in itertools.pairwise(itertools.chain(_levels(folder), [[]])):
        metadata = [path for path in below if path.stem.lower() == "metadata"]
        candidates = [path for path in level + metadata if path not in lists]
        found, others = _sniff_all(folder, candidates, options, problems, unfit)
        if found:
            return _chosen(folder, found, others)
    if len({family_of(file.source) for file in unfit}) == 1:
        return _chosen(folder, unfit, [])  # its reader says which columns it has, and how to name them
    if problems:
        raise problems[0]
    raise DatasetError(
        f"{folder} holds no file that states image-caption pairs: {_inventory(folder)}", _UNDERSTOOD
    )


def _subset(folder: Path, options: LoadOptions) -> Plan | None:
    """The files of the subset to read, by the folder's card; None where it lists none, or none that states pairs.

    Raises:
        DatasetError: the subset wanted is not there, or which of several is meant is open.
    """
    known = subsets.subsets_of(folder)
    names = subsets.files_below(folder) if known else []
    # A card may list what is stored elsewhere; a subset without a file that may state pairs is none here.
    of_subset = {
        one.name: [(name, split) for name, split in one.files(names) if name.lower().endswith(_ENDINGS)]
        for one in known
    }
    subset, notes = subsets.choose(folder, [one for one in known if of_subset[one.name]], options.subset)
    if subset is None:
        return None
    splits = dict(of_subset[subset.name])
    problems, unfit = list[DatasetError](), list[DatasetFile]()
    found, others = _sniff_all(folder, [folder / name for name in splits], options, problems, unfit)
    if not found:
        if problems:
            raise problems[0]
        found, others = unfit, []
    if not found:
        raise DatasetError(
            f"{folder}: no file of the subset {subset.name} states image-caption pairs", _UNDERSTOOD
        )
    found = [replace(file, split=splits[file.source] or file.split) for file in found]
    plan = _chosen(folder, found, others, are_one=True)
    listed = {name for files in of_subset.values() for name, _ in files}
    unlisted = [name for name in names if name.lower().endswith(_ENDINGS) and name not in listed]
    if unlisted:
        notes.append(f"not read, as {subsets.CARD} lists them in no subset: {_listed(unlisted)}")
    return replace(plan, notes=[*notes, *plan.notes])


def _recognise_pattern(pattern: Path, options: LoadOptions) -> Plan:
    """The files that fit a pattern, which must be of one kind; none is left out without a note."""
    folder, problems, unfit = root_of(pattern), list[DatasetError](), list[DatasetFile]()
    files = files_of(pattern)
    if not files:
        raise DatasetError(f"no file fits the pattern {pattern}", _UNDERSTOOD)
    found, others = _sniff_all(folder, files, options, problems, unfit)
    if not found:
        if problems:
            raise problems[0]
        raise DatasetError(
            f"none of the {counted(len(files), 'file')} that fit {pattern} states image-caption pairs",
            _UNDERSTOOD,
        )
    return _chosen(folder.absolute(), found, others)


def _saved(folder: Path) -> list[DatasetFile]:
    """The files of a dataset on disk as its own lists name them; none for another folder."""
    return [
        DatasetFile(
            one.path, one.source, "saved", "arrow", one.split, columns=saved.arrow_names(one.path, one.source)
        )
        for one in saved.saved_files(folder)
    ]


def _export_of_ours(folder: Path, options: LoadOptions) -> list[DatasetFile]:
    """The files of an export of ours in its order; none for another folder, or where one is no form known here."""
    files = []
    for name, split in data_files(folder):
        file = _sniff(folder / name, name, options)
        if file is None:
            return []
        files.append(replace(file, split=split))
    return files


def _levels(folder: Path) -> Iterator[list[Path]]:
    """Files that may state pairs: those in the folder, in its subfolders, and in theirs; no runs, no hidden folders."""
    folders = [folder]
    for _ in range(_MAX_DEPTH + 1):
        files, inner = list[Path](), list[Path]()
        for one in folders:
            with os.scandir(
                one
            ) as entries:  # knows files from folders without asking for each of a million images
                seen = sorted(entries, key=lambda entry: entry.name)
            if one != folder and any(entry.name == MANIFEST for entry in seen):
                continue
            for entry in seen:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inner.append(one / entry.name)
                elif entry.name.lower().endswith(_ENDINGS) and entry.is_file():
                    files.append(one / entry.name)
        yield files
        folders = inner


def _sniff_all(
    folder: Path,
    level: Sequence[Path],
    options: LoadOptions,
    problems: list[DatasetError],
    unfit: list[DatasetFile],
) -> tuple[list[DatasetFile], list[str]]:
    """The files of a level that state pairs, and the names of the others.

    Json files called dataset* or *caption* go first; when one of them states pairs the others, which may be huge
    lists of boxes, are not opened.
    """
    found: list[DatasetFile] = []
    others: list[str] = []
    num_other_json = 0
    if sum(path.suffix.lower() == ".txt" for path in level) > _MAX_TEXTS:
        level = [path for path in level if path.suffix.lower() != ".txt"]
    for path in sorted(level, key=lambda path: (not _is_likely_json(path), str(path))):
        source = path.relative_to(folder).as_posix()
        if path.suffix.lower() == ".json" and not _is_likely_json(path):
            num_other_json += 1
            if num_other_json > _MAX_OTHER_JSON or any(file.kind in ("karpathy", "coco") for file in found):
                others.append(source)
                continue
        try:
            file = _sniff(path, source, options)
        except DatasetError as problem:
            problems.append(problem)
            others.append(source)
            continue
        if file is None:
            others.append(source)
        elif file.columns and not _fits(file, options):
            if path.suffix.lower() != ".txt":  # a licence, say
                unfit.append(file)
                others.append(source)
        else:
            found.append(file)
    return found, others


def _is_likely_json(path: Path) -> bool:
    name = path.name.lower()
    return (
        path.suffix.lower() == ".json"
        and (name.startswith("dataset") or "caption" in name)
        and "dataset_info" not in name
    )


def _fits(file: DatasetFile, options: LoadOptions) -> bool:
    """Whether a table has an image and a caption column, by the options or by common names."""
    image, captions = tables.guess_columns(file.columns)
    known = {tables.plain(name) for name in file.columns}
    has_image = (
        image is not None if options.image_column is None else tables.plain(options.image_column) in known
    )
    has_captions = (
        bool(captions) if options.caption_column is None else tables.plain(options.caption_column) in known
    )
    return has_image and has_captions


def _sniff(path: Path, source: str, options: LoadOptions) -> DatasetFile | None:
    """A file as one that may state pairs, by its ending and its content; None when it cannot.

    Raises:
        DatasetError: the ending promises a form that the content breaks.
    """
    ending, notes = path.suffix.lower(), list[str]()
    split, kind = split_named_by(source), "metadata" if path.stem.lower() == "metadata" else "table"
    if path.name.lower().endswith(shards.SHARD_ENDINGS):
        is_fit = shards.is_shard(path)
        return DatasetFile(path, source, "webdataset", "tar", split) if is_fit else None
    with path.open("rb") as handle:
        start = handle.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if ending == saved.ARROW_ENDING:
        names = saved.arrow_names(path, source)
        return DatasetFile(path, source, "saved", "arrow", split, columns=names)
    if ending in PARQUET_ENDINGS or start.startswith(b"PAR1"):
        kind = "metadata" if kind == "metadata" else "parquet"
        return DatasetFile(path, source, kind, "parquet", split, columns=tables.parquet_names(path, source))
    if ending in (*_JSON_LINES, *_DELIMITED):
        _check_first_line(path, source)
    if ending in _JSON_LINES:
        return DatasetFile(path, source, kind, "json lines", split, columns=_keys_of_first_line(path, source))
    if ending == ".json" or (ending not in _DELIMITED and start[:1] in (b"{", b"[")):
        try:
            value = captions_json.read_json(path, notes)
        except DatasetError as problem:
            if "Extra data" in problem.message and problem.context.get("column") == 1:
                return DatasetFile(
                    path, source, kind, "json lines", split, columns=_keys_of_first_line(path, source)
                )
            raise
        return _sniff_json(path, source, kind, split, value, tuple(notes))
    if ending in _DELIMITED or not ending:
        encoding = captions_json.encoding_of(path, notes)
        try:
            delimiter = tables.delimiter_of(path, encoding, options)
            with path.open(encoding=encoding, newline="") as lines:
                header = next((cells for cells in csv.reader(lines, delimiter=delimiter) if cells), [])
        except csv.Error as problem:
            raise DatasetError(f"{source} is not a table: {problem}", _UNDERSTOOD) from problem
        form = "tsv" if delimiter == "\t" else "csv"
        return DatasetFile(path, source, kind, form, split, columns=tuple(header))
    return None


def _check_first_line(path: Path, source: str) -> None:
    """Raises DatasetError where a table's first line is not one, so that it is not read into memory whole."""
    with path.open("rb") as handle:
        start = handle.read(_MAX_FIRST_LINE)
        if handle.read(1) and b"\n" not in start and b"\r" not in start:
            raise DatasetError(
                f"{source} is not a table: its first line has more than {_MAX_FIRST_LINE:,} bytes",
                _UNDERSTOOD,
            )


def _sniff_json(
    path: Path, source: str, kind: str, split: str | None, value: Any, notes: tuple[str, ...]
) -> DatasetFile | None:
    if captions_json.is_karpathy(value):
        return DatasetFile(path, source, "karpathy", "karpathy", split, value, notes=notes)
    if captions_json.is_coco(value):
        return DatasetFile(path, source, "coco", "coco", split, value, notes=notes)
    if isinstance(value, dict):
        lists = [
            one
            for one in value.values()
            if isinstance(one, list) and any(isinstance(row, dict) for row in one[:100])
        ]
        if len(lists) == 1:
            value = lists[0]
        elif (
            value
            and all(map(_is_captions, itertools.islice(value.values(), 1000)))
            and any("." in name for name in value)
        ):
            return DatasetFile(path, source, kind, "mapping", split, value, notes=notes)
    if isinstance(value, list) and any(isinstance(row, dict) for row in value[:100]):
        names = dict.fromkeys(str(name) for row in value[:1000] if isinstance(row, dict) for name in row)
        return DatasetFile(path, source, kind, "records", split, value, tuple(names), notes)
    return None


def _is_captions(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _keys_of_first_line(path: Path, source: str) -> tuple[str, ...]:
    encoding = captions_json.encoding_of(path, [])
    with path.open(encoding=encoding) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                record = captions_json.parse_json(line, source, number)
                return tuple(str(name) for name in record) if isinstance(record, dict) else ()
    return ()


def _chosen(folder: Path, found: list[DatasetFile], others: list[str], *, are_one: bool = False) -> Plan:
    """The files of the first kind there is; the rest is noted. `are_one`: they are known to be one dataset.

    Raises:
        DatasetError: that kind has files which are not the splits, or the shards, of one dataset.
    """
    kind = next(kind for kind in _KINDS if any(file.kind == kind for file in found))
    files = sorted((file for file in found if file.kind == kind), key=lambda file: file.source)
    families: dict[Any, list[DatasetFile]] = {}
    for file in files:
        families.setdefault(
            frozenset(file.columns) if kind in ("parquet", "saved", "webdataset") else family_of(file.source),
            [],
        ).append(file)
    if len(families) > 1 and not are_one:
        names = ", ".join(file.source for file in files[:10]) + (", ..." if len(files) > 10 else "")
        message = f"{folder} holds {len(files)} files that could each be the dataset: {names}"
        raise DatasetError(
            message,
            f"name one, for instance {folder / files[0].source}",
            candidates=[file.source for file in files],
        )
    notes = []
    # A table beside a shard of the same name is img2dataset's, and read with the shard.
    beside = {file.path.with_suffix(".parquet") for file in files if kind == "webdataset"}
    ignored = [file.source for file in found if file.kind != kind and file.path not in beside]
    if ignored:
        notes.append(f"{_KINDS[kind]} goes before other files, so {_listed(ignored)} was not read")
    if others:
        notes.append(f"not read, as no image-caption pairs were recognised: {_listed(others)}")
    return _planned(folder, files, notes)


def _planned(root: Path, files: list[DatasetFile], notes: list[str]) -> Plan:
    names = _listed([file.source for file in files])
    file = files[0]
    match file.kind:
        case "metadata":
            layout = f"ImageFolder with {names}"
        case "karpathy":
            layout = f"Karpathy json {names} beside its images"
        case "coco":
            layout = f"COCO captions json {names} beside its images"
        case "webdataset":
            layout = f"webdataset {names}"
        case "parquet":
            layout = f"Parquet {names}"
        case "saved":
            layout = f"a dataset of datasets.save_to_disk, {names}"
        case _ if file.form == "mapping":
            layout = f"json map from file name to captions {names}"
        case _:
            layout = f"{'json' if file.form == 'records' else file.form} table {names}"
    if len(files) > 1:
        notes = [f"{len(files):,} files are read one after the other: {names}", *notes]
    notes += dict.fromkeys(note for file in files for note in file.notes)
    return Plan(root, layout, files, notes)


def _listed(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def _inventory(folder: Path) -> str:
    """What a folder holds, in a few words."""
    endings: Counter[str] = Counter()
    folders = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            folders.append(f"{entry.name}/")
        else:
            endings[entry.suffix.lower() or entry.name] += 1
    said = [f"{number:,} {ending}" for ending, number in endings.most_common(8)]
    return ", ".join([*folders[:8], *(["..."] if len(folders) > 8 else []), *said]) or "it is empty"
