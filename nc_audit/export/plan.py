"""Which input rows an export keeps, with which caption and weight, and why it drops the others.

Every input row ends in exactly one of two tables. Reading the images may move a few more from the first to the
second; nothing else may. What people decided goes before what the model said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.decisions import Decision, read_decisions
from nc_audit.report.joined import columns_of, joined
from nc_audit.run import Run
from nc_audit.schema import PAIRS

_PAIRS = [
    "pair_id", "image_id", "image", "image_uri", "caption", "split", "status", "status_detail", "known_noise",
]  # fmt: skip
_REMATCH = ["rematch_row", "rematch_probability"]
_OURS = {*PAIRS.names, *_REMATCH, "tag", "noise_probability", "weight", "original_caption"}

NOT_SCORED = "not scored"
UNREADABLE = "image no longer readable"
DROPPED_BY_PEOPLE = "decision: drop"
CHANGED = "caption changed, which ids cannot say"
_NO_CAPTION = ("empty_caption", "missing_caption")

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

CHANGES = pa.schema(
    [
        ("row", pa.int64()),
        ("image", pa.string()),
        ("old_caption", pa.string()),
        ("new_caption", pa.string()),
        ("probability", pa.float32()),
        ("pair_id", pa.string()),
        ("from_row", pa.int64()),
        ("decided_by", pa.string()),
    ]
)
"""`probability` is the noise probability of the pair as it is now, `from_row` the row whose caption it is; both are
null where a person wrote the caption."""


@dataclass(frozen=True)
class Plan:
    """What is to be exported.

    Attributes:
        kept: image_id, image, image_uri, caption, and what is exported beside them: row, pair_id, split, tag,
            noise_probability; `weight` (0..1) when asked for; `original_caption` (null where unchanged) when captions
            may change; `known_noise` where the dataset states it; other columns of the input.
        dropped: columns as in DROPPED.
        changes: kept rows whose caption was replaced, columns as in CHANGES.
        with_splits: whether any row of the dataset names its split.
        notes: what the user should know.
        num_decided: rows that people decided about.
    """

    kept: pa.Table
    dropped: pa.Table
    changes: pa.Table
    with_splits: bool
    notes: list[str]
    num_decided: int


@dataclass
class Written:
    """What the writer of a format made.

    Attributes:
        columns: names of the exported columns, in order.
        num_rows: exported rows by split, under the split's safe name.
        unreadable: rows whose image could not be read, with the reason.
        hub: for each split, patterns of the files that the `datasets` library reads; empty where it reads none.
        data: files that state pairs, with the split of their rows as the dataset names it; names relative to the
            export folder, in the order to read them.
        notes: what the user should know.
    """

    columns: list[str]
    num_rows: dict[str, int] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    hub: dict[str, list[str]] = field(default_factory=dict)
    data: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, split_name: str) -> None:
        """One more row of a split, by its safe name."""
        self.num_rows[split_name] = self.num_rows.get(split_name, 0) + 1


def plan_export(
    run: Run, *, drop: Sequence[str], reweight: bool, rematch: bool, carries_captions: bool = True
) -> Plan:
    """The rows of a run, kept or dropped.

    What people decided stands above the tags: a pair they keep or mend is never dropped by its tag, and one they drop
    goes whenever anything is dropped. Its tag is exported as clean or noisy accordingly, its weight is 1 or 0.

    Args:
        run: a run that is scored and tagged.
        drop: tags to leave out, checked already.
        reweight: add `weight`: 1 - noise_probability, clipped to 0..1; for a re-matched pair 1 - the noise
            probability of the pair so made.
        rematch: give a pair the caption of its `rematch_row`, where the run found one, and keep it. Its tag and
            noise_probability still speak of the pair as it was audited.
        carries_captions: whether the format can say a new caption; else pairs that need one are dropped.

    Raises:
        RunError: a table is missing or stale, or decisions.jsonl is damaged.
    """
    extras = [name for name in columns_of(run, "pairs") if name not in _OURS]
    known = [name for name in _REMATCH if name in columns_of(run, "tags")]
    has_rematches = rematch and len(known) == len(_REMATCH)
    decisions, notes = read_decisions(run.path)
    table = joined(
        run,
        pairs=[*_PAIRS, *extras],
        scores=["noise_probability"],
        tags=["tag", *(known if has_rematches else [])],
    )
    with_splits = table["split"].null_count < table.num_rows

    new, decided = _decided(table, decisions)
    if has_rematches:
        new = _rematched(table, new, decided)
    if rematch and not pc.any(pc.is_valid(new["from_row"])).as_py():
        why = "found no confident re-match" if has_rematches else "did not look for re-matches"
        notes.append(f"--rematch changes nothing: the run {why}")
    table = table.append_column("decided", decided)
    is_mended = pc.is_valid(new["caption"])
    by_people = pc.is_valid(decided)

    is_usable = _or(
        pc.equal(table["status"], "ok"),
        _and(
            pc.is_in(table["status"], value_set=pa.array(_NO_CAPTION)),
            _and(is_mended, pc.is_valid(table["image_uri"])),
        ),
    )
    is_scored = pc.is_valid(table["tag"])
    if reweight:
        is_scored = _and(is_scored, pc.is_finite(table["noise_probability"]))
    is_scored = _or(is_scored, by_people)
    is_out = _and(pc.equal(decided, "drop"), pa.scalar(bool(drop)))
    is_unwanted = _and(
        pc.is_in(table["tag"], value_set=pa.array(drop, pa.string())), pc.invert(_or(by_people, is_mended))
    )
    is_unsayable = _and(is_mended, pa.scalar(not carries_captions))
    nothing = pa.scalar(None, pa.string())
    why = pc.if_else(is_unwanted, pc.binary_join_element_wise("tag", table["tag"], ": "), nothing)
    why = pc.if_else(is_unsayable, pa.scalar(CHANGED), why)
    why = pc.if_else(pc.invert(is_scored), pa.scalar(NOT_SCORED), why)
    why = pc.if_else(is_out, pa.scalar(DROPPED_BY_PEOPLE), why)
    why = pc.if_else(pc.invert(is_usable), pc.binary_join_element_wise("status", table["status"], ": "), why)
    detail = pc.if_else(
        _and(is_out, is_usable),
        pc.binary_join_element_wise("by", new["decided_by"], " "),
        table["status_detail"],
    )
    is_kept = pc.is_null(why)
    facts = table.append_column("why", why).append_column("detail", detail)
    dropped = facts.filter(pc.invert(is_kept)).select(DROPPED.names).cast(DROPPED)

    is_changed = _and(is_kept, is_mended)
    columns = {
        "row": table["row"],
        "image": table["image"],
        "old_caption": table["caption"],
        "new_caption": new["caption"],
        "probability": new["probability"],
        "pair_id": table["pair_id"],
        "from_row": new["from_row"],
        "decided_by": new["decided_by"],
    }
    changes = pa.table(columns, schema=CHANGES).filter(is_changed)

    names = [name for name in _PAIRS if name not in {"status", "status_detail", "known_noise"}]
    kept = table.select(["row", *names])
    kept = kept.set_column(
        kept.column_names.index("caption"), "caption", pc.coalesce(new["caption"], table["caption"])
    )
    tag = pc.if_else(by_people, pc.if_else(pc.equal(decided, "drop"), "noisy", "clean"), table["tag"])
    kept = kept.append_column("tag", tag).append_column("noise_probability", table["noise_probability"])
    if reweight:
        kept = kept.append_column("weight", _weight(table, new, decided))
    if rematch or changes.num_rows:
        original = pc.if_else(is_mended, table["caption"], nothing)
        kept = kept.append_column("original_caption", original)
    if table["known_noise"].null_count < table.num_rows:
        # The truth about a caption says nothing about the one that took its place.
        known_noise = pc.if_else(is_mended, pa.scalar(None, pa.bool_()), table["known_noise"])
        kept = kept.append_column("known_noise", known_noise)
    for name in extras:
        kept = kept.append_column(name, _ordinary(table[name]))
    num_decided = pc.sum(by_people).as_py() or 0
    return Plan(kept.filter(is_kept), dropped, changes, with_splits, notes, num_decided)


def _decided(table: pa.Table, decisions: dict[str, Decision]) -> tuple[dict[str, Any], pa.ChunkedArray]:
    """What people replace, row by row, and the word that stands for each row; null where nobody decided."""
    num = table.num_rows
    if not decisions:
        nothing = pa.chunked_array([pa.nulls(num, pa.string())])
        new = {"caption": nothing, "decided_by": nothing}
        words = nothing
    else:
        ids = pa.array(list(decisions), pa.string())
        at = pc.index_in(table["pair_id"], value_set=ids)

        def spread(values: list[str | None]) -> pa.ChunkedArray:
            return pa.chunked_array([pa.array(values, pa.string())]).take(at)

        standing = list(decisions.values())
        new = {
            "caption": spread([one.caption for one in standing]),
            "decided_by": spread([one.reviewer or "a reviewer" for one in standing]),
        }
        words = spread([one.decision for one in standing])
    new["probability"] = pa.chunked_array([pa.nulls(num, pa.float32())])
    new["from_row"] = pa.chunked_array([pa.nulls(num, pa.int64())])
    return new, words


def _rematched(table: pa.Table, new: dict[str, Any], decided: pa.ChunkedArray) -> dict[str, Any]:
    """The replacements with those of the model, on rows that nobody decided about."""
    source = table["rematch_row"]
    at = pc.index_in(source, value_set=table["row"].combine_chunks())
    caption = table["caption"].take(at)
    is_other = _and(
        pc.not_equal(caption, table["caption"]), pc.not_equal(pc.utf8_trim_whitespace(caption), "")
    )
    is_free = _and(pc.is_null(decided), pc.equal(table["status"], "ok"))
    is_better = _and(_and(is_free, is_other), pc.is_finite(table["rematch_probability"]))
    return {
        "caption": pc.if_else(is_better, caption, new["caption"]),
        "probability": pc.if_else(is_better, table["rematch_probability"], new["probability"]),
        "from_row": pc.if_else(is_better, source, new["from_row"]),
        "decided_by": pc.if_else(is_better, pa.scalar("model"), new["decided_by"]),
    }


def _weight(table: pa.Table, new: dict[str, Any], decided: pa.ChunkedArray) -> pa.ChunkedArray:
    probability = pc.coalesce(new["probability"], table["noise_probability"])
    weight = pc.subtract(1.0, pc.min_element_wise(pc.max_element_wise(probability, 0), 1))
    by_people = pc.if_else(pc.equal(decided, "drop"), 0.0, 1.0)
    return pc.if_else(pc.is_valid(decided), by_people, weight).cast(pa.float32())


def _ordinary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of the input as a type that every format can hold; lists and records as JSON."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_boolean(kind):
        return column
    if pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return column.cast(pa.string())
    if pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind):
        return column.cast(pa.float64())
    values = (None if one is None else json.dumps(one, default=str) for one in column.to_pylist())
    return pa.chunked_array([pa.array(values, pa.string())])


def _and(one: Any, other: Any) -> Any:
    return pc.fill_null(pc.and_kleene(one, other), False)


def _or(one: Any, other: Any) -> Any:
    return pc.fill_null(pc.or_kleene(one, other), False)
