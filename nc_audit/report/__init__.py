"""Stage 6, report: the pairs of a run, worst first, as values and as JSON, CSV and Markdown text.

`report_rows` joins the tables, leaves one row per distinct pair and sorts; `summary` counts. The writers take these
values and return text; nothing here prints, and nothing here changes the run.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.errors import DatasetError, RunError, nearest
from nc_audit.report.joined import columns_of, joined
from nc_audit.report.text import csv_cell, json_text, markdown_cell, plain
from nc_audit.run import Run
from nc_audit.schema import FINDING_KINDS, STATUSES, TAGS_KNOWN

__all__ = [
    "ReportRow",
    "check_tags",
    "plain",
    "report_rows",
    "sort_columns",
    "summary",
    "to_csv",
    "to_json",
    "to_markdown",
]

# Columns where the smaller value is the worse one; all others put the larger first.
_SMALLER_IS_WORSE = {"similarity", "weight", "clean_posterior", "mi_variation", "row"}

_PAIRS = ["pair_id", "image", "caption", "split", "image_uri", "duplicate_of", "known_noise"]
_TAGS = ["tag", "reasons", "decided_by"]
_FIRST_SCORES = [
    "noise_probability",
    "noise_score",
    "best_caption",
    "best_caption_margin",
    "best_image",
    "best_image_margin",
]


@dataclass(frozen=True)
class ReportRow:
    """One distinct pair of a run. Numbers that are missing or not finite are None.

    Attributes:
        row: 0-based position of the first copy in the input.
        copies: input rows that hold this very pair, itself included; 1..
        image: path, member or URL as the dataset gives it; `image_uri` is where the bytes are.
        noise_probability: 0..1, higher = more likely noisy.
        noise_score: ranks pairs, higher = more likely noisy.
        reasons: what a person can check, strongest first.
        best_caption_margin: cosine of the better caption minus the own caption's, -2..2.
        best_image_margin: the same for the better image.
        scores: the other columns of scores.parquet by name, in their order there.
    """

    row: int
    pair_id: str
    image: str | None
    caption: str | None
    split: str | None
    tag: str | None
    noise_probability: float | None
    noise_score: float | None
    reasons: list[str]
    best_caption: str | None
    best_caption_margin: float | None
    best_image: str | None
    best_image_margin: float | None
    copies: int
    decided_by: str | None
    known_noise: bool | None
    image_uri: str | None
    scores: dict[str, Any]


def check_tags(tags: Sequence[str], option: str) -> list[str]:
    """The tags, each once, in the order given.

    Args:
        tags: words to check against clean, ambiguous and noisy.
        option: what the caller calls them, for the message.

    Raises:
        DatasetError: one of them is no tag.
    """
    for tag in tags:
        if tag not in TAGS_KNOWN:
            raise DatasetError(f"{option}: there is no tag {plain(tag)!r}", nearest(tag, TAGS_KNOWN))
    return list(dict.fromkeys(tags))


def sort_columns(run: Run) -> list[str]:
    """The columns a report can be sorted by: those of the scores and of the tags, lists left out."""
    return list(
        dict.fromkeys([*columns_of(run, "scores"), *(c for c in columns_of(run, "tags") if c != "reasons")])
    )


def report_rows(
    run: Run,
    *,
    top: int | None = None,
    tags: Sequence[str] | None = None,
    findings: Sequence[str] | None = None,
    sort: str = "noise_probability",
) -> list[ReportRow]:
    """The scored pairs of a run, worst first, equal pairs once.

    Args:
        run: a run that is scored and tagged.
        top: how many to return, 1..; None for all.
        tags: only pairs with one of these tags; None for all.
        findings: only pairs with a finding of one of these kinds, whose words then come first among the reasons.
        sort: column of the scores or the tags. Larger values come first, except where smaller is worse (similarity,
            weight, clean_posterior, mi_variation, row); tags go from noisy to clean, words alphabetically. Equal
            values are ordered by noise_probability, then noise_score, both falling, then row.

    Returns:
        At most `top` rows; pairs without a value in `sort` come last, pairs without any score are left out.

    Raises:
        RunError: a table is missing or stale, or there is no such column.
        DatasetError: a tag or a kind of finding is unknown, or `top` is below 1.
    """
    if top is not None and top < 1:
        raise DatasetError(f"top must be at least 1, got {top}", "leave it out to see every pair")
    wanted_tags = None if tags is None else check_tags(tags, "tag")
    known = sort_columns(run)
    if sort not in known:
        raise RunError(f"{run.path} has no column {plain(sort)!r} to sort by", nearest(sort, known))

    in_scores = columns_of(run, "scores")
    more = [column for column in in_scores if column not in {"row", *_PAIRS, *_TAGS, *_FIRST_SCORES}]
    sort_in_tags = [sort] if sort in {"tag", "decided_by"} or sort not in in_scores else []
    # What decides about the order first, of all rows; the rest, of those to be shown.
    sort_in_scores = [] if sort_in_tags or sort == "row" else [sort]
    table = joined(
        run,
        pairs=["duplicate_of"],
        scores=list(dict.fromkeys(["noise_probability", "noise_score", *sort_in_scores])),
        tags=list(dict.fromkeys(["tag", *sort_in_tags])),
    )
    # Only the first copy of a pair speaks for it; the others are counted.
    first = pc.coalesce(table["duplicate_of"], table["row"]).to_numpy()
    distinct, copies = np.unique(first, return_counts=True)
    scored = pc.or_(pc.is_valid(table["noise_probability"]), pc.is_valid(table["noise_score"]))
    shown = pc.and_(scored, pc.is_null(table["duplicate_of"]))
    if wanted_tags is not None:
        shown = pc.and_(shown, pc.is_in(table["tag"], value_set=pa.array(wanted_tags, pa.string())))
    told = None if findings is None else _told(run, findings, first)
    if told is not None:
        shown = pc.and_(shown, pc.is_in(table["row"], value_set=pa.array(list(told), pa.int64())))
    table = table.filter(shown)
    rows = table["row"].take(_worst_first(table, sort)[:top])
    table = joined(run, pairs=_PAIRS, scores=[*_FIRST_SCORES, *more], tags=_TAGS, rows=rows)
    return [
        replace(row, reasons=list(dict.fromkeys([*told[row.row], *row.reasons]))) if told else row
        for row in _rows(table, copies[np.searchsorted(distinct, rows.to_numpy())], more)
    ]


def _told(run: Run, kinds: Sequence[str], first_N: np.ndarray) -> dict[int, list[str]]:
    """What findings of some kinds say, by the row of the first copy of each pair.

    Args:
        run: the run.
        kinds: of findings.
        first_N: of each row the first that holds the same pair, [N].
    """
    for kind in kinds:
        if kind not in FINDING_KINDS:
            raise DatasetError(
                f"finding: there is no kind {plain(kind)!r}", nearest(kind, list(FINDING_KINDS))
            )
    table = run.table("findings", ["row", "kind", "detail"])
    table = table.filter(pc.is_in(table["kind"], value_set=pa.array(list(kinds), pa.string())))
    told: dict[int, list[str]] = {}
    for row, detail in zip(table["row"].to_pylist(), table["detail"].to_pylist(), strict=True):
        told.setdefault(int(first_N[row]), []).append(detail)
    return told


def _worst_first(table: pa.Table, sort: str) -> pa.Array:
    key = table[sort]
    if sort == "tag":
        key = pc.index_in(key, value_set=pa.array(TAGS_KNOWN[::-1]))
        order = "ascending"
    elif pa.types.is_string(key.type) or sort in _SMALLER_IS_WORSE:
        order = "ascending"
    else:
        order = "descending"
    keys = pa.table(
        [key, *(table[c] for c in ("noise_probability", "noise_score", "row"))], names=list("spcr")
    )
    sort_keys = [("s", order), ("p", "descending"), ("c", "descending"), ("r", "ascending")]
    return pc.sort_indices(keys, sort_keys=sort_keys)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Python values; float32 as the shortest decimal that means the same, not finite as None."""
    if not pa.types.is_floating(column.type):
        return column.to_pylist()
    finite = pc.if_else(pc.is_finite(column), column, None)
    # Through text: 0.2 stays 0.2, which a plain cast would show as 0.20000000298.
    return finite.cast(pa.string()).cast(pa.float64()).to_pylist()


