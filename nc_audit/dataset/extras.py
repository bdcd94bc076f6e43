"""Columns of the input that the audit does not need: kept beside the pairs, so that an export can give them back."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

import pyarrow as pa

from nc_audit.schema import METHOD_COLUMNS, TABLES

MAX_EXTRAS = 100
_RESERVED = {name for schema in TABLES.values() for name in schema.names} | {
    *METHOD_COLUMNS,
    "original_caption",
    "rematch_row",
    "rematch_probability",
}


def extra_names(names: Sequence[str], used: Sequence[str], source: str, notes: list[str]) -> list[str]:
    """The columns to keep beside those that are used; what is beyond MAX_EXTRAS is left out and noted."""
    others = [name for name in dict.fromkeys(names) if name and name not in used]
    if len(others) > MAX_EXTRAS:
        notes.append(
            f"{source} has {len(others):,} further columns; the first {MAX_EXTRAS} are kept for exports"
        )
    return others[:MAX_EXTRAS]


def scalar_columns(schema: pa.Schema) -> list[str]:
    """The columns of a Parquet file that hold one plain value a row: no bytes, lists or records."""
    kinds = [pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean]
    kinds += [pa.types.is_integer, pa.types.is_floating, pa.types.is_temporal]
    return [column.name for column in schema if any(kind(column.type) for kind in kinds)]


def scalars_of(record: object, used: Container[str]) -> dict[str, Any]:
    """The plain values of a json record, without those that are used; what is no record has none."""
    if not isinstance(record, dict):
        return {}
    return {
        name: value
        for name, value in record.items()
        if name and name not in used and isinstance(value, str | int | float | None)
    }


def append_extras(pairs: pa.Table, extras: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    """The pairs with a column for each extra.

    A name that a table of a run uses itself gets the prefix `input_`, and is left out where that is taken as well. A
    column keeps its type where all its values agree; else, and for lists and records, it is JSON text.

    Args:
        pairs: the table, one row per pair.
        extras: values by row and column; rows without any are left out.
    """
    names = list(dict.fromkeys(name for values in extras.values() for name in values))
    for name in names[:MAX_EXTRAS]:
        # Halves of surrogate pairs, which json can spell, fit in no table.
        safe = name.encode("utf-8", "replace").decode("utf-8")
        title = f"input_{safe}" if safe in _RESERVED else safe
        if title in pairs.column_names or (title != safe and title in names):
            continue
        column = _column([extras.get(row, {}).get(name) for row in range(len(pairs))])
        pairs = pairs.append_column(title, column)
    return pairs


def _column(values: list[Any]) -> pa.Array:
    if not any(isinstance(value, list | dict) for value in values):
        try:
            column = pa.array(values)
            return column if not pa.types.is_null(column.type) else column.cast(pa.string())
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            pass
    texts = (value if isinstance(value, str | None) else json.dumps(value, default=str) for value in values)
    safe = (None if text is None else text.encode("utf-8", "replace").decode("utf-8") for text in texts)
    return pa.array(safe, pa.string())
