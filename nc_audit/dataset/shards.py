"""Webdataset shards: tar files whose members share a prefix per pair, read as a stream and never unpacked to disk.

An image is named `SHARD#OFFSET+SIZE:MEMBER`: its bytes lie at an offset of the (decompressed) shard, so that a plain
tar is read at random, a compressed one from its start onwards. Links are not followed.
"""

from __future__ import annotations

import gzip
import io
import itertools
import tarfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from nc_audit.dataset.captions_json import decode_text, parse_json
from nc_audit.dataset.extras import scalars_of
from nc_audit.dataset.guard import marker_of
from nc_audit.dataset.ids import content_id, content_id_of_blocks
from nc_audit.dataset.images import MAX_BYTES, header_problem, open_stream, promises_image
from nc_audit.dataset.rows import Batch, Embedded, LoadOptions, captions_of, counted, flag_of, text_of
from nc_audit.dataset.tables import guess_columns, plain
from nc_audit.errors import DatasetError

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")

_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "ico"}
_TEXTS = ("txt", "caption", "json")
_MAX_TEXT = 16 << 20
_MAX_HEADER = 16 << 20
# What a compressed shard may grow to: images are compressed already, so that more is a bomb.
_MAX_GROWTH = 100
_SMALL = 256 << 20
_CHUNK = 1 << 20
_MAGIC_AT = 257
_MAX_PROBLEMS = 20
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
    legacy: str | None = None  # the member whose caption is not Unicode, and how it was read


class _Headers:
    """A file as tarfile may read it: one header claims no more memory than a header needs, and no bomb unfolds."""

    def __init__(self, file: IO[bytes], limit: int | None) -> None:
        self._file, self._limit = file, limit

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if self._limit is not None and offset > self._limit:
            raise tarfile.ReadError(
                f"it decompresses to more than {self._limit:,} bytes, {_MAX_GROWTH} times its own size"
                if self._limit > _SMALL
                else f"it decompresses to more than {_SMALL:,} bytes, the limit of a small shard"
            )
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def is_shard(path: Path) -> bool:
    """Whether a shard holds an image and a caption, or, where it is damaged or failed, was to hold them.

    Members are looked at until both are found: all of a plain tar's headers, all of a compressed shard.
    """
    if _table_beside(path):
        return True
    has_image = has_text = False
    problems: list[str] = []
    for info in _members(path, problems):
        ending = _split_name(info.name)[1].rpartition(".")[2]
        has_image |= ending in _IMAGES
        has_text |= ending in _TEXTS
        if has_image and has_text:
            return True
    return bool(problems) and (has_image or has_text)


def read_shard(
    path: Path, source: str, split: str | None, options: LoadOptions, notes: list[str], is_inside: bool = True
) -> Iterator[Batch]:
    """Rows of one shard in its order, one per caption; with img2dataset's table beside it, in the table's order.

    A member that is a link or a device, or whose name leads out of the shard, gives a row with a status. What
    follows a damaged place cannot be read; that is noted. Rows that img2dataset failed to fetch stay rows.

    Raises:
        DatasetError: the shard holds no pair at all, or the table beside it cannot be read.
    """
    problems: list[str] = []
    samples, num_other = _samples(path, source, is_inside, problems)
    fetched = _fetched(path)
    if not samples and not fetched:
        message = f"{source} holds no image and no caption" + (
            f"; it is damaged{problems[0]}" if problems else ""
        )
        raise DatasetError(message, "check that it is a webdataset shard, and whole")
    notes += [f"{source} is damaged{problem}" for problem in problems]
    legacy = [sample.legacy for sample in samples if sample.legacy is not None]
    if legacy:
        first, _, name = legacy[0].rpartition(" as ")
        are = "is" if len(legacy) == 1 else "are"
        notes.append(
            f"{counted(len(legacy), 'caption')} of {source} {are} not valid UTF-8 and read as {name} "
            f"(first: {first}); check accented letters"
        )
    if num_other:
        notes.append(
            f"{counted(num_other, 'member')} of {source} that belong to no pair, or are a second image"
        )
    if path.name.lower().endswith((".gz", ".tgz")):
        notes.append(
            f"{source} is compressed, so its images are read from its start onwards; a plain tar is faster"
        )
    batch = Batch(source)
    is_ours = any((marker_of(place) or {}).get("format") == "webdataset" for place in path.parents[:2])
    keyed = _Keyed(samples)
    for record in fetched:
        key = str(record.get("key"))
        sample = keyed.take(key)
        if sample is not None:
            _add(batch, sample, split, options, is_ours)
            continue
        caption = text_of(record.get("caption"))
        row = batch.add(text_of(record.get("url")), caption, split, None)
        reason = text_of(record.get("error_message")) or "the shard lacks its image"
        batch.image_remarks[row] = f"img2dataset: {record.get('status')}: {reason}"
        if caption is None:
            batch.caption_remarks[row] = f"key {key} of the table holds no caption"
    for sample in keyed.left():
        _add(batch, sample, split, options, is_ours)
    yield batch