def _rows(table: pa.Table, copies: np.ndarray, more: Sequence[str]) -> list[ReportRow]:
    columns = {name: _values(table[name]) for name in table.column_names}
    scores = [
        dict(zip(more, values, strict=True)) for values in zip(*(columns[name] for name in more), strict=True)
    ]
    return [
        ReportRow(
            row=row,
            pair_id=columns["pair_id"][i],
            image=columns["image"][i],
            caption=columns["caption"][i],
            split=columns["split"][i],
            tag=columns["tag"][i],
            noise_probability=columns["noise_probability"][i],
            noise_score=columns["noise_score"][i],
            reasons=columns["reasons"][i] or [],
            best_caption=columns["best_caption"][i],
            best_caption_margin=columns["best_caption_margin"][i],
            best_image=columns["best_image"][i],
            best_image_margin=columns["best_image_margin"][i],
            copies=int(copies[i]),
            decided_by=columns["decided_by"][i],
            known_noise=columns["known_noise"][i],
            image_uri=columns["image_uri"][i],
            scores=scores[i] if more else {},
        )
        for i, row in enumerate(columns["row"])
    ]


def summary(run: Run) -> dict[str, Any]:
    """What a report says before its rows.

    Returns:
        `run` (its folder as given), `dataset` (as it was named), `rows` (input rows), `pairs` (distinct scored pairs),
        `status` and `tags` (input rows by each, in a fixed order, those that occur), `noise_rate` (estimate, low, high
        and level as the run states them, or None) and `findings` (a list, perhaps empty).

    Raises:
        RunError: a table is missing or stale.
    """
    table = joined(run, pairs=["status", "duplicate_of"], tags=["tag"])
    stated = run.manifest.get("summary") or {}
    dataset = run.manifest.get("dataset") or {}
    tagged = pc.and_(pc.is_valid(table["tag"]), pc.is_null(table["duplicate_of"]))
    return {
        "run": str(run.path),
        "dataset": dataset.get("given") or dataset.get("path"),
        "rows": table.num_rows,
        "pairs": pc.sum(tagged).as_py() or 0,
        "status": count_values(table["status"], list(STATUSES)),
        "tags": count_values(table["tag"], TAGS_KNOWN),
        "noise_rate": stated.get("noise_rate"),
        "findings": list(stated.get("findings") or []),
    }


