"""Webdataset shards: tar files whose members share a prefix per pair, read as a stream and never unpacked to disk.

An image is named `SHARD#OFFSET+SIZE:MEMBER`: its bytes lie at an offset of the (decompressed) shard, so that a plain
tar is read at random, a compressed one from its start onwards. Links are not followed.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from nc_audit.dataset.captions_json import parse_json
from nc_audit.dataset.ids import content_id
from nc_audit.dataset.images import MAX_BYTES, header_problem, open_stream
from nc_audit.dataset.rows import Batch, Embedded, LoadOptions, captions_of, counted, flag_of, text_of
from nc_audit.dataset.tables import guess_columns, plain
from nc_audit.errors import DatasetError

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")

_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "ico"}
_TEXTS = ("txt", "caption", "json")
_MAX_TEXT = 16 << 20
_MAX_HEADER = 16 << 20
_SNIFFED = 1000
# What tarfile lets through on bytes that only look like a tar.
_BROKEN = (
    tarfile.TarError,
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
)


@dataclass
class _Sample:
    """The members of one pair, by ending."""

    key: str
    image: str | None = None
    held: Embedded | None = None
    problem: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    remark: str | None = None


class _Headers:
    """A file as tarfile may read it: one header claims no more memory than a header needs."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def is_shard(path: Path) -> bool:
    """Whether a shard's first members hold an image and a caption."""
    has_image = has_text = False
    problems: list[str] = []
    with open_stream(str(path)) as file:
        for number, info in enumerate(_members(file, problems)):
            ending = _split_name(info.name)[1].rpartition(".")[2]
            has_image |= ending in _IMAGES
            has_text |= ending in _TEXTS
            if (has_image and has_text) or number >= _SNIFFED:
                break
    return has_image and has_text


def read_shard(
    path: Path, source: str, split: str | None, options: LoadOptions, notes: list[str], is_inside: bool = True
) -> Iterator[Batch]:
    """Rows of one shard in its order, one per caption; with img2dataset's table beside it, in the table's order.

    A member that is a link or a device, or whose name leads out of the shard, gives a row with a status. What
    follows a damaged place cannot be read; that is noted. Rows that img2dataset failed to fetch stay rows.

    Raises:
        DatasetError: the shard holds no pair at all, or the table beside it cannot be read.
    """
    if options.split is not None and split is not None and split != options.split:
        yield Batch(source, [None], [None], [split], [None])  # names the split; nothing else is wanted
        return
    problems: list[str] = []
    samples, num_other = _samples(path, source, is_inside, problems)
    fetched = _fetched(path)
    if not samples and not fetched:
        message = f"{source} holds no image and no caption" + (f": {problems[0]}" if problems else "")
        raise DatasetError(message, "check that it is a webdataset shard, and whole")
    notes += [f"{source} is damaged, and what follows was not read: {problem}" for problem in problems]
    if num_other:
        notes.append(
            f"{counted(num_other, 'member')} of {source} that belong to no pair, or are a second image"
        )
    if path.name.lower().endswith((".gz", ".tgz")):
        notes.append(
            f"{source} is compressed, so its images are read from its start onwards; a plain tar is faster"
        )
    batch = Batch(source)
    by_key = {PurePosixPath(sample.key).name: sample for sample in samples}
    done: set[int] = set()
    for record in fetched:
        key = str(record.get("key"))
        sample = by_key.get(key)
        if sample is not None:
            done.add(id(sample))
            _add(batch, sample, split, options)
            continue
        caption = text_of(record.get("caption"))
        row = batch.add(text_of(record.get("url")), caption, split, None)
        reason = text_of(record.get("error_message")) or "the shard lacks its image"
        batch.image_remarks[row] = f"img2dataset: {record.get('status')}: {reason}"
        if caption is None:
            batch.caption_remarks[row] = f"key {key} of the table holds no caption"
    for sample in samples:
        if id(sample) not in done:
            _add(batch, sample, split, options)
    yield batch


def _fetched(path: Path) -> list[dict[str, Any]]:
    """The rows of img2dataset's table beside a shard; none where there is no such table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = path.with_suffix(".parquet")
    if not table.is_file() or path.suffix.lower() != ".tar":
        return []
    try:
        with pq.ParquetFile(table) as file:
            names = [
                n
                for n in ("key", "url", "caption", "status", "error_message")
                if n in file.schema_arrow.names
            ]
            if not {"key", "status"} <= set(names):
                return []
            return cast(list[dict[str, Any]], file.read(names, use_threads=False).to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        message = f"{table.name}, the table beside {path.name}, cannot be read: {reason}"
        raise DatasetError(message, "fetch it again, or move it away") from problem


def _split_name(name: str) -> tuple[str, str]:
    """Webdataset's key and ending of a member: cut at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _members(file: IO[bytes], problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a shard; where it is damaged they end, and the reason is appended."""
    try:
        with tarfile.open(fileobj=cast(IO[bytes], _Headers(file)), mode="r:", errorlevel=0) as tar:
            while (info := tar.next()) is not None:
                if info.size < 0:
                    problems.append(f"member {info.name} states a size of {info.size:,} bytes")
                    return
                tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every one
                yield info
            file.seek(tar.offset)
            rest = file.read(tarfile.BLOCKSIZE)
            if any(rest) or 0 < len(rest) < tarfile.BLOCKSIZE:
                problems.append(f"no tar header at byte {tar.offset:,}")
    except _BROKEN as problem:
        problems.append(" ".join(str(problem).split())[:200] or type(problem).__name__)


