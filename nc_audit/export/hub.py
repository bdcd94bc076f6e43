"""A dataset of the `datasets` library on disk: what its `save_to_disk` writes and its `load_from_disk` opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa

from nc_audit.export.parquet import ROW_GROUP_BYTES, export_schema, row_groups
from nc_audit.export.plan import Written
from nc_audit.export.rows import BLOCK_ROWS, Progress, ReadImage, split_series
from nc_audit.run import digest_of

_GATHERED = ".gathered"
_SHARD_SIZE = "450MB"


def write_hub(
    kept: pa.Table, folder: Path, read: ReadImage, *, with_splits: bool, progress: Progress | None = None
) -> Written:
    """Write a Dataset, or with splits a DatasetDict, with the columns of the Parquet export.

    A split is first gathered in one file below `folder`, then the library writes it in shards: the disk needs room
    for twice the largest split, memory for one block of rows.

    Args:
        kept: rows of a plan.
        folder: an empty folder.
        read: the bytes of an image.
        with_splits: a DatasetDict with one Dataset per split.
        progress: called with the rows done and their number.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    schema = export_schema(kept, with_splits=with_splits)
    features = datasets.Features.from_arrow_schema(schema)
    written = Written(schema.names)
    # The library refuses to save beside the file that it reads.
    gathered = folder / _GATHERED / "pairs.arrow"
    gathered.parent.mkdir()
    done = 0
    was_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for _, name, table in split_series(kept, with_splits=with_splits):
            place = folder / name if with_splits else folder
            with ArrowWriter(path=str(gathered), features=features) as writer:
                num_rows = 0
                for start in range(0, table.num_rows, BLOCK_ROWS):
                    block = table.slice(start, BLOCK_ROWS)
                    for group in row_groups(block, read, schema, ROW_GROUP_BYTES, written.unreadable):
                        writer.write_table(group)
                        num_rows += group.num_rows
                    done += block.num_rows
                    if progress:
                        progress(done, kept.num_rows)
                if num_rows:
                    writer.finalize()
            if num_rows:
                made = datasets.Dataset.from_file(str(gathered), split=datasets.NamedSplit(name))
                made.save_to_disk(place, max_shard_size=_SHARD_SIZE)
                _fix_fingerprint(place / "state.json", digest_of([name, table["pair_id"].to_pylist()]))
                written.num_rows[name] = num_rows
                del made
    finally:
        if not was_quiet:
            datasets.enable_progress_bars()
        shutil.rmtree(gathered.parent)
    if with_splits:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(written.num_rows)}))
    return written


def _fix_fingerprint(path: Path, fingerprint: str) -> None:
    """Name the data by their content: the library's own fingerprint depends on the time."""
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(state | {"_fingerprint": fingerprint}, indent=2, sort_keys=True))
