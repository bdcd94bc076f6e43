"""Parquet shards with the images inside, as the `datasets` library and the hub's viewer read them at once.

One file series per split, `data/<split>-00000-of-0000N.parquet`. The image column is a struct of the file's bytes, as
they are, and its base name; the schema metadata key `huggingface` says that it is an image. Rows stream through one
row group at a time, so that memory stays flat whatever the size of the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nc_audit.export.names import base_name
from nc_audit.export.plan import Written
from nc_audit.export.rows import BLOCK_ROWS, facts_of, split_series

# The hub's viewer wants row groups of at most 100 MB and shards of at most 500 MB; images are counted uncompressed.
ROW_GROUP_BYTES = 32 << 20
SHARD_BYTES = 450_000_000
ROW_GROUP_ROWS = 1 << 17  # of tables without images

_DTYPES = {
    pa.string(): "string",
    pa.int64(): "int64",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.bool_(): "bool",
}

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def export_schema(kept: pa.Table, *, with_splits: bool) -> pa.Schema:
    """The columns of the shards, with the metadata that makes `datasets` show the first one as an image."""
    fields = [pa.field("image", IMAGE), pa.field("caption", pa.string())]
    fields += [
        pa.field(name, kept.schema.field(name).type) for name in facts_of(kept, with_splits=with_splits)
    ]
    features: dict[str, dict[str, str]] = {
        column.name: {"dtype": _DTYPES[column.type], "_type": "Value"}
        for column in fields
        if column.name != "image"
    }
    features = {"image": {"_type": "Image"}, **features}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write_shards(
    kept: pa.Table,
    folder: Path,
    read: Callable[[str, str], bytes],
    *,
    with_splits: bool,
    progress: Callable[[int, int | None], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> Written:
    """Write the kept rows as shards below `folder`/data, split by split, in the order of the rows.

    Args:
        kept: rows of a plan.
        folder: an empty folder.
        read: the bytes of an image, by image_id and image_uri; OSError or ValueError where it cannot be read.
        with_splits: one series per split instead of one for all, and a column that names it.
        progress: called with the rows done and their number.
        shard_bytes: a shard takes no further row group beyond this size.
        row_group_bytes: a row group takes no further row beyond this size of its images, uncompressed.

    Returns:
        The shards, and the rows that could not be written.
    """
    schema = export_schema(kept, with_splits=with_splits)
    written = Written(columns=schema.names)
    # Copies of an image inside a row group cost nothing when the writer keeps each value once.
    repeats = kept.num_rows > 1.2 * len(pc.unique(kept["image_id"]))
    done = 0
    (folder / "data").mkdir()
    for split, name, rows in split_series(kept, with_splits=with_splits):
        series = _Series(folder / "data", name, schema, repeats, shard_bytes)
        try:
            for start in range(0, rows.num_rows, BLOCK_ROWS):
                block = rows.slice(start, BLOCK_ROWS)
                for group in row_groups(block, read, schema, row_group_bytes, written.unreadable):
                    series.write(group)
                done += block.num_rows
                if progress:
                    progress(done, kept.num_rows)
        finally:
            series.close()
        if series.num_rows:
            files = series.finish()
            written.num_rows[name] = series.num_rows
            written.hub[name] = [f"data/{name}-*"]
            written.data |= dict.fromkeys(files, split)
    return written


def write_tables(
    kept: pa.Table,
    folder: Path,
    read: Callable[[str, str], bytes],
    *,
    with_splits: bool,
    progress: Callable[[int, int | None], None] | None = None,
) -> Written:
    """Write the kept rows without their images: `image` is the name that the dataset gives it.

    Arguments as in `write_shards`; nothing is read.
    """
    columns = ["image", "caption", *facts_of(kept, with_splits=with_splits)]
    written = Written(columns=columns)
    (folder / "data").mkdir()
    for split, name, rows in split_series(kept, with_splits=with_splits):
        if rows.num_rows:
            file = f"data/{name}-00000-of-00001.parquet"
            pq.write_table(
                rows.select(columns), folder / file, compression="zstd", row_group_size=ROW_GROUP_ROWS
            )
            written.num_rows[name] = rows.num_rows
            written.hub[name] = [f"data/{name}-*"]
            written.data[file] = split
            if progress:
                progress(sum(written.num_rows.values()), kept.num_rows)
    return written


def row_groups(
    block: pa.Table,
    read: Callable[[str, str], bytes],
    schema: pa.Schema,
    row_group_bytes: int,
    unreadable: dict[int, str],
) -> Iterator[pa.Table]:
    """The block with its images, in parts of bounded size; rows that cannot be read go to `unreadable`."""
    images: list[dict[str, bytes | str]] = []
    places: list[int] = []
    size = 0
    sources = [block[column].to_pylist() for column in ("row", "image_id", "image_uri", "image")]
    for place, (row, image_id, uri, image) in enumerate(zip(*sources, strict=True)):
        try:
            data = read(image_id, uri)
        except (OSError, ValueError) as problem:
            unreadable[row] = str(problem)
            continue
        images.append({"bytes": data, "path": base_name(image, image_id)})
        places.append(place)
        size += len(data)
        if size >= row_group_bytes:
            yield _with_images(block, places, images, schema)
            images, places, size = [], [], 0
    if places:
        yield _with_images(block, places, images, schema)


def _with_images(
    block: pa.Table, places: list[int], images: list[dict[str, bytes | str]], schema: pa.Schema
) -> pa.Table:
    table = block.take(np.array(places, np.int64))
    columns = [pa.array(images, IMAGE), *(table[column.name] for column in schema if column.name != "image")]
    return pa.table(columns, schema=schema)


class _Series:
    """The shards of one split: temporary names until their number is known."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, repeats: bool, shard_bytes: int) -> None:
        self.folder, self.name, self.schema, self.shard_bytes = folder, name, schema, shard_bytes
        self.dictionary = (
            ["image.bytes", "image.path", "caption", "image_id", "tag", "split"]
            if repeats
            else ["tag", "split"]
        )
        self.paths: list[Path] = []
        self.writer: pq.ParquetWriter | None = None
        self.sink: pa.NativeFile | None = None
        self.num_rows = 0

    def write(self, table: pa.Table) -> None:
        """Append one row group; begin a shard where there is none."""
        if self.writer is None:
            self.paths.append(self.folder / f"{self.name}-{len(self.paths):05d}.partial")
            self.sink = pa.OSFile(str(self.paths[-1]), "wb")
            self.writer = pq.ParquetWriter(
                self.sink,
                self.schema,
                compression="zstd",
                use_dictionary=[name for name in self.dictionary if name.split(".")[0] in self.schema.names],
                dictionary_pagesize_limit=2 * ROW_GROUP_BYTES,
                write_page_index=True,
            )
        self.writer.write_table(table, row_group_size=table.num_rows)
        self.num_rows += table.num_rows
        assert self.sink is not None
        # Room for one more row group, so that the limit holds.
        if self.sink.tell() + ROW_GROUP_BYTES > self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        if self.writer is not None and self.sink is not None:
            self.writer.close()
            self.sink.close()
        self.writer = self.sink = None

    def finish(self) -> list[str]:
        """Give the shards their names; those names, relative to the export folder."""
        self.close()
        names = []
        for number, path in enumerate(self.paths):
            final = path.with_name(f"{self.name}-{number:05d}-of-{len(self.paths):05d}.parquet")
            path.rename(final)
            names.append(f"{self.folder.name}/{final.name}")
        return names
