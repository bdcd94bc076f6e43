"""Decisions out of a run and into it: csv and json lines, and files that Label Studio and Argilla import.

An import is checked as a whole before the first line is written: all of it is taken, or nothing.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.decisions import DECISIONS
from nc_audit.errors import AuditError, DatasetError, nearest
from nc_audit.report.joined import joined
from nc_audit.report.text import csv_cell, plain
from nc_audit.review.journal import Entry, Journal
from nc_audit.review.pairs import Queue
from nc_audit.review.session import MAX_CAPTION, check_reviewer, now
from nc_audit.run import Run, replacing, writing

FORMATS = ("csv", "jsonl", "labelstudio", "argilla")

_COLUMNS = (
    "row",
    "pair_id",
    "image",
    "decision",
    "caption",
    "original_caption",
    "reviewer",
    "time",
    "stands",
)
_PAGE = 1000
_SHOWN = 5


def export_decisions(
    run: Run, path: Path, *, form: str | None = None, tags: Sequence[str] | None = None
) -> int:
    """Write decisions, or pairs for another tool to decide, to a file.

    csv and jsonl hold the standing decision of every reviewer, in the order they were taken; `stands` marks the one
    that counts. labelstudio (a JSON list of tasks) and argilla (json lines for `dataset.records.log`) hold every ok
    pair of the tags, worst first, with what the model suggests and, in Label Studio, what was decided. Both forms were
    checked with their makers' own packages: label-studio-sdk 2 (tasks, predictions, annotations against a labelling
    interface) and argilla 2.8 (records, their fields, metadata and suggestions).

    Args:
        run: a run that is scored and tagged.
        path: the file, a new one.
        form: one of FORMATS; by the ending of the file when not given.
        tags: labelstudio and argilla: only pairs with these tags.

    Returns:
        How many lines, tasks or records.

    Raises:
        DatasetError: the format is unknown or does not fit the ending, or the file exists.
    """
    form = form or {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(path.suffix.lower())
    if form is None:
        raise DatasetError(
            f"{path.name}: no format goes with this ending",
            f"name it *.csv or *.jsonl, or give --format {FORMATS[2]}",
        )
    if form not in FORMATS:
        raise DatasetError(f"unknown format {plain(form)!r}", nearest(form, FORMATS))
    if path.is_dir():
        raise DatasetError(f"{path} is a folder", "name a file")
    if path.exists():
        raise DatasetError(f"{path} exists", "name another file; nothing is overwritten")
    journal = Journal(run.path)
    if form in ("labelstudio", "argilla"):
        records = list(_records(run, journal, form, tags))
        lines = [json.dumps(one, ensure_ascii=False) for one in records]
        text = "[\n" + ",\n".join(lines) + "\n]\n" if form == "labelstudio" else _joined(lines)
    else:
        records = _decision_rows(run, journal)
        text = _csv(records) if form == "csv" else _joined([json.dumps(one) for one in records])
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return len(records)


def import_decisions(run: Run, path: Path, *, reviewer: str) -> dict[str, Any]:
    """Add the decisions of a csv or jsonl file, or of Label Studio's JSON export, to a run.

    Each names its pair by `pair_id` or by `row` (0-based position in the input) and gives `decision` (keep, drop, fix
    or rematch), `caption` (the new one; for fix and rematch only), and perhaps `reviewer` and `time` (ISO 8601).
    Of Label Studio's tasks, every annotation that was not cancelled and holds a decision counts, see `_annotated`.

    Args:
        run: the run.
        path: the file, UTF-8; Label Studio's as `*.json`.
        reviewer: who decided where a line does not say.

    Returns:
        `imported` and, of those, how many by `decision`; `unchanged` decisions stood already and were not repeated.

    Raises:
        DatasetError: anything in the file is wrong: nothing was imported then.
    """
    reviewer = check_reviewer(reviewer)
    table = joined(run, pairs=["pair_id", "status", "caption"])
    rows = dict(zip(*(table[name].to_pylist() for name in ("row", "pair_id")), strict=True))
    ok = table.filter(pc.equal(table["status"], "ok"))
    known = dict(zip(*(ok[name].to_pylist() for name in ("pair_id", "caption")), strict=True))
    entries: list[Entry] = []
    unknown: list[str] = []
    problems: list[str] = []
    unit = "task" if path.suffix.lower() == ".json" else "line"
    for number, line in _read(path):
        try:
            entries.append(_entry(line, rows, known, reviewer))
        except KeyError as problem:
            unknown.append(str(problem.args[0]))
        except AuditError as problem:
            problems.append(f"{unit} {number:,}: {problem.message}")
    if unknown:
        named = ", ".join(plain(one)[:80] for one in unknown[:_SHOWN]) + (
            ", ..." if len(unknown) > _SHOWN else ""
        )
        verb = "is" if len(unknown) == 1 else "are"
        problems.append(f"{len(unknown):,} {verb} no ok pair of {run.path}: {named}")
    if problems:
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise DatasetError(
            f"{path.name}: " + "; ".join(problems[:_SHOWN]) + more, "nothing was imported; mend the file"
        )
    journal = Journal(run.path)
    tag_of = dict(zip(known, Queue(run).tag_of(list(known)), strict=True))
    new = [
        entry | {"tag": tag_of[entry["pair_id"]], "imported": True}
        for entry in entries
        if not _stands(journal, entry)
    ]
    if new:
        with writing(journal.path):
            journal.append(new)
    return {
        "imported": len(new),
        "unchanged": len(entries) - len(new),
        "by_decision": dict(Counter(entry["decision"] for entry in new)),
    }


def _stands(journal: Journal, entry: Entry) -> bool:
    own = journal.by_reviewer(entry["pair_id"]).get(entry["reviewer"])
    return own is not None and (own["decision"], own.get("caption")) == (
        entry["decision"],
        entry.get("caption"),
    )


def _entry(line: dict[str, Any], rows: dict[int, str], known: dict[str, str], reviewer: str) -> Entry:
    """A line as an entry. KeyError names a pair that is not there."""
    pair_id = _text(line, "pair_id")
    row = _text(line, "row")
    if not pair_id and not row:
        raise DatasetError("neither pair_id nor row")
    if row:
        by_row = rows.get(int(row)) if row.isascii() and row.isdigit() else None
        if by_row is None:
            raise KeyError(f"row {row}")
        if pair_id and by_row != pair_id:
            raise DatasetError(f"row {row} is not the pair {pair_id}")
        pair_id = by_row
    if pair_id not in known:
        raise KeyError(f"row {row}" if row else pair_id)
    decision, caption = _text(line, "decision"), _text(line, "caption")
    if decision not in DECISIONS:
        raise DatasetError(f"decision {decision!r} is none of {', '.join(DECISIONS)}")
    entry: Entry = {
        "time": _time(_text(line, "time")),
        "reviewer": check_reviewer(_text(line, "reviewer") or reviewer),
        "pair_id": pair_id,
        "decision": decision,
    }
    if decision in ("fix", "rematch"):
        if not caption:
            raise DatasetError(f"{decision} without a caption")
        if len(caption) > MAX_CAPTION:
            raise DatasetError(f"the caption has {len(caption):,} characters, more than {MAX_CAPTION:,}")
        entry["caption"] = caption
    elif caption and caption != (known[pair_id] or "").strip():
        raise DatasetError(f"{decision} takes no new caption")
    return entry


def _text(line: dict[str, Any], name: str) -> str:
    value = line.get(name)
    if value is None:
        return ""
    if isinstance(value, bool | list | dict | float):
        raise DatasetError(f"{name} is no text")
    text = str(value).strip()
    if text != _encodable(text):
        raise DatasetError(f"{name} holds half a character: {_encodable(text)[:80]}")
    return text


def _encodable(text: str) -> str:
    """The text with lone surrogates, which no file can hold, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _time(text: str) -> str:
    if not text:
        return now()
    try:
        datetime.fromisoformat(text)
    except ValueError as problem:
        raise DatasetError(f"time {text!r} is not ISO 8601") from problem
    return text


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a file, or the annotations of its tasks, with the number of the line or task."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl", ".ndjson", ".json"):
        raise DatasetError(
            f"{path.name}: decisions are read from csv, jsonl and Label Studio's json",
            "name it *.csv, *.jsonl or *.json",
        )
    if not path.is_file():
        raise DatasetError(f"there is no file {path}", "give a csv, jsonl or json file")
    number = 0
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if kind == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""))
            names = reader.fieldnames or []
            if "decision" not in names or not {"pair_id", "row"} & set(names):
                raise DatasetError(
                    f"{path.name}: it has the columns {', '.join(plain(n) for n in names) or '(none)'}",
                    "decision is needed, and pair_id or row; caption, reviewer and time may be there",
                )
            for line in reader:
                number = reader.line_num
                yield number, {name: _uncell(value) for name, value in line.items() if isinstance(value, str)}
            return
        if kind == ".json":
            tasks = json.loads(text)
            if not isinstance(tasks, list):
                raise ValueError("no JSON list of tasks")
            for number, task in enumerate(tasks, 1):
                for line in _annotated(task):
                    yield number, line
            return
        for number, one in enumerate(text.split("\n"), 1):
            if one.strip():
                value = json.loads(one)
                if not isinstance(value, dict):
                    raise ValueError("no JSON object")
                yield number, value
    except (ValueError, RecursionError, csv.Error) as problem:
        if isinstance(problem, DatasetError):
            raise
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        unit = "task" if kind == ".json" else "line"
        raise DatasetError(
            f"{path.name}: {unit} {max(1, number):,} cannot be read: {plain(reason)}",
            "nothing was imported; mend the file",
        ) from problem


