"""Stage 7, export: the pairs of a run as a dataset that other training pipelines read as it is.

Every input row is exported or listed in `dropped.csv` with the reason; the counts reconcile or the export fails. A
format is one module with one writer; what is kept, the card and the folder are the same for all of them.
"""

from __future__ import annotations

import csv
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nc_audit import __version__
from nc_audit.errors import DatasetError, RunError, nearest
from nc_audit.export.card import CardFacts, card
from nc_audit.export.folder import check_place, replacing_folder, write_marker
from nc_audit.export.parquet import write_shards
from nc_audit.export.plan import DROPPED, UNREADABLE, Written, plan_export
from nc_audit.report import check_tags, count_values, summary
from nc_audit.report.text import csv_cell, plain
from nc_audit.run import Run

__all__ = ["FORMATS", "ExportResult", "export_run"]

# A writer takes the kept rows, an empty folder, a reader of images, `with_splits` and `progress`.
FORMATS: dict[str, Callable[..., Written]] = {"parquet": write_shards}

_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportResult:
    """What an export did; `rows` = `kept` + the sum of `dropped`.

    Attributes:
        out: the folder.
        rows: rows of the run.
        kept: rows exported.
        dropped: rows dropped, by reason.
        num_rematched: exported rows whose caption was replaced.
        files: every file below `out`, relative names.
    """

    out: Path
    rows: int
    kept: int
    dropped: dict[str, int]
    num_rematched: int
    files: list[str]


def export_run(
    run: Run,
    out: Path,
    *,
    format: str = "parquet",
    drop: Sequence[str] = (),
    reweight: bool = False,
    rematch: bool = False,
    overwrite: bool = False,
    read_image: Callable[[str], bytes],
    progress: Callable[[int, int | None], None] | None = None,
) -> ExportResult:
    """Write the pairs of a run as a dataset folder with the images inside.

    Args:
        run: a run that is scored and tagged.
        out: the folder to make. An earlier export there is replaced as a whole.
        format: one of FORMATS.
        drop: tags to leave out. Rows whose status is not ok are always left out: there is no pair to train on.
        reweight: add the column `weight`, 0..1, 1 - noise_probability.
        rematch: give noisy pairs the caption that fits better, where there is one; each change is listed.
        overwrite: replace `out` even when it holds other files; they are deleted.
        read_image: the bytes of an image by its image_uri; OSError or ValueError (so also our DatasetError) where
            there are none any more, which drops the row.
        progress: called with the rows done and their number.

    Raises:
        DatasetError: the format or a tag is unknown, `out` may not be replaced, or no row would be left.
        RunError: a table of the run is missing or stale, another process exports to `out`, or counts disagree.
    """
    if format not in FORMATS:
        raise DatasetError(f"unknown export format {plain(format)!r}", nearest(format, list(FORMATS)))
    drop = check_tags(drop, "drop")
    check_place(out, overwrite=overwrite, keep=_kept_places(run))
    before = summary(run)
    plan = plan_export(run, drop=drop, reweight=reweight, rematch=rematch)
    if not plan.kept.num_rows:
        raise DatasetError(
            _nothing_left(_by_reason(plan.dropped)), "drop fewer tags, or audit a dataset with usable pairs"
        )

    with replacing_folder(out) as folder:
        read = _Reader(read_image).read
        written = FORMATS[format](plan.kept, folder, read, with_splits=plan.with_splits, progress=progress)
        kept, dropped = _without(plan.kept, plan.dropped, written.unreadable)
        reasons = _by_reason(dropped)
        num_kept = sum(written.num_rows.values())
        if not num_kept:
            raise DatasetError(
                _nothing_left(reasons) + f"; first problem: {plain(next(iter(written.unreadable.values())))}",
                "put the images back where they were when the run was scored",
            )
        if not num_kept == kept.num_rows == before["rows"] - dropped.num_rows:
            raise RunError(
                f"counts disagree: {before['rows']:,} rows, {num_kept:,} written, {dropped.num_rows:,} dropped",
                "this is a fault of nc-audit; please report it",
            )
        _write_csv(folder / "dropped.csv", dropped, DROPPED.names)
        changed = kept.filter(pc.is_valid(kept["original_caption"])) if rematch else kept.slice(0, 0)
        if rematch:
            names = [
                "row",
                "pair_id",
                "image",
                "original_caption",
                "caption",
                "best_caption_margin",
                "noise_probability",
            ]
            _write_csv(folder / "rematched.csv", changed, names)
        recipe = run.manifest.get("recipe") or {}
        options = {"drop": drop, "reweight": reweight, "rematch": rematch}
        facts = CardFacts(
            tool=__version__,
            dataset=_name_of(before["dataset"] or run.path),
            recipe=f"{recipe.get('name', 'unknown')} (digest {recipe.get('digest', 'unknown')})",
            options=[f"drop {tag}" for tag in drop] + [n for n in ("reweight", "rematch") if options[n]],
            rows=before["rows"],
            kept=num_kept,
            status=before["status"],
            tags=before["tags"],
            noise_rate=before["noise_rate"],
            dropped=reasons,
            splits=written.num_rows,
            columns=written.columns,
            num_rematched=changed.num_rows,
        )
        (folder / "README.md").write_text(card(facts), encoding="utf-8")
        write_marker(
            folder,
            tool=__version__,
            run=run.path.resolve().name,
            recipe=recipe,
            format=format,
            options=options,
            rows=before["rows"],
            kept=num_kept,
            dropped=reasons,
            rematched=changed.num_rows,
        )
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return ExportResult(out, before["rows"], num_kept, reasons, changed.num_rows, files)


