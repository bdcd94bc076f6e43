"""Pairs that people know to be right, from a file, matched to the rows of the `pairs` table.

A file names them by `pair_id`, or by image and caption as the dataset names them; csv, tsv, json lines or Parquet.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nc_audit.dataset.ids import normalise_caption
from nc_audit.dataset.tables import guess_columns
from nc_audit.errors import DatasetError


@dataclass(frozen=True)
class Trusted:
    """Distinct pair ids that a file vouches for, and how many of its entries are no pair of the dataset."""

    pair_ids: list[str]
    num_unknown: int


def read_trusted(path: Path, pairs: pa.Table) -> Trusted:
    """The pairs that a file vouches for.

    Args:
        path: csv, tsv, jsonl or Parquet with a column `pair_id`, or with an image and a caption column.
        pairs: the `pairs` table.

    Returns:
        Their ids, sorted. An image is found by the name the dataset gives it, or by its last part where that is
        unambiguous; a caption counts as equal as it does for folding.

    Raises:
        DatasetError: the file cannot be read, has no such columns, or vouches for no pair of the dataset.
    """
    rows, columns = _rows(path)
    ok = pairs.filter(pc.equal(pairs["status"], "ok")).select(["pair_id", "image", "caption"])
    known = set(ok["pair_id"].to_pylist())
    if "pair_id" in columns:
        wanted = [str(row.get("pair_id")) for row in rows]
        found = [one if one in known else None for one in wanted]
    else:
        image, captions = guess_columns(columns)
        if image is None or not captions:
            raise DatasetError(
                f"{path.name}: no column pair_id, and no image and caption columns (found {', '.join(columns)})",
                "give --trusted a table with pair_id, or with image and caption",
            )
        by_name = _by_name(ok)
        found = []
        for row in rows:
            name = str(row.get(image))
            for caption in captions:
                key = normalise_caption(str(row.get(caption) or ""))
                found.append(by_name.get((name, key)) or by_name.get((_last(name), key)))
    hits = sorted({one for one in found if one})
    if not hits:
        raise DatasetError(
            f"{path.name}: none of its {len(rows):,} rows is a pair of the dataset",
            "name pairs by pair_id, or by image and caption as the dataset names them",
        )
    return Trusted(hits, sum(one is None for one in found))


def _by_name(ok: pa.Table) -> dict[tuple[str, str], str]:
    """Pair id by image name and caption, and by the name's last part where that tells one image from the others."""
    result: dict[tuple[str, str], str] = {}
    whole: dict[str, str] = {}
    torn: set[str] = set()
    for image in pc.unique(ok["image"]).to_pylist():
        if whole.setdefault(_last(image), image) != image:
            torn.add(_last(image))
    for pair_id, image, caption in zip(
        *(ok[name].to_pylist() for name in ("pair_id", "image", "caption")), strict=True
    ):
        key = normalise_caption(caption)
        if _last(image) not in torn:
            result.setdefault((_last(image), key), pair_id)
        result[image, key] = pair_id
    return result


def _last(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _rows(path: Path) -> tuple[list[dict[str, Any]], Sequence[str]]:
    if not path.is_file():
        raise DatasetError(f"--trusted: there is no file {path}", "give a csv, jsonl or Parquet file")
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            table = pq.read_table(path)
            return table.to_pylist(), table.column_names
        if kind in (".jsonl", ".ndjson"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no JSON object")
            return rows, sorted({key for row in rows for key in row})
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
            return list(reader), reader.fieldnames or []
    except (OSError, ValueError, csv.Error, RecursionError, pa.ArrowException) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise DatasetError(
            f"--trusted: {path.name} cannot be read: {reason}", "give a csv, jsonl or Parquet file in UTF-8"
        ) from problem