def _annotated(task: Any) -> Iterator[dict[str, Any]]:
    """The decisions of a task of Label Studio's JSON export as lines.

    The choice called `decision` decides, the text area called `new_caption` gives the new caption; a re-match without
    one takes the `better_caption` of the task. Who decided is the e-mail address of the annotator, or
    "Label Studio user N" where the export has only the number, or the `reviewer` of a task that was never there.

    Raises:
        ValueError: the task has not this form, or an annotation holds several decisions or captions.
    """
    data = task.get("data") if isinstance(task, dict) else None
    annotations = task.get("annotations", []) if isinstance(task, dict) else None
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise ValueError("no task with data and annotations; export as JSON, not JSON-MIN")
    for annotation in annotations:
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            raise ValueError("an annotation without a result")
        if annotation.get("was_cancelled"):
            continue
        decision = _said(annotation["result"], "decision", "choices")
        if decision is None:
            continue
        caption = _said(annotation["result"], "new_caption", "text")
        if decision == "rematch" and caption is None:
            caption = data.get("better_caption")
        who = annotation.get("completed_by")
        name = data.get("reviewer")
        if who is not None:
            name = who.get("email") if isinstance(who, dict) else f"Label Studio user {who}"
        yield {
            "pair_id": data.get("pair_id"),
            "decision": decision,
            "caption": caption if decision in ("fix", "rematch") else None,
            "reviewer": name,
            "time": annotation.get("updated_at") or annotation.get("created_at"),
        }


