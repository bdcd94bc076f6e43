"""csv, jsonl and ImageFolder: a table of captions beside image files, each image stored once.

In csv, a cell that a spreadsheet would take for a formula gets a leading apostrophe; see `dataset.guard`, which also
takes it away again when the export is read here. jsonl is exact as it is.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from nc_audit.dataset.guard import guard
from nc_audit.export.plan import Written
from nc_audit.export.rows import (
    ImageFiles,
    Progress,
    ReadImage,
    Rows,
    Steady,
    beside,
    facts_of,
    names_of_splits,
    split_series,
)
from nc_audit.report.text import json_text

IMAGES = "images"
CSV, JSONL, METADATA = "captions.csv", "captions.jsonl", "metadata.jsonl"


def write_csv(
    kept: pa.Table, folder: Path, read: ReadImage, *, with_splits: bool, progress: Progress | None = None
) -> Written:
    """Write `captions.csv` (image, caption and the other columns, all rows in order) and `images/`.

    Args:
        kept: rows of a plan.
        folder: an empty folder.
        read: the bytes of an image.
        with_splits: whether there is a column `split`.
        progress: called with the rows done and their number.
    """
    names = facts_of(kept, with_splits=with_splits)
    columns = ["image", "caption", *names]
    splits = names_of_splits(kept, with_splits=with_splits)
    rows, images = Rows(read, kept.num_rows, progress), ImageFiles(folder / IMAGES)
    written = Written(columns, unreadable=rows.unreadable, hub=_whole(CSV, with_splits), data={CSV: None})
    # RFC 4180; with a bare line feed a carriage return inside a caption would go unquoted.
    with (folder / CSV).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(guard(name) for name in columns)
        for row, data in rows.each(kept, images):
            name = images.store(row, data)
            cells = [f"{IMAGES}/{name}", row["caption"], *(row[name] for name in names)]
            writer.writerow([_cell(value) for value in cells])
            written.count(splits[row["split"]])
    return written


def write_jsonl(
    kept: pa.Table, folder: Path, read: ReadImage, *, with_splits: bool, progress: Progress | None = None
) -> Written:
    """Write `captions.jsonl` (one object per pair, all rows in order) and `images/`; arguments as in `write_csv`."""
    names = facts_of(kept, with_splits=with_splits)
    splits = names_of_splits(kept, with_splits=with_splits)
    rows, images = Rows(read, kept.num_rows, progress), ImageFiles(folder / IMAGES)
    written = Written(
        ["image", "caption", *names],
        unreadable=rows.unreadable,
        hub=_whole(JSONL, with_splits),
        data={JSONL: None},
    )
    with (folder / JSONL).open("w", encoding="utf-8", newline="\n") as file:
        for row, data in rows.each(kept, images):
            place = f"{IMAGES}/{images.store(row, data)}"
            record = {"image": place, "caption": row["caption"], **{name: row[name] for name in names}}
            file.write(json_text(record, indent=None) + "\n")
            written.count(splits[row["split"]])
    return written


def write_imagefolder(
    kept: pa.Table, folder: Path, read: ReadImage, *, with_splits: bool, progress: Progress | None = None
) -> Written:
    """Write a folder per split with its images and `metadata.jsonl`: file_name, text and the other columns.

    `text` is what fine-tuning scripts call the caption; it stays `caption` where the input has a column `text`. An
    image that two splits share is stored in both. Arguments as in `write_csv`.
    """
    facts = Steady(kept, with_splits=with_splits)
    caption = "caption" if "text" in facts.names else "text"
    # `datasets` takes every column that ends so for the name of a file.
    titles = {
        name: re.sub(r"file_name(s?)$", r"filename\1", title)
        for name, title in beside(facts.names, ["file_name", caption]).items()
    }
    rows = Rows(read, kept.num_rows, progress)
    written = Written(["file_name", caption, *titles.values()], unreadable=rows.unreadable)
    for split, split_name, table in split_series(kept, with_splits=with_splits):
        images, num_rows = ImageFiles(folder / split_name, [METADATA]), 0
        with (folder / split_name / METADATA).open("w", encoding="utf-8", newline="\n") as file:
            for row, data in rows.each(table, images):
                record = {"file_name": images.store(row, data), caption: row["caption"]}
                record |= {titles[name]: value for name, value in facts.of(row).items()}
                file.write(json_text(record, indent=None) + "\n")
                num_rows += 1
        if not num_rows:
            (folder / split_name / METADATA).unlink()
            (folder / split_name).rmdir()
            continue
        written.num_rows[split_name] = num_rows
        written.hub[split_name] = [f"{split_name}/**"]
        written.data[f"{split_name}/{METADATA}"] = split
    return written


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False)
    return guard(value) if isinstance(value, str) else value


def _whole(file: str, with_splits: bool) -> dict[str, list[str]]:
    """What the hub is told of a table: it would take one that mixes splits for a training split, so nothing."""
    return {} if with_splits else {"train": [file]}
