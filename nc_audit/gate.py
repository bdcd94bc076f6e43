"""Limits on what a run may hold, for continuous integration: each limit, the value, and whether it is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nc_audit.errors import DatasetError, nearest
from nc_audit.run import Run
from nc_audit.schema import FINDING_KINDS

MEASURES = ("noisy", "ambiguous", "unusable", "rate", "duplicates", "leakage")
"""What a limit may be on, besides the kinds of findings: shares of the rows, or of the audited rows for tags."""


@dataclass(frozen=True)
class Limit:
    """The most that is allowed: a count of rows, or a share of them, 0..1."""

    value: float
    is_share: bool

    @classmethod
    def parse(cls, name: str, text: str) -> Limit:
        """`2%` as a share, `12` as a count; the noise rate as a share only, `5%` or `0.05`.

        Raises:
            DatasetError: it is neither.
        """
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", text) and float(text[:-1]) <= 100:
            return cls(float(text[:-1]) / 100, True)
        if name == "rate":
            if re.fullmatch(r"0(\.[0-9]+)?|1(\.0+)?", text):
                return cls(float(text), True)
            raise DatasetError(f"--max-rate {text!r} is not a share", "for example 5% or 0.05")
        if re.fullmatch(r"[0-9]+", text):
            return cls(int(text), False)
        raise DatasetError(
            f"--max-{name.replace('_', '-')} {text!r} is neither a percentage nor a count",
            "for example 2% or 10",
        )

    def __str__(self) -> str:
        return f"{100 * self.value:g} %" if self.is_share else f"{self.value:,.0f}"


@dataclass(frozen=True)
class Check:
    """One limit against one run; `value` is a count of rows, or a share where the limit is; None: cannot be told."""

    name: str
    limit: Limit
    value: float | None

    @property
    def is_kept(self) -> bool:
        """Whether the value is within the limit; what cannot be told is not."""
        return self.value is not None and self.value <= self.limit.value

    def shown(self) -> str:
        """The value in words."""
        if self.value is None:
            return "cannot be told"
        return f"{100 * self.value:.2f} %" if self.limit.is_share else f"{self.value:,.0f}"

    def as_json(self) -> dict[str, Any]:
        """The check as JSON values."""
        return {
            "name": self.name,
            "limit": self.limit.value,
            "value": self.value,
            "unit": "share" if self.limit.is_share else "rows",
            "kept": self.is_kept,
        }


def check_run(run: Run, limits: Mapping[str, str]) -> list[Check]:
    """Each limit against what a run found.

    Args:
        run: a scored run.
        limits: by measure or kind of finding: `2%` of the rows, or a number of rows.

    Returns:
        One check for each limit, in the order given.

    Raises:
        DatasetError: no limit, an unknown one, or a value that is none. RunError: the run is not finished.
    """
    if not limits:
        raise DatasetError("no limit is given", "for example nc-audit gate --max-noisy 2%")
    known = [*MEASURES, *FINDING_KINDS]
    for name in limits:
        if name not in known:
            raise DatasetError(f"unknown limit {name}", nearest(name, known))
    parsed = {name: Limit.parse(name, text) for name, text in limits.items()}
    run.stage("tag")
    summary = run.manifest["summary"]
    counts = _counts(run, summary)
    audited = max(1, summary["status"].get("ok", 0))
    checks = []
    for name, limit in parsed.items():
        if name == "rate":
            rate = summary["noise_rate"]
            checks.append(Check(name, limit, None if rate["evidence"] == "none" else float(rate["estimate"])))
            continue
        value = float(counts.get(name, 0))
        whole = audited if name in ("noisy", "ambiguous") else max(1, summary["rows"])
        checks.append(Check(name, limit, value / whole if limit.is_share else value))
    return checks


def _counts(run: Run, summary: Mapping[str, Any]) -> dict[str, int]:
    """Rows by measure and kind of finding."""
    found = run.table("findings", ["row", "kind"])
    rows: dict[str, set[int]] = {}
    for row, kind in zip(found["row"].to_pylist(), found["kind"].to_pylist(), strict=True):
        rows.setdefault(kind, set()).add(row)
    counts = {one["kind"]: int(one["count"]) for one in summary["findings"]}
    counts["duplicates"] = len(rows.get("duplicate_image", set()) | rows.get("near_duplicate_image", set()))
    counts["noisy"], counts["ambiguous"] = summary["tags"]["noisy"], summary["tags"]["ambiguous"]
    counts["unusable"] = summary["rows"] - summary["status"].get("ok", 0)
    return counts
