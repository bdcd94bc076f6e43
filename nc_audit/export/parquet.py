"""Parquet shards with the images inside, as the `datasets` library and the hub's viewer read them at once.

One file series per split, `data/<split>-00000-of-0000N.parquet`. The image column is a struct of the file's bytes, as
they are, and its base name; the schema metadata key `huggingface` says that it is an image. Rows stream through one
row group at a time, so that memory stays flat whatever the size of the dataset.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nc_audit.export.plan import Written

# The hub's viewer wants row groups of at most 100 MB and shards of at most 500 MB; images are counted uncompressed.
ROW_GROUP_BYTES = 32 << 20
ROW_GROUP_ROWS = 4096
SHARD_BYTES = 450_000_000

DEFAULT_SPLIT = "train"
UNNAMED_SPLIT = "unnamed"

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_OPTIONAL = ["split", "tag", "noise_probability", "weight", "original_caption"]


def export_schema(kept: pa.Table, *, with_splits: bool) -> pa.Schema:
    """The columns of the shards, with the metadata that makes `datasets` show the first one as an image."""
    names = [name for name in _OPTIONAL if name in kept.column_names and (name != "split" or with_splits)]
    fields = [pa.field("image", IMAGE), pa.field("caption", pa.string()), pa.field("row", pa.int64())]
    fields += [pa.field("pair_id", pa.string()), pa.field("image_id", pa.string())]
    fields += [pa.field(name, kept.schema.field(name).type) for name in names]
    known = {pa.string(): "string", pa.int64(): "int64", pa.float32(): "float32"}
    features: dict[str, dict[str, str]] = {
        column.name: {"dtype": known[column.type], "_type": "Value"}
        for column in fields
        if column.name != "image"
    }
    features = {"image": {"_type": "Image"}, **features}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def split_names(splits: list[str | None]) -> dict[str | None, str]:
    """A file name for each split of a dataset, in the order given.

    Letters, digits and underscores stay, which is what `datasets` allows; two splits never share a name.

    Example:
        >>> split_names(["train", "../test", "TRAIN"])
        {'train': 'train', '../test': 'test', 'TRAIN': 'TRAIN_2'}
    """
    if splits == [None]:
        return {None: DEFAULT_SPLIT}
    names: dict[str | None, str] = {}
    taken: set[str] = set()
    for split in splits:
        words = unicodedata.normalize("NFKC", split or "").encode("utf-8")[:100].decode("utf-8", "ignore")
        stem = re.sub(r"\W+", "_", words).strip("_") or UNNAMED_SPLIT
        # `all` means every split to `datasets`.
        stem = f"{stem}_" if stem.casefold() == "all" else stem
        name, count = stem, 1
        while name.casefold() in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name.casefold())
        names[split] = name
    return names


def base_name(image: str | None, image_id: str) -> str:
    """The last part of a path or member name, harmless as a file name; `image_id` where nothing is left of it.

    Example:
        >>> base_name("C:\\\\images\\\\a b.jpg", "0f")
        'a b.jpg'
    """
    name = re.split(r"[\\/]", image or "")[-1]
    name = "".join(
        "_" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c for c in name
    ).strip()
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
    if len(name.encode("utf-8")) > 200:
        name = stem.encode("utf-8")[:150].decode("utf-8", "ignore") + suffix.encode("utf-8")[:16].decode(
            "utf-8", "ignore"
        )
    return image_id if name in {"", ".", ".."} else name


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
    splits: list[str | None] = pc.unique(kept["split"]).to_pylist() if with_splits else [None]
    written = Written(columns=schema.names)
    # Copies of an image inside a row group cost nothing when the writer keeps each value once.
    repeats = kept.num_rows > 1.2 * len(pc.unique(kept["image_id"]))
    done = 0
    (folder / "data").mkdir()
    for split, name in split_names(splits).items():
        rows = kept if not with_splits else kept.filter(_is_split(kept["split"], split))
        series = _Series(folder / "data", name, schema, repeats, shard_bytes)
        try:
            for start in range(0, rows.num_rows, ROW_GROUP_ROWS):
                block = rows.slice(start, ROW_GROUP_ROWS)
                for group in _row_groups(block, read, schema, row_group_bytes, written.unreadable):
                    series.write(group)
                done += block.num_rows
                if progress:
                    progress(done, kept.num_rows)
        finally:
            series.close()
        if series.num_rows:
            written.splits[name] = series.finish()
            written.num_rows[name] = series.num_rows
    return written


def _is_split(splits: pa.ChunkedArray, split: str | None) -> pa.ChunkedArray:
    return pc.is_null(splits) if split is None else pc.fill_null(pc.equal(splits, split), False)


def _row_groups(
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
