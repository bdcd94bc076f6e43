"""Stage 7, export: the pairs of a run as a dataset that other training pipelines read as it is.

Every input row is exported or listed in `dropped.csv` with the reason; the counts reconcile or the export fails. A
format is one writer; what is kept, the lists, the card and the folder are the same for all of them.
"""

from __future__ import annotations

import csv
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from nc_audit import __version__
from nc_audit.errors import DatasetError, RunError, nearest
from nc_audit.export.captions_json import write_coco, write_karpathy
from nc_audit.export.card import CardFacts, card
from nc_audit.export.croissant import croissant
from nc_audit.export.datacomp import write_datacomp
from nc_audit.export.folder import check_place, replacing_folder, write_marker
from nc_audit.export.hub import write_hub
from nc_audit.export.parquet import write_shards, write_tables
from nc_audit.export.plan import DROPPED, UNREADABLE, Plan, Written, plan_export
from nc_audit.export.rows import short_floats
from nc_audit.export.tables import write_csv, write_imagefolder, write_jsonl
from nc_audit.export.webdataset import write_webdataset
from nc_audit.report import check_tags, count_values, summary
from nc_audit.report.text import csv_cell, plain
from nc_audit.run import Run

__all__ = ["FORMATS", "ExportDefaults", "ExportResult", "Format", "export_run", "recipe_defaults"]


@dataclass(frozen=True)
class Format:
    """A format: its writer, what a card says of it, and what it can carry.

    Attributes:
        write: takes the kept rows, an empty folder, a reader of images, `with_splits` and `progress`.
        about: what is in the folder and how to read it, as Markdown.
        carries_captions: whether it holds captions and weights, not ids alone.
    """

    write: Callable[..., Written]
    about: str
    carries_captions: bool = True


WITHOUT_IMAGES = Format(
    write_tables,
    "Parquet in `data/` without the images: `image` is the name that the dataset gives each. `nc-audit score` reads it "
    "with `--image-root`.",
)
"""The format `parquet` where no images are wanted."""

FORMATS = {
    "parquet": Format(
        write_shards,
        "Parquet shards in `data/` with the image files inside; `datasets.load_dataset` reads this folder.",
    ),
    "imagefolder": Format(
        write_imagefolder,
        "A folder per split with image files and `metadata.jsonl`, whose `file_name` is relative to it; "
        "`datasets.load_dataset` reads this folder. Texts without a value are empty.",
    ),
    "webdataset": Format(
        write_webdataset,
        "Tar shards in `data/`: the image, `.txt` (the caption) and `.json` (all columns) of a pair share a number, "
        "the row. `webdataset.WebDataset` reads the shards; `datasets.load_dataset` reads this folder where all images "
        "are of one kind. Texts without a value are empty.",
    ),
    "coco": Format(
        write_coco,
        "`annotations/captions*.json`, one for each split, and `images/`; "
        "`torchvision.datasets.CocoCaptions(root='images', annFile=...)` reads them. `id` of an annotation counts "
        "the pairs from 1, `content_id` of an image is its `image_id` in the run.",
    ),
    "karpathy": Format(
        write_karpathy,
        "`dataset.json`, an entry for each image and split with its sentences, and `images/`. Sentences of an image "
        "stand together; `row` is the place of each in the input.",
    ),
    "csv": Format(
        write_csv,
        "`captions.csv` (UTF-8, quoted as RFC 4180 says) and `images/`. A cell that a spreadsheet would run as a "
        "formula (it begins with =, +, -, @, a tab or a line break, perhaps after apostrophes) has one apostrophe "
        "more in front; take one away to have it exactly. `nc-audit score` on this folder does so.",
    ),
    "jsonl": Format(write_jsonl, "`captions.jsonl`, an object for each pair, and `images/`."),
    "datacomp": Format(
        write_datacomp,
        "`uids*.npy`: the distinct ids of the kept pairs, sorted, numpy dtype `u8,u8`, as DataComp's resharder takes "
        "them. They are the input's `uid` where every row has one of 32 hexadecimal digits, else the `pair_id`.",
        carries_captions=False,
    ),
    "hf": Format(write_hub, "A folder for `datasets.load_from_disk`, with the images inside."),
}

