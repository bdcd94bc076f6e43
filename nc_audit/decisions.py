"""What people decided about pairs: the append-only `decisions.jsonl` of a run, folded into what stands.

A line is an object: time, reviewer, pair_id, decision and, for fix and rematch, the new caption; further keys may
follow. Lines are only ever added.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nc_audit.errors import RunError

FILE = "decisions.jsonl"
DECISIONS = ("keep", "drop", "fix", "rematch")
UNDO = "undo"


@dataclass(frozen=True)
class Decision:
    """What stands for a pair.

    Attributes:
        pair_id: the pair; its copies share it.
        decision: keep, drop, fix or rematch.
        caption: the new caption of a fix or a re-match; None otherwise.
        reviewer: who decided.
        time: when, as the line says it.
    """

    pair_id: str
    decision: str
    caption: str | None
    reviewer: str
    time: str


def effective_decisions(lines: Iterable[str]) -> dict[str, Decision]:
    """The decision that stands for each pair: the last one that was not undone.

    An undo takes back the same reviewer's last decision on the pair, after which the one before it stands again. A
    line that is no JSON, as a process killed while writing leaves it, is ignored with a warning.

    Args:
        lines: of the file, in order.

    Returns:
        Decisions by pair_id, in the order of their first line; pairs whose decisions were all undone are left out.

    Raises:
        RunError: a line is JSON but no decision.
    """
    standing: dict[str, list[Decision]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            warnings.warn(
                f"{FILE}: line {number:,} is torn and was ignored; every other decision counts", stacklevel=2
            )
            continue
        one = _decision(entry, number)
        decided = standing.setdefault(one.pair_id, [])
        if one.decision != UNDO:
            decided.append(one)
            continue
        own = [at for at, earlier in enumerate(decided) if earlier.reviewer == one.reviewer]
        if own:
            del decided[own[-1]]
    return {pair_id: decided[-1] for pair_id, decided in standing.items() if decided}


def read_decisions(run: Path) -> tuple[dict[str, Decision], list[str]]:
    """The decisions that stand in a run directory, and what there is to say about the file; none where it is absent.

    Raises:
        RunError: a line is JSON but no decision, or the file is no text.
    """
    path = run / FILE
    if not path.is_file():
        return {}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A line ends at a line feed; captions may hold the other breaks that str.splitlines knows.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        decisions = effective_decisions(lines)
    return decisions, [str(one.message) for one in caught]


def _decision(entry: Any, number: int) -> Decision:
    where, hint = f"{FILE}: line {number:,}", "mend the line; nothing was changed"
    if not isinstance(entry, dict):
        raise RunError(f"{where} is no decision", hint)
    pair_id, decision, caption = entry.get("pair_id"), entry.get("decision"), entry.get("caption")
    if not isinstance(pair_id, str) or not isinstance(decision, str):
        raise RunError(f"{where} is no decision: it needs pair_id and decision", hint)
    if decision not in {*DECISIONS, UNDO}:
        raise RunError(f"{where}: there is no decision {decision!r}", f"known: {', '.join(DECISIONS)}, undo")
    takes_caption = decision in {"fix", "rematch"}
    if takes_caption and (not isinstance(caption, str) or not caption.strip()):
        raise RunError(f"{where}: {decision} without a caption", hint)
    return Decision(
        pair_id,
        decision,
        caption if takes_caption else None,
        str(entry.get("reviewer") or ""),
        str(entry.get("time") or ""),
    )
