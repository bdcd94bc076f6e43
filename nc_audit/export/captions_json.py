"""The two json families of captioning: COCO's, one file of annotations per split, and Karpathy's, one for all.

Both stand beside `images/`, where each distinct image lies once. The documents are written as they grow, not held.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from nc_audit.export.plan import Written
from nc_audit.export.rows import (
    ImageFiles,
    Progress,
    ReadImage,
    Rows,
    beside,
    facts_of,
    image_key,
    names_of_splits,
    split_series,
)
from nc_audit.report.text import json_text

IMAGES, ANNOTATIONS, KARPATHY = "images", "annotations", "dataset.json"
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def write_coco(
    kept: pa.Table, folder: Path, read: ReadImage, *, with_splits: bool, progress: Progress | None = None
) -> Written:
    """Write `annotations/captions_SPLIT.json` (`captions.json` without splits) and `images/`.

    An annotation is a pair, in the order of the rows; `id` counts from 1 over all splits. An image that two splits
    share has one id and one file.

    Args:
        kept: rows of a plan.
        folder: an empty folder.
        read: the bytes of an image.
        with_splits: one file per split.
        progress: called with the rows done and their number.
    """
    titles = _titles(kept, ("id", "image_id", "caption"))
    rows, images = Rows(read, kept.num_rows, progress), ImageFiles(folder / IMAGES)
    written = Written(["file_name", "caption", *titles.values()], unreadable=rows.unreadable)
    (folder / ANNOTATIONS).mkdir()
    numbers: dict[str, int] = {}
    next_id = 1
    for split, split_name, table in split_series(kept, with_splits=with_splits):
        name = f"{ANNOTATIONS}/captions_{split_name}.json" if with_splits else f"{ANNOTATIONS}/captions.json"
        later, here = folder / f"{name}.annotations", set[str]()
        first_id = next_id
        with (folder / name).open("w", encoding="utf-8") as file, later.open("w", encoding="utf-8") as more:
            file.write('{"info": {"description": "written by nc-audit"}, "licenses": [], "images": [')
            for row, data in rows.each(table, images):
                stored = images.store(row, data)
                number = numbers.setdefault(stored, len(numbers) + 1)
                if stored not in here:
                    image = {"id": number, "file_name": stored, "content_id": row["image_id"]}
                    _append(file, image | ({"split": split} if split is not None else {}), len(here))
                    here.add(stored)
                annotation = {"id": next_id, "image_id": number, "caption": row["caption"]}
                _append(
                    more,
                    annotation | {title: row[name] for name, title in titles.items()},
                    next_id - first_id,
                )
                next_id += 1
            file.write('\n], "annotations": [')
            more.close()
            with later.open(encoding="utf-8") as found:
                shutil.copyfileobj(found, file)
            file.write("\n]}\n")
        later.unlink()
        if next_id == first_id:
            (folder / name).unlink()
            continue
        written.num_rows[split_name] = next_id - first_id
        written.data[name] = split
    return written


def write_karpathy(
    kept: pa.Table, folder: Path, read: ReadImage, *, with_splits: bool, progress: Progress | None = None
) -> Written:
    """Write `dataset.json`, an entry per image and split with its sentences, and `images/`.

    Entries follow the first row of each image, sentences the order of the rows. `sentid` counts from 0 over all.
    Arguments as in `write_coco`.
    """
    titles = _titles(kept, ("raw", "tokens", "imgid", "sentid"))
    splits = names_of_splits(kept, with_splits=with_splits)
    rows, images = Rows(read, kept.num_rows, progress), ImageFiles(folder / IMAGES)
    written = Written(
        ["filename", "raw", *titles.values()],
        unreadable=rows.unreadable,
        data={KARPATHY: None},
    )
    num_images, num_sentences = 0, 0
    entry: dict[str, Any] = {}
    key: tuple[str, str | None] | None = None
    with (folder / KARPATHY).open("w", encoding="utf-8") as file:
        file.write('{"dataset": "written by nc-audit", "images": [')
        for row, data in rows.each(_grouped(kept), images):
            stored = images.store(row, data)
            if key != (stored, row["split"]):
                if entry:
                    _append(file, entry, num_images)
                    num_images += 1
                key = (stored, row["split"])
                entry = {"filename": stored, "filepath": IMAGES, "imgid": num_images, "sentids": []}
                entry |= {"content_id": row["image_id"], "sentences": []}
                entry |= {"split": row["split"]} if row["split"] is not None else {}
            sentence = {"raw": row["caption"], "tokens": _WORD.findall(row["caption"].lower())}
            sentence |= {"imgid": num_images, "sentid": num_sentences} | {
                title: row[name] for name, title in titles.items()
            }
            entry["sentids"].append(num_sentences)
            entry["sentences"].append(sentence)
            num_sentences += 1
            written.count(splits[row["split"]])
        if entry:
            _append(file, entry, num_images)
        file.write("\n]}\n")
    return written


def _titles(kept: pa.Table, own: Sequence[str]) -> dict[str, str]:
    """The keys of the facts in an annotation; what speaks of the image stands with the image."""
    names = facts_of(kept, with_splits=False)
    return beside([name for name in names if name != "image_id"], own)


def _append(file: TextIO, value: dict[str, Any], place: int) -> None:
    file.write((",\n" if place else "\n") + json_text(value, indent=None))


def _grouped(kept: pa.Table) -> pa.Table:
    """The rows with those of one image and split together, in the order of first appearance."""
    columns = (kept[name].to_pylist() for name in ("image", "image_id", "split"))
    places: dict[tuple[tuple[str, str], str | None], int] = {}
    group = np.empty(kept.num_rows, np.int64)
    for at, (image, image_id, split) in enumerate(zip(*columns, strict=True)):
        group[at] = places.setdefault((image_key(image, image_id), split), len(places))
    return kept.take(pa.array(np.argsort(group, kind="stable")))