class _Keyed:
    """Samples by the keys of a table: a whole key goes before a base name, and a base name must be the only one."""

    def __init__(self, samples: list[_Sample]) -> None:
        self._samples = samples
        self._taken: set[int] = set()
        self._whole: dict[str, list[_Sample]] = {}
        self._base: dict[str, list[_Sample]] = {}
        for sample in samples:
            self._whole.setdefault(sample.key.removeprefix("./"), []).append(sample)
            self._base.setdefault(PurePosixPath(sample.key).name, []).append(sample)

    def take(self, key: str) -> _Sample | None:
        """The sample of a key, each given once, in the shard's order; None where there is none."""
        base = self._base.get(key, [])
        for sample in [*self._whole.get(key, []), *(base if len(base) == 1 else [])]:
            if id(sample) not in self._taken:
                self._taken.add(id(sample))
                return sample
        return None

    def left(self) -> list[_Sample]:
        """The samples that no key has taken."""
        return [sample for sample in self._samples if id(sample) not in self._taken]


def _table_beside(path: Path) -> list[str]:
    """The columns of img2dataset's table beside a shard; none where there is no such table.

    Raises:
        DatasetError: there is one, and it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = path.with_suffix(".parquet")
    if path.suffix.lower() != ".tar" or not table.is_file():
        return []
    try:
        with pq.ParquetFile(table) as file:
            found = set(file.schema_arrow.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise _broken_table(path, table, problem) from problem
    names = [name for name in ("key", "url", "caption", "status", "error_message") if name in found]
    return names if {"key", "status"} <= found else []


def _fetched(path: Path) -> list[dict[str, Any]]:
    """The rows of img2dataset's table beside a shard; none where there is no such table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, table = _table_beside(path), path.with_suffix(".parquet")
    if not names:
        return []
    try:
        with pq.ParquetFile(table) as file:
            return cast(list[dict[str, Any]], file.read(names, use_threads=False).to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise _broken_table(path, table, problem) from problem


def _broken_table(path: Path, table: Path, problem: Exception) -> DatasetError:
    reason = " ".join(str(problem).split())[:200]
    message = f"{table.name}, the table beside {path.name}, cannot be read: {reason}"
    return DatasetError(message, "fetch it again, or move it away")


def _split_name(name: str) -> tuple[str, str]:
    """Webdataset's key and ending of a member: cut at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _members(path: Path, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a shard. Where a plain one is damaged, they go on at the next whole header; it is noted.

    Args:
        path: the shard.
        problems: receives what is damaged, as the end of a sentence.
    """
    with open_stream(str(path)) as file:
        is_plain = not isinstance(file, gzip.GzipFile)
        limit = None if is_plain else max(_SMALL, _MAX_GROWTH * path.stat().st_size)
        start: int | None = 0
        while start is not None:
            reached = [start + tarfile.BLOCKSIZE]
            problem = yield from _run_of_members(file, start, limit, reached)
            if problem is None:
                return
            start = _next_header(file, reached[0]) if is_plain else None
            what = "what follows was not read" if start is None else f"reading goes on at byte {start:,}"
            problems.append(f", and {what}: {problem}")
            if len(problems) >= _MAX_PROBLEMS:
                problems.append(f" in {_MAX_PROBLEMS} places or more; the rest was not read")
                return


def _run_of_members(
    file: IO[bytes], start: int, limit: int | None, reached: list[int]
) -> Generator[tarfile.TarInfo, None, str | None]:
    """The members from a header on; returns what is wrong after them, None at the shard's end.

    `reached` is set to where a further header may stand.
    """
    try:
        file.seek(start)
        headers = cast(IO[bytes], _Headers(file, limit))
        with tarfile.open(fileobj=headers, mode="r:", errorlevel=0) as tar:
            while (info := tar.next()) is not None:
                reached[0] = max(reached[0], info.offset_data)
                if info.size < 0:
                    return f"member {info.name} states a size of {info.size:,} bytes"
                tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every one
                yield info
            file.seek(tar.offset)
            rest = file.read(tarfile.BLOCKSIZE)
            if any(rest) or 0 < len(rest) < tarfile.BLOCKSIZE:
                return f"no tar header at byte {tar.offset:,}"
    except _BROKEN as problem:
        return " ".join(str(problem).split())[:200] or type(problem).__name__
    return None


def _next_header(file: IO[bytes], start: int) -> int | None:
    """Where the first whole header at or behind a place stands, on a block's border; None where there is none."""
    at = -(-start // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(at)
    while chunk := file.read(_CHUNK):
        place = chunk.find(b"ustar")
        while place >= 0:
            block = place - _MAGIC_AT
            if block >= 0 and block % tarfile.BLOCKSIZE == 0:
                try:
                    tarfile.TarInfo.frombuf(
                        chunk[block : block + tarfile.BLOCKSIZE], "utf-8", "surrogateescape"
                    )
                    return at + block
                except _BROKEN:
                    pass
            place = chunk.find(b"ustar", place + 1)
        at += len(chunk)
    return None


def _samples(path: Path, source: str, is_inside: bool, problems: list[str]) -> tuple[list[_Sample], int]:
    samples: list[_Sample] = []
    by_key: dict[str, _Sample] = {}
    num_other = 0
    with open_stream(str(path)) as data:
        for info in _members(path, problems):
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
        sample.held = _held(uri, info, data)


def _held(uri: str, info: tarfile.TarInfo, data: IO[bytes]) -> Embedded:
    """What a member holds; a large one that does not begin like an image is hashed and never held whole."""
    start = _bytes_at(data, info.offset_data, min(info.size, _CHUNK))
    num_read = len(start)

    def rest() -> Iterator[bytes]:
        nonlocal num_read
        while num_read < info.size and (
            block := _bytes_at(data, info.offset_data + num_read, min(info.size - num_read, _CHUNK))
        ):
            num_read += len(block)
            yield block

    if num_read == info.size or promises_image(start):
        whole = io.BytesIO()  # its value is no second copy
        whole.write(start)
        whole.writelines(rest())
        found = whole.getvalue()
        image_id, problem = content_id(found), header_problem(found)
    else:
        image_id = content_id_of_blocks(info.size, itertools.chain([start], rest()))
        problem = header_problem(start)
    if num_read < info.size:
        detail = f"the shard ends after {num_read:,} of the member's {info.size:,} bytes"
        return Embedded(uri, None, "corrupt_image", detail)
    return Embedded(uri, image_id, "corrupt_image" if problem else "ok", problem)


def _take_text(sample: _Sample, info: tarfile.TarInfo, ending: str, data: IO[bytes]) -> None:
    sample.texts[ending] = ""
    if not info.isreg() or info.issparse():
        sample.remark = f"{info.name} is {_kind(info)}, not a file with bytes of its own"
    elif info.size > _MAX_TEXT:
        sample.remark = f"{info.name} states {info.size:,} bytes, more than {_MAX_TEXT:,}"
    else:
        found = _bytes_at(data, info.offset_data, info.size)
        if len(found) == info.size:
            sample.texts[ending], legacy = decode_text(found)
            if legacy is not None and sample.legacy is None:
                sample.legacy = f"{info.name} as {legacy}"
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


def _add(batch: Batch, sample: _Sample, split: str | None, options: LoadOptions, is_ours: bool) -> None:
    """The rows of one sample; an export of ours has its caption in the json exactly."""
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
    used = {"split", "known_noise", "image"}
    if is_ours and options.caption_column is None and isinstance(facts.get("caption"), str):
        captions, used = [facts["caption"]], used | {"caption"}
    elif plain_text is not None and options.caption_column is None:
        captions = [plain_text.removesuffix("\n").removesuffix("\r")]
    elif facts:
        names = guess_columns(list(facts))[1]
        if options.caption_column is not None:
            names = tuple(name for name in facts if plain(name) == plain(options.caption_column))
        captions = [one for name in names for one in captions_of(facts[name])] or [None]
        used |= set(names)
    extras = scalars_of(facts, used)
    row_split = text_of(facts.get("split")) or split
    for caption in captions:
        row = batch.add(sample.image, caption, row_split, flag_of(facts.get("known_noise")))
        if extras:
            batch.extras[row] = extras
        if sample.held is not None:
            batch.embedded[row] = sample.held
        else:
            batch.image_remarks[row] = sample.problem or f"the shard holds no image for {sample.key}"
        if caption is None:
            batch.caption_remarks[row] = remark or f"the shard holds no caption for {sample.key}"