DROPPED_LIST, CHANGES_LIST = "dropped.csv", "rematches.csv"

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
        notes: what the user should know.
    """

    out: Path
    rows: int
    kept: int
    dropped: dict[str, int]
    num_rematched: int
    files: list[str]
    notes: list[str]


@dataclass(frozen=True)
class ExportDefaults:
    """What an export does when the command does not say: the section `[export]` of the run's recipe."""

    format: str = "parquet"
    drop: tuple[str, ...] = ()
    reweight: bool = False


def recipe_defaults(run: Run) -> ExportDefaults:
    """The defaults by the recipe that a run was scored with."""
    recipe = run.manifest.get("recipe") or {}
    section = (recipe.get("settings") or {}).get("export") or {}
    return ExportDefaults(
        section.get("format", "parquet"), tuple(section.get("drop", ())), bool(section.get("reweight", False))
    )


def export_run(
    run: Run,
    out: Path,
    *,
    format: str = "parquet",
    drop: Sequence[str] = (),
    reweight: bool = False,
    rematch: bool = False,
    with_images: bool = True,
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
        reweight: add `weight`, 0..1: 1 - noise_probability, or what people decided.
        rematch: give pairs the caption of the row that the run found to fit, where it is confident; each change is
            listed in `rematches.csv`, as are captions that people corrected.
        with_images: store the images too; without, only `parquet` is written, and no image is read.
        overwrite: replace `out` even when it holds other files; they are deleted.
        read_image: the bytes of an image by its image_uri; OSError or ValueError (so also our DatasetError) where
            there are none any more, which drops the row.
        progress: called with the rows done and their number.

    Raises:
        DatasetError: the format or a tag is unknown, `out` may not be replaced, or no row would be left.
        RunError: a table of the run is missing or stale, another process writes to the run or exports to
            `out`, or counts disagree.
    """
    if format not in FORMATS:
        raise DatasetError(f"unknown export format {plain(format)!r}", nearest(format, list(FORMATS)))
    form = FORMATS[format] if with_images else WITHOUT_IMAGES
    if not with_images and format != "parquet":
        raise DatasetError(
            f"{format} comes with its images", "--no-images goes with --format parquet; datacomp has none"
        )
    for is_asked, option, what in ((reweight, "--reweight", "weights"), (rematch, "--rematch", "captions")):
        if is_asked and not form.carries_captions:
            raise DatasetError(
                f"{option}: {format} is a list of ids, which cannot carry {what}", "take another --format"
            )
    drop = check_tags(drop, "drop")
    check_place(out, overwrite=overwrite, keep=_kept_places(run))
    with run.settled():
        before = summary(run)
        plan = plan_export(
            run, drop=drop, reweight=reweight, rematch=rematch, carries_captions=form.carries_captions
        )
    if not plan.kept.num_rows:
        raise DatasetError(
            _nothing_left(_by_reason(plan.dropped)), "drop fewer tags, or audit a dataset with usable pairs"
        )

    with replacing_folder(out) as folder:
        read = _Reader(read_image).read
        written = form.write(plan.kept, folder, read, with_splits=plan.with_splits, progress=progress)
        dropped = _with_unreadable(plan, written.unreadable)
        reasons = _by_reason(dropped)
        num_kept = sum(written.num_rows.values())
        if not num_kept:
            raise DatasetError(
                _nothing_left(reasons) + f"; first problem: {plain(next(iter(written.unreadable.values())))}",
                "put the images back where they were when the run was scored",
            )
        expected = plan.kept.num_rows - len(written.unreadable)
        if not num_kept == expected == before["rows"] - dropped.num_rows:
            raise RunError(
                f"counts disagree: {before['rows']:,} rows, {num_kept:,} written, {dropped.num_rows:,} dropped",
                "this is a fault of nc-audit; please report it",
            )
        _write_csv(folder / DROPPED_LIST, dropped)
        changes = plan.changes.filter(pc.invert(_is_among(plan.changes["row"], written.unreadable)))
        if rematch or changes.num_rows:
            _write_csv(folder / CHANGES_LIST, changes)
        recipe = run.manifest.get("recipe") or {}
        options = {"drop": drop, "reweight": reweight, "rematch": rematch}
        if not with_images:
            options["images"] = False
        facts = CardFacts(
            tool=__version__,
            dataset=_name_of(before["dataset"] or run.path),
            recipe=f"{recipe.get('name', 'unknown')} (digest {recipe.get('digest', 'unknown')})",
            options=[f"drop {tag}" for tag in drop] + [n for n in ("reweight", "rematch") if options[n]],
            about=form.about,
            rows=before["rows"],
            kept=num_kept,
            status=before["status"],
            tags=before["tags"],
            noise_rate=before["noise_rate"],
            dropped=reasons,
            splits=written.num_rows,
            hub=written.hub,
            columns=written.columns,
            num_rematched=changes.num_rows,
            num_decided=plan.num_decided,
            changes_list=CHANGES_LIST if rematch or changes.num_rows else None,
        )
        (folder / "README.md").write_text(card(facts), encoding="utf-8")
        described = croissant(facts, folder, plan.kept.schema, images_inside=with_images)
        (folder / "croissant.json").write_text(described, encoding="utf-8")
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
            rematched=changes.num_rows,
            data=[{"file": file, "split": split} for file, split in written.data.items()],
        )
        notes = [*plan.notes, *written.notes]
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return ExportResult(out, before["rows"], num_kept, reasons, changes.num_rows, files, notes)


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


def _with_unreadable(plan: Plan, unreadable: dict[int, str]) -> pa.Table:
    """The dropped rows with those whose image could not be read, captions as the dataset gives them."""
    if not unreadable:
        return plan.dropped
    gone = plan.kept.filter(_is_among(plan.kept["row"], unreadable))
    detail = pa.array([unreadable[row] for row in gone["row"].to_pylist()], pa.string())
    why = pa.array([UNREADABLE] * gone.num_rows, pa.string())
    at = pc.index_in(gone["row"], value_set=plan.changes["row"].combine_chunks())
    caption = pc.if_else(pc.is_valid(at), plan.changes["old_caption"].take(at), gone["caption"])
    gone = gone.set_column(gone.column_names.index("caption"), "caption", caption)
    gone = gone.append_column("why", why).append_column("detail", detail).select(DROPPED.names).cast(DROPPED)
    return pa.concat_tables([plan.dropped, gone]).sort_by("row")


def _is_among(rows: pa.ChunkedArray, wanted: Iterable[int]) -> pa.ChunkedArray:
    return pc.is_in(rows, value_set=pa.array(wanted, pa.int64()))


def _by_reason(dropped: pa.Table) -> dict[str, int]:
    return count_values(dropped["why"], ())


def _nothing_left(reasons: dict[str, int]) -> str:
    counts = ", ".join(f"{count:,} {plain(reason)}" for reason, count in reasons.items())
    return f"no pair is left to export: {counts or 'the run has no rows'}"


def _write_csv(path: Path, table: pa.Table) -> None:
    """A table as CSV for people: no text is taken for a formula or hides a character."""
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(table.column_names)
        for batch in short_floats(table).to_batches(max_chunksize=1 << 16):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                writer.writerow([csv_cell(value) if isinstance(value, str) else value for value in values])


def _name_of(path: object) -> str:
    """The last part of a path: a card is published, where a dataset lay is nobody's business."""
    parts = [part for part in re.split(r"[\\/]", str(path)) if part not in {"", ".", ".."}]
    return parts[-1] if parts else "dataset"
