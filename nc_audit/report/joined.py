"""The tables of a run side by side, row for row."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nc_audit.errors import RunError
from nc_audit.run import Run

_AT_ONCE = 1 << 16


def columns_of(run: Run, name: str) -> list[str]:
    """The column names of a table of the run, without reading its rows.

    Raises:
        RunError: the table is not there or cannot be read.
    """
    path = run.path / f"{name}.parquet"
    if not path.is_file():
        run.table(name, ["row"])  # raises, with the way out
    try:
        return pq.read_schema(path).names
    except pa.ArrowInvalid as problem:
        raise RunError(
            f"{path} is not readable: {problem}", "score the dataset again with --force"
        ) from problem


def joined(
    run: Run,
    *,
    pairs: Sequence[str],
    scores: Sequence[str] = (),
    tags: Sequence[str] = (),
    rows: pa.ChunkedArray | None = None,
) -> pa.Table:
    """One table of the named columns, in the row order of `pairs`, joined by `row`.

    Args:
        run: the run.
        pairs: columns of the pairs; `row` comes first whether it is named or not.
        scores: columns of the scores; none named, the table is not read.
        tags: columns of the tags, likewise.
        rows: only these, in this order; None for all. The rest of the tables then never is in memory.

    Returns:
        One row per input pair, or per row asked for.

    Raises:
        RunError: a table or a column is missing, or the tables do not hold the same rows.
    """
    table = _read(run, "pairs", pairs, rows)
    for name, columns in (("scores", scores), ("tags", tags)):
        if not columns:
            continue
        other = _beside(run, table["row"], name, _read(run, name, columns, rows))
        for column in columns:
            table = table.append_column(other.schema.field(column), other[column])
    return table


def _read(run: Run, name: str, columns: Sequence[str], rows: pa.ChunkedArray | None) -> pa.Table:
    wanted = ["row", *(column for column in columns if column != "row")]
    missing = set(wanted) - set(columns_of(run, name))
    if missing:
        raise RunError(
            f"{run.path}: {name}.parquet has no column {', '.join(sorted(missing))}",
            "score the dataset again with --force",
        )
    if rows is None:
        return run.table(name, wanted)
    file = pq.ParquetFile(run.path / f"{name}.parquet")
    parts = [
        part.filter(pc.is_in(part["row"], value_set=rows.combine_chunks()))
        for part in map(
            pa.Table.from_batches, ([batch] for batch in file.iter_batches(_AT_ONCE, columns=wanted))
        )
    ]
    found = pa.concat_tables(parts) if parts else run.table(name, wanted)
    places = pc.index_in(rows, value_set=found["row"].combine_chunks())
    if places.null_count:
        raise RunError(
            f"{run.path}: {name}.parquet is stale: {places.null_count:,} of {len(rows):,} rows are not in it",
            "score the dataset again with --force",
        )
    return found.take(places).select(wanted)


def _beside(run: Run, row: pa.ChunkedArray, name: str, table: pa.Table) -> pa.Table:
    if table["row"].equals(row):
        return table
    places = pc.index_in(row, value_set=table["row"].combine_chunks())
    if table.num_rows != len(row) or places.null_count:
        raise RunError(
            f"{run.path}: {name}.parquet is stale: {table.num_rows:,} rows, of which {len(row) - places.null_count:,} "
            f"are among the {len(row):,} of pairs.parquet",
            "score the dataset again with --force",
        )
    return table.take(places)
