"""WebDataset: tar shards where files that share a number are one pair: the image, `.txt` and `.json`.

The number is the pair's row in the audited dataset. The same rows give the same bytes: members carry no time and no
owner. Every pair has its own copy of its image, as the format has it.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa

from nc_audit.export.names import base_name, image_ending
from nc_audit.export.plan import Written
from nc_audit.export.rows import Progress, ReadImage, Rows, Steady, split_series
from nc_audit.report.text import json_text

SHARD_ROWS = 10_000
SHARD_BYTES = 500_000_000
_BLOCK = 512


def write_webdataset(
    kept: pa.Table,
    folder: Path,
    read: ReadImage,
    *,
    with_splits: bool,
    progress: Progress | None = None,
    shard_rows: int = SHARD_ROWS,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write `data/SPLIT-000000.tar` and so on, split by split, in the order of the rows.

    Args:
        kept: rows of a plan.
        folder: an empty folder.
        read: the bytes of an image.
        with_splits: one series of shards per split instead of one for all.
        progress: called with the rows done and their number.
        shard_rows: a shard takes no more pairs.
        shard_bytes: a shard takes no further pair that would carry it beyond this size, but for its first.
    """
    facts = Steady(kept, with_splits=with_splits)
    endings: set[str] = set()
    rows = Rows(read, kept.num_rows, progress)
    written = Written(["image", "caption", *facts.names], unreadable=rows.unreadable)
    (folder / "data").mkdir()
    for split, split_name, table in split_series(kept, with_splits=with_splits):
        shards = _Shards(folder / "data", split_name, shard_rows, shard_bytes)
        try:
            for row, data in rows.each(table):
                assert data is not None
                record = {"image": base_name(row["image"], row["image_id"]), "caption": row["caption"]}
                record |= facts.of(row)
                endings.add(image_ending(data))
                shards.add(
                    f"{row['row']:09d}",
                    {
                        image_ending(data): data,
                        "txt": row["caption"].encode("utf-8"),
                        "json": json_text(record, indent=None).encode("utf-8"),
                    },
                )
        finally:
            shards.close()
        if shards.num_rows:
            written.num_rows[split_name] = shards.num_rows
            written.hub[split_name] = [f"data/{split_name}-*"]
            written.data |= {f"data/{name}": split for name in shards.names}
    if len(endings) > 1:
        written.hub.clear()
        written.notes.append(
            f"images are of {len(endings)} kinds ({', '.join(sorted(endings))}): webdataset reads them, "
            "datasets.load_dataset wants shards of one kind; --format parquet suits it"
        )
    return written


class _Shards:
    """The tar files of one split."""

    def __init__(self, folder: Path, name: str, shard_rows: int, shard_bytes: int) -> None:
        self.folder, self.name, self.shard_rows, self.shard_bytes = folder, name, shard_rows, shard_bytes
        self.names: list[str] = []
        self.num_rows = 0
        self._tar: tarfile.TarFile | None = None
        self._rows_in = 0

    def add(self, key: str, files: dict[str, bytes]) -> None:
        """Append one pair; its files follow each other."""
        size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in files.values())
        if self._tar is not None and (
            self._rows_in >= self.shard_rows or self._tar.offset + size > self.shard_bytes
        ):
            self.close()
        if self._tar is None:
            self.names.append(f"{self.name}-{len(self.names):06d}.tar")
            self._tar = tarfile.open(  # noqa: SIM115
                self.folder / self.names[-1], "w", format=tarfile.USTAR_FORMAT
            )
            self._rows_in = 0
        for ending, data in files.items():
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size, member.mtime, member.mode = len(data), 0, 0o644
            self._tar.addfile(member, io.BytesIO(data))
        self._rows_in += 1
        self.num_rows += 1

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
