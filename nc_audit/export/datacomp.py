"""DataComp: the ids of the kept pairs as a sorted array, which its resharder takes instead of a rewritten dataset.

An id is the input's `uid` where it has one of 32 hexadecimal digits on every kept row, else the `pair_id`. Images and
captions stay where they are.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from nc_audit.export.plan import Written
from nc_audit.export.rows import BLOCK_ROWS, Progress, ReadImage, split_series

UID = np.dtype("u8,u8")
_HEX = re.compile(r"[0-9a-fA-F]{32}")


def write_datacomp(
    kept: pa.Table, folder: Path, read: ReadImage, *, with_splits: bool, progress: Progress | None = None
) -> Written:
    """Write `uids.npy`, or `uids_SPLIT.npy` for each split: distinct ids, sorted, dtype u8,u8.

    Args:
        kept: rows of a plan.
        folder: an empty folder.
        read: not called: there are no images in it.
        with_splits: one file per split.
        progress: called with the rows done and their number.
    """
    name = id_column(kept)
    written = Written([name])
    done = 0
    for _, split_name, table in split_series(kept, with_splits=with_splits):
        ids = np.empty(table.num_rows, UID)
        for start in range(0, table.num_rows, BLOCK_ROWS):
            found = table[name].slice(start, BLOCK_ROWS).to_pylist()
            ids[start : start + len(found)] = [(int(one[:16], 16), int(one[16:], 16)) for one in found]
        file = f"uids_{split_name}.npy" if with_splits else "uids.npy"
        np.save(folder / file, np.unique(ids), allow_pickle=False)
        written.num_rows[split_name] = table.num_rows
        done += table.num_rows
        if progress:
            progress(done, kept.num_rows)
    return written


def id_column(kept: pa.Table) -> str:
    """The column whose values are the ids: `uid` where every row has one of 32 hexadecimal digits, else `pair_id`."""
    if "uid" not in kept.column_names or not pa.types.is_string(kept.schema.field("uid").type):
        return "pair_id"
    is_whole = all(one is not None and _HEX.fullmatch(one) for one in kept["uid"].unique().to_pylist())
    return "uid" if is_whole else "pair_id"
