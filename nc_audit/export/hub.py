"""A dataset of the `datasets` library on disk: what its `save_to_disk` writes and its `load_from_disk` opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from nc_audit.export.parquet import ROW_GROUP_BYTES, SHARD_BYTES, export_schema, row_groups
from nc_audit.export.plan import Written
from nc_audit.export.rows import BLOCK_ROWS, Progress, ReadImage, split_series
from nc_audit.run import digest_of


def write_hub(
    kept: pa.Table,
    folder: Path,
    read: ReadImage,
    *,
    with_splits: bool,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = ROW_GROUP_BYTES,
) -> Written:
    """Write a Dataset, or with splits a DatasetDict, with the columns of the Parquet export.

    The library writes the description of an empty dataset and every shard. Only the list of shards is ours:
    `save_to_disk` itself would need the whole dataset in a file first.

    Args:
        kept: rows of a plan.
        folder: an empty folder.
        read: the bytes of an image.
        with_splits: a DatasetDict with one Dataset per split.
        progress: called with the rows done and their number.
        shard_bytes: a shard takes no further block once it is larger.
        block_bytes: a block takes no further row beyond this size of its images.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    schema = export_schema(kept, with_splits=with_splits)
    features = datasets.Features.from_arrow_schema(schema)
    written = Written(schema.names)
    done = 0
    for split, name, table in split_series(kept, with_splits=with_splits):
        place = folder / name if with_splits else folder
        parts: list[Path] = []
        writer: ArrowWriter | None = None
        num_rows, size = 0, 0
        try:
            for start in range(0, table.num_rows, BLOCK_ROWS):
                block = table.slice(start, BLOCK_ROWS)
                for group in row_groups(block, read, schema, block_bytes, written.unreadable):
                    if writer is None:
                        place.mkdir(exist_ok=True)
                        parts.append(place / f"part-{len(parts):05d}")
                        writer, size = ArrowWriter(path=str(parts[-1]), features=features), 0
                    writer.write_table(group)
                    num_rows, size = num_rows + group.num_rows, size + group.nbytes
                    if size > shard_bytes:
                        writer.finalize()
                        writer = None
                done += block.num_rows
                if progress:
                    progress(done, kept.num_rows)
        finally:
            if writer is not None:
                writer.finalize()
        if num_rows:
            empty = datasets.Dataset.from_dict(
                {column: [] for column in schema.names}, features, split=datasets.NamedSplit(name)
            )
            _describe(empty, place)
            _list_shards(place, parts, digest_of([name, table["pair_id"].to_pylist()]))
            written.num_rows[name] = num_rows
            written.data |= {
                path.relative_to(folder).as_posix(): split for path in sorted(place.glob("data-*.arrow"))
            }
    if with_splits:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(written.num_rows)}))
    return written


def _describe(empty: Any, place: Path) -> None:
    """`dataset_info.json` and `state.json`, as the library writes them for a dataset without rows."""
    import datasets

    was_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        empty.save_to_disk(place)
    finally:
        if not was_quiet:
            datasets.enable_progress_bars()
    for path in place.glob("*.arrow"):
        path.unlink()


def _list_shards(place: Path, parts: list[Path], fingerprint: str) -> None:
    """Give the shards their names and list them; the library's own fingerprint would depend on the time."""
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(place / name)
    state = json.loads((place / "state.json").read_text(encoding="utf-8"))
    state |= {"_fingerprint": fingerprint, "_data_files": [{"filename": name} for name in names]}
    (place / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