def count_values(column: pa.ChunkedArray, first: Sequence[str]) -> dict[str, int]:
    """How often each value occurs, nulls left out: the values of `first` in that order, then others by name."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(column.drop_null()).to_pylist()}
    return {value: counts[value] for value in [*first, *sorted(set(counts) - set(first))] if value in counts}


def _flat(row: ReportRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in ReportRow.__dataclass_fields__ if name != "scores"}
    # A score column of the same name as one of ours would hide it.
    return values | {name: value for name, value in row.scores.items() if name not in values}


def _finite(value: Any) -> Any:
    """The value without NaN and infinities, at any depth: null in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def to_json(rows: Sequence[ReportRow], summary: Mapping[str, Any]) -> str:
    """One JSON document: `run`, `summary` (the rest of it) and `pairs`, one object per row and line.

    Lossless, with null where there is no value; unseen characters are JSON escapes, so that printing it is safe.
    """
    facts = {key: value for key, value in summary.items() if key != "run"}
    head = json_text(_finite({"run": summary.get("run"), "summary": facts})).removesuffix("\n}")
    lines = ",".join("\n    " + json_text(_finite(_flat(row)), indent=None) for row in rows)
    return f'{head},\n  "pairs": [{lines}\n  ]\n}}\n'


def to_csv(rows: Sequence[ReportRow]) -> str:
    """A header and one line per row; empty where there is no value; reasons joined by "; ".

    Texts that a spreadsheet would take for a formula (they begin with =, +, -, @, a tab or a line break) get a leading
    apostrophe, and control characters are shown as escapes: see `text.csv_cell`. For lossless values take JSON.
    """
    lines = [_flat(row) for row in rows]
    names = [name for name in ReportRow.__dataclass_fields__ if name != "scores"]
    names += [name for line in lines[:1] for name in line if name not in names]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(csv_cell(name) for name in names)
    writer.writerows([_csv_value(line[name]) for name in names] for line in lines)
    return out.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, list):
        value = "; ".join(str(entry) for entry in value)
    if isinstance(value, bool):
        return str(value).lower()
    return csv_cell(value) if isinstance(value, str) else value


_MARKDOWN_COLUMNS = [
    "row",
    "image",
    "caption",
    "noise probability",
    "tag",
    "reasons",
    "better caption",
    "copies",
]


def to_markdown(rows: Sequence[ReportRow], summary: Mapping[str, Any]) -> str:
    """The summary as a short list and the rows as a table; every text is escaped, see `text.markdown_cell`."""
    lines = [f"# Audit of {markdown_cell(str(summary.get('dataset') or summary.get('run')))}", ""]
    lines += [f"- {line}" for line in _summary_lines(summary)]
    lines += ["", f"## Pairs listed: {len(rows):,}", ""]
    lines += [_markdown_line(_MARKDOWN_COLUMNS), _markdown_line(["---"] * len(_MARKDOWN_COLUMNS))]
    for row in rows:
        probability = "" if row.noise_probability is None else f"{row.noise_probability:.3f}"
        texts = [row.tag, "; ".join(row.reasons), row.best_caption]
        lines.append(
            _markdown_line(
                [
                    str(row.row),
                    *(markdown_cell(text or "") for text in (row.image, row.caption)),
                    probability,
                    *(markdown_cell(text or "") for text in texts),
                    str(row.copies),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _summary_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [f"{summary['rows']:,} rows, {summary['pairs']:,} distinct scored pairs"]
    for name in ("status", "tags"):
        counts = ", ".join(f"{markdown_cell(key)} {count:,}" for key, count in summary[name].items())
        lines.append(f"{name}: {counts or 'none'}")
    rate = noise_rate_text(summary["noise_rate"])
    if rate:
        lines.append(f"estimated noise rate: {rate}")
    return lines + [markdown_cell(str(finding)) for finding in summary["findings"]]


def noise_rate_text(rate: Mapping[str, Any] | None) -> str:
    """The estimated noise rate as `20.0 % (90 % interval 18.0 % to 22.0 %)`; empty where it is unknown.

    Example:
        >>> noise_rate_text({"estimate": 0.2, "low": 0.18, "high": 0.22, "level": 0.9})
        '20.0 % (90 % interval 18.0 % to 22.0 %)'
    """
    if not rate or rate.get("estimate") is None:
        return ""
    text = f"{rate['estimate']:.1%}"
    if rate.get("low") is not None and rate.get("high") is not None:
        level = f"{rate['level']:.0%} interval" if rate.get("level") is not None else "interval"
        text += f" ({level} {rate['low']:.1%} to {rate['high']:.1%})"
    return re.sub(r"(?<=\d)%", " %", text)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
