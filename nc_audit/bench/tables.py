"""Results of a bench as tables: mean and spread over seeds, the best of each column marked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS: dict[str, tuple[str, int, str]] = {
    "auroc": ("AUROC", 1, ".3f"),
    "ap": ("AP", 1, ".3f"),
    "f1": ("F1 at p > .5", 1, ".3f"),
    "precision_at_rate": ("precision at rate", 1, ".3f"),
    "rate_error": ("rate error", 0, "+.3f"),
    "ece": ("ECE", -1, ".3f"),
    "tagged_noisy": ("tagged noisy", 0, ".3f"),
    "seconds": ("seconds", -1, ".1f"),
}
"""Quantity to heading, which direction is better (1 up, -1 down, 0 nearer zero where it may be negative), format."""

SHOWN = ("auroc", "f1", "rate_error", "ece", "seconds")
"""Quantities that the bench shows as matrices."""

RETRIEVAL = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mr", "rsum")


@dataclass(frozen=True)
class Row:
    """One recipe at one kind and rate: mean and spread of every quantity over `seeds`."""

    recipe: str
    kind: str
    rate: float
    seeds: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]


def summarise(results: Iterable[Mapping[str, Any]], part: str | None = None) -> list[Row]:
    """Mean and sample deviation over seeds of each recipe, kind and rate, in order of first appearance.

    Args:
        results: lines of a bench.
        part: take a nested dictionary of each result (`retrieval`, `downstream`) instead of the result itself.
    """
    groups: defaultdict[tuple[str, str, float], list[Mapping[str, Any]]] = defaultdict(list)
    for one in results:
        values = one if part is None else one.get(part)
        if values is not None:
            groups[one["recipe"], one["kind"], one["rate"]].append(values)
    rows = []
    for (recipe, kind, rate), members in groups.items():
        mean, spread = {}, {}
        for name in members[0]:
            if name in ("seed", "rate"):
                continue
            numbers = [one[name] for one in members if isinstance(one.get(name), (int, float))]
            if numbers:
                mean[name] = sum(numbers) / len(numbers)
                squares = sum((number - mean[name]) ** 2 for number in numbers)
                spread[name] = math.sqrt(squares / (len(numbers) - 1)) if len(numbers) > 1 else 0.0
        rows.append(Row(recipe, kind, rate, len(members), mean, spread))
    return rows


def detection_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the detection table, best values marked with an asterisk."""
    return _table(rows, COLUMNS)


def matrix(rows: Sequence[Row], name: str) -> tuple[list[str], list[list[str]]]:
    """One quantity: a line per recipe, a column per kind and rate, the best of each column marked.

    Args:
        rows: of `summarise`.
        name: a key of `COLUMNS`.
    """
    _, direction, form = COLUMNS[name]
    cells = list(dict.fromkeys((row.kind, row.rate) for row in rows if name in row.mean))
    held = {(row.recipe, row.kind, row.rate): row for row in rows if name in row.mean}
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    best = {
        cell: max(_merit(held[one, *cell].mean[name], direction) for one in recipes if (one, *cell) in held)
        for cell in cells
    }
    lines = []
    for one in recipes:
        line = [one]
        for cell in cells:
            row = held.get((one, *cell))
            if row is None:
                line.append("")
                continue
            is_best = _merit(row.mean[name], direction) == best[cell] and len(recipes) > 1
            line.append(_number(row, name, form) + ("*" if is_best else ""))
        lines.append(line)
    heads = [f"{kind} {rate:.0%}" if rate > 0 else "0%" for kind, rate in cells]
    return [COLUMNS[name][0], *heads], lines


def _number(row: Row, name: str, form: str) -> str:
    text = format(row.mean[name], form)
    return text + (f" ±{format(row.spread[name], form.lstrip('+'))}" if row.seeds > 1 else "")


def retrieval_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the retrieval table, per cent, best values marked with an asterisk."""
    return _table(rows, {name: (name.replace("_r", " R@"), 1, ".1f") for name in RETRIEVAL})


def named_table(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A table of some quantities, higher = better."""
    return _table(rows, {name: (name.replace("_", " "), 1, ".1f") for name in names})


def _table(
    rows: Sequence[Row], columns: Mapping[str, tuple[str, int, str]]
) -> tuple[list[str], list[list[str]]]:
    heads = ["kind", "rate", "recipe", *(heading for heading, _, _ in columns.values())]
    best: dict[tuple[str, float, str], float] = {}
    for row in rows:
        for name, (_, direction, _) in columns.items():
            if name in row.mean:
                at = (row.kind, row.rate, name)
                best[at] = max(best.get(at, -math.inf), _merit(row.mean[name], direction))
    cells = []
    for row in rows:
        line = [row.kind, f"{row.rate:.0%}", row.recipe]
        alone = sum(other.kind == row.kind and other.rate == row.rate for other in rows) == 1
        for name, (_, direction, form) in columns.items():
            if name not in row.mean:
                line.append("")
                continue
            is_best = _merit(row.mean[name], direction) == best[row.kind, row.rate, name]
            line.append(_number(row, name, form) + ("*" if is_best and not alone else ""))
        cells.append(line)
    return heads, cells


def _merit(value: float, direction: int) -> float:
    return -abs(value) if direction == 0 else direction * value


def markdown(heads: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table as Markdown, the best in bold."""

    def bold(cell: str) -> str:
        return f"**{cell[:-1]}**" if cell.endswith("*") else cell

    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(map(bold, row)) + " |" for row in cells)])