def _samples(path: Path, source: str, is_inside: bool, problems: list[str]) -> tuple[list[_Sample], int]:
    samples: list[_Sample] = []
    by_key: dict[str, _Sample] = {}
    num_other = 0
    with open_stream(str(path)) as headers, open_stream(str(path)) as data:
        for info in _members(headers, problems):
            if info.isdir():
                continue
            key, endings = _split_name(info.name)
            ending = endings.rpartition(".")[2]
            if ending not in _IMAGES and ending not in _TEXTS:
                num_other += 1
                continue
            sample = by_key.get(key)
            is_image = ending in _IMAGES
            if sample is not None and is_image and sample.image is not None and "." in endings:
                num_other += 1  # 7.mask.png beside 7.jpg
                continue
            if sample is None or (sample.image is not None if is_image else ending in sample.texts):
                sample = by_key[key] = _Sample(key)
                samples.append(sample)
            if is_image:
                sample.image = info.name
                _take_image(sample, info, data, source, is_inside)
            else:
                _take_text(sample, info, ending, data)
    return samples, num_other


def _take_image(
    sample: _Sample, info: tarfile.TarInfo, data: IO[bytes], source: str, is_inside: bool
) -> None:
    uri = f"dataset:{source}#{info.offset_data}+{info.size}:{info.name}"
    if not is_inside:
        detail = "the shard is a symbolic link that leads outside the dataset's folder"
        sample.held = Embedded(uri, None, "outside_root", detail)
    elif info.name.startswith("/") or ".." in info.name.split("/"):
        sample.held = Embedded(uri, None, "outside_root", "the member's name leads outside the shard")
    elif not info.isreg() or info.issparse():
        sample.problem = f"{info.name} is {_kind(info)}, not a file with bytes of its own"
    elif info.size > MAX_BYTES:
        detail = f"the member states {info.size:,} bytes, more than {MAX_BYTES:,}"
        sample.held = Embedded(uri, None, "corrupt_image", detail)
    else:
        found = _bytes_at(data, info.offset_data, info.size)
        if len(found) < info.size:
            detail = f"the shard ends after {len(found):,} of the member's {info.size:,} bytes"
            sample.held = Embedded(uri, None, "corrupt_image", detail)
        else:
            problem = header_problem(found)
            sample.held = Embedded(uri, content_id(found), "corrupt_image" if problem else "ok", problem)


def _take_text(sample: _Sample, info: tarfile.TarInfo, ending: str, data: IO[bytes]) -> None:
    sample.texts[ending] = ""
    if not info.isreg() or info.issparse():
        sample.remark = f"{info.name} is {_kind(info)}, not a file with bytes of its own"
    elif info.size > _MAX_TEXT:
        sample.remark = f"{info.name} states {info.size:,} bytes, more than {_MAX_TEXT:,}"
    else:
        found = _bytes_at(data, info.offset_data, info.size)
        if len(found) == info.size:
            sample.texts[ending] = _decoded(found)
            return
        sample.remark = f"the shard ends within {info.name}"
    del sample.texts[ending]


def _kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "a link"
    return "sparse" if info.issparse() else "a device" if info.isdev() else "of an unknown kind"


def _bytes_at(data: IO[bytes], offset: int, size: int) -> bytes:
    """Up to `size` bytes; fewer where the shard ends or its compression breaks."""
    try:
        data.seek(offset)
        return data.read(size)
    except _BROKEN:
        return b""


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _add(batch: Batch, sample: _Sample, split: str | None, options: LoadOptions) -> None:
    """The rows of one sample."""
    facts: dict[str, Any] = {}
    remark = sample.remark
    if "json" in sample.texts:
        try:
            value = parse_json(sample.texts["json"], f"{sample.key}.json")
            facts = value if isinstance(value, dict) else {"caption": value}
        except (DatasetError, ValueError) as problem:
            remark = remark or (problem.message if isinstance(problem, DatasetError) else str(problem))
    captions: list[str | None] = [None]
    plain_text = next((sample.texts[one] for one in ("txt", "caption") if one in sample.texts), None)
    if plain_text is not None and options.caption_column is None:
        captions = [plain_text.removesuffix("\n").removesuffix("\r")]
    elif facts:
        names = guess_columns(list(facts))[1]
        if options.caption_column is not None:
            names = tuple(name for name in facts if plain(name) == plain(options.caption_column))
        captions = [one for name in names for one in captions_of(facts[name])] or [None]
    row_split = split or text_of(facts.get("split"))
    for caption in captions:
        row = batch.add(sample.image, caption, row_split, flag_of(facts.get("known_noise")))
        if sample.held is not None:
            batch.embedded[row] = sample.held
        else:
            batch.image_remarks[row] = sample.problem or f"the shard holds no image for {sample.key}"
        if caption is None:
            batch.caption_remarks[row] = remark or f"the shard holds no caption for {sample.key}"