def _said(result: list[Any], name: str, kind: str) -> Any:
    """The one value that a control of this name was given, or None."""
    values: list[Any] = []
    for one in result:
        if isinstance(one, dict) and one.get("from_name") == name:
            value = one.get("value")
            given = value.get(kind) if isinstance(value, dict) else None
            values += given if isinstance(given, list) else [given]
    if len(values) > 1:
        raise ValueError(f"{name} has {len(values)} values in one annotation")
    return values[0] if values else None


def _uncell(value: str) -> str:
    """A cell without the apostrophe that keeps spreadsheets from running it."""
    return value[1:] if value.startswith("'") and csv_cell(value[1:]) != plain(value[1:]) else value


def _decision_rows(run: Run, journal: Journal) -> list[dict[str, Any]]:
    """One row for each pair and reviewer, in the order of the decisions."""
    taken = [
        (entry["line"], pair_id, entry, entry is journal.standing(pair_id))
        for pair_id in journal.decided()
        for entry in journal.by_reviewer(pair_id).values()
    ]
    taken.sort(key=lambda one: one[0])
    table = joined(run, pairs=["pair_id", "image", "caption"])
    wanted = pa.array([_encodable(pair_id) for _, pair_id, _, _ in taken], pa.string())
    found = table.filter(pc.is_in(table["pair_id"], value_set=wanted)).to_pylist()
    facts = {one["pair_id"]: one for one in reversed(found)}
    rows = []
    for _, pair_id, entry, stands in taken:
        pair = facts.get(pair_id, {})
        rows.append(
            {
                "row": pair.get("row"),
                "pair_id": pair_id,
                "image": pair.get("image"),
                "decision": entry["decision"],
                "caption": entry.get("caption"),
                "original_caption": pair.get("caption"),
                "reviewer": entry["reviewer"],
                "time": entry["time"],
                "stands": stands,
            }
        )
    return rows


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        cells = [row[name] for name in _COLUMNS]
        writer.writerow(
            [
                str(one).lower() if isinstance(one, bool) else csv_cell(one) if isinstance(one, str) else one
                for one in cells
            ]
        )
    return out.getvalue()


def _joined(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def _records(run: Run, journal: Journal, form: str, tags: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    queue = Queue(run, tags)
    for start in range(0, len(queue), _PAGE):
        for pair in queue.page(start, _PAGE):
            standing = journal.standing(pair.pair_id)
            suggested = {"clean": "keep", "noisy": "drop"}.get(pair.tag or "")
            facts = {
                "image": pair.image,
                "caption": pair.caption,
                "better_caption": pair.best_caption or "",
                "pair_id": pair.pair_id,
                "row": pair.row,
                "tag": pair.tag,
                "noise_probability": pair.probability,
                "reasons": "; ".join(pair.reasons),
            }
            if form == "argilla":
                yield {"id": pair.pair_id} | facts | ({"decision": suggested} if suggested else {})
                continue
            task: dict[str, Any] = {"data": facts}
            if suggested:
                result = [_choice(suggested)]
                noise = pair.probability or 0.0
                score = noise if suggested == "drop" else 1 - noise
                task["predictions"] = [{"model_version": "nc-audit", "score": score, "result": result}]
            if standing:
                result = [_choice(standing["decision"])]
                if standing.get("caption"):
                    result.append(_written(standing["caption"]))
                task["data"]["reviewer"] = standing["reviewer"]
                task["annotations"] = [{"result": result}]
            yield task


def _choice(decision: str) -> dict[str, Any]:
    value = {"choices": [decision]}
    return {"from_name": "decision", "to_name": "image", "type": "choices", "value": value}


def _written(caption: str) -> dict[str, Any]:
    value = {"text": [caption]}
    return {"from_name": "new_caption", "to_name": "image", "type": "textarea", "value": value}
