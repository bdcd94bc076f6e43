"""Which input rows an export keeps, with which caption and weight, and why it drops the others.

Every input row ends in exactly one of two tables. Reading the images may move a few more from the first to the
second; nothing else may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.report.joined import joined
from nc_audit.run import Run

_PAIRS = ["pair_id", "image_id", "image", "image_uri", "caption", "split", "status", "status_detail"]
_SCORES = ["noise_probability", "best_caption", "best_caption_margin"]

NOT_SCORED = "not scored"
UNREADABLE = "image no longer readable"

DROPPED = pa.schema(
    [
        ("row", pa.int64()),
        ("pair_id", pa.string()),
        ("image", pa.string()),
        ("caption", pa.string()),
        ("why", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What is to be exported.

    Attributes:
        kept: columns row, pair_id, image_id, image, image_uri, caption, split, tag, noise_probability; `weight` (0..1)
            when asked for; `original_caption` (null where unchanged) and `best_caption_margin` with re-matching.
        dropped: columns as in DROPPED.
        with_splits: whether any row of the dataset names its split.
    """

    kept: pa.Table
    dropped: pa.Table
    with_splits: bool


@dataclass
class Written:
    """What the writer of a format made.

    Attributes:
        columns: names of the exported columns, in order.
        splits: files by split, names relative to the export folder.
        num_rows: exported rows by split.
        unreadable: rows whose image could not be read, with the reason.
    """

    columns: list[str]
    splits: dict[str, list[str]] = field(default_factory=dict)
    num_rows: dict[str, int] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)


def plan_export(run: Run, *, drop: Sequence[str], reweight: bool, rematch: bool) -> Plan:
    """The rows of a run, kept or dropped.

    Args:
        run: a run that is scored and tagged.
        drop: tags to leave out, checked already.
        reweight: add `weight`: 1 - noise_probability, clipped to 0..1. A re-matched pair gets the noise probability
            itself: its new caption is trusted as much as the old one was distrusted.
        rematch: give a noisy pair its best_caption where that fits better (margin above 0) and keep it. Its tag and
            noise_probability still speak of the pair as it was audited.

    Raises:
        RunError: a table is missing or stale.
    """
    table = joined(run, pairs=_PAIRS, scores=_SCORES, tags=["tag"])
    with_splits = table["split"].null_count < table.num_rows

    is_ok = pc.equal(table["status"], "ok")
    is_scored = pc.is_valid(table["tag"])
    if reweight:
        is_scored = pc.and_(is_scored, pc.fill_null(pc.is_finite(table["noise_probability"]), False))
    is_unwanted = pc.is_in(table["tag"], value_set=pa.array(drop, pa.string()))
    is_changed = _is_rematched(table) if rematch else pa.array(np.zeros(table.num_rows, bool))
    is_unwanted = pc.and_(is_unwanted, pc.invert(is_changed))
    why = pc.if_else(
        pc.invert(is_ok),
        pc.binary_join_element_wise("status", table["status"], ": "),
        pc.if_else(
            pc.invert(is_scored),
            pa.scalar(NOT_SCORED),
            pc.if_else(
                is_unwanted,
                pc.binary_join_element_wise("tag", table["tag"], ": "),
                pa.scalar(None, pa.string()),
            ),
        ),
    )
    table = table.append_column("why", why).append_column("is_changed", is_changed)
    is_kept = pc.is_null(table["why"])
    dropped = (
        table.filter(pc.invert(is_kept)).rename_columns({"status_detail": "detail"}).select(DROPPED.names)
    )
    kept = table.filter(is_kept)
    if reweight:
        kept = kept.append_column("weight", _weight(kept))
    if rematch:
        original = pc.if_else(kept["is_changed"], kept["caption"], pa.scalar(None, pa.string()))
        kept = kept.append_column("original_caption", original)
        caption = pc.if_else(kept["is_changed"], kept["best_caption"], kept["caption"])
        kept = kept.set_column(kept.column_names.index("caption"), "caption", caption)
    unneeded = ["status", "status_detail", "why", "is_changed", "best_caption"]
    kept = kept.drop_columns(unneeded if rematch else [*unneeded, "best_caption_margin"])
    return Plan(kept, dropped.cast(DROPPED), with_splits)


def _is_rematched(table: pa.Table) -> pa.ChunkedArray:
    better = table["best_caption"]
    is_better = pc.and_(pc.equal(table["tag"], "noisy"), pc.greater(table["best_caption_margin"], 0))
    is_better = pc.and_(is_better, pc.is_finite(table["best_caption_margin"]))
    has_words = pc.not_equal(pc.utf8_trim_whitespace(better), "")
    is_other = pc.not_equal(better, table["caption"])
    return pc.fill_null(pc.and_(pc.and_(is_better, has_words), is_other), False)


def _weight(kept: pa.Table) -> pa.ChunkedArray:
    probability = pc.min_element_wise(pc.max_element_wise(kept["noise_probability"], 0), 1)
    weight = pc.if_else(kept["is_changed"], probability, pc.subtract(1.0, probability))
    return weight.cast(pa.float32())