class _Reader:
    """Reads each image once while its copies are near, in bounded memory."""

    def __init__(self, read_image: Callable[[str], bytes]) -> None:
        self.read_image = read_image
        self.held: OrderedDict[str, bytes] = OrderedDict()
        self.size = 0

    def read(self, image_id: str, uri: str) -> bytes:
        """The bytes of an image; equal ids mean equal bytes."""
        if image_id in self.held:
            return self.held[image_id]
        data = self.read_image(uri)
        self.held[image_id] = data
        self.size += len(data)
        while self.size > _CACHE_BYTES and len(self.held) > 1:
            self.size -= len(self.held.popitem(last=False)[1])
        return data


def _kept_places(run: Run) -> list[Path]:
    dataset = run.manifest.get("dataset") or {}
    named = [dataset.get("path"), *(dataset.get("roots") or {}).values()]
    places = [run.path, *(Path(place) for place in named if place), Path.cwd()]
    # A user without an account, as in some containers, has no home.
    with suppress(RuntimeError):
        places.append(Path.home())
    return places


def _without(kept: pa.Table, dropped: pa.Table, unreadable: dict[int, str]) -> tuple[pa.Table, pa.Table]:
    """The two tables after the rows that could not be read moved from the first to the second."""
    if not unreadable:
        return kept, dropped
    is_gone = pc.is_in(kept["row"], value_set=pa.array(unreadable, pa.int64()))
    gone = kept.filter(is_gone)
    detail = pa.array([unreadable[row] for row in gone["row"].to_pylist()], pa.string())
    why = pa.array([UNREADABLE] * gone.num_rows, pa.string())
    if "original_caption" in gone.column_names:
        caption = pc.coalesce(gone["original_caption"], gone["caption"])
        gone = gone.set_column(gone.column_names.index("caption"), "caption", caption)
    gone = gone.append_column("why", why).append_column("detail", detail).select(DROPPED.names).cast(DROPPED)
    together = pa.concat_tables([dropped, gone])
    return kept.filter(pc.invert(is_gone)), together.take(
        np.argsort(together["row"].to_numpy(), kind="stable")
    )


def _by_reason(dropped: pa.Table) -> dict[str, int]:
    return count_values(dropped["why"], ())


def _nothing_left(reasons: dict[str, int]) -> str:
    counts = ", ".join(f"{count:,} {plain(reason)}" for reason, count in reasons.items())
    return f"no pair is left to export: {counts or 'the run has no rows'}"


def _write_csv(path: Path, table: pa.Table, names: Sequence[str]) -> None:
    """A table as CSV whose texts no spreadsheet takes for formulas."""
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(names)
        for batch in _short_floats(table.select(list(names))).to_batches(max_chunksize=1 << 16):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                writer.writerow([csv_cell(value) if isinstance(value, str) else value for value in values])


def _short_floats(table: pa.Table) -> pa.Table:
    """The table with float32 as the shortest decimal that means the same: 0.2, not 0.20000000298."""
    for place, column in enumerate(table.schema):
        if column.type == pa.float32():
            short = table[column.name].cast(pa.string()).cast(pa.float64())
            table = table.set_column(place, column.name, short)
    return table


def _name_of(path: object) -> str:
    """The last part of a path: a card is published, where a dataset lay is nobody's business."""
    parts = [part for part in re.split(r"[\\/]", str(path)) if part not in {"", ".", ".."}]
    return parts[-1] if parts else "dataset"
