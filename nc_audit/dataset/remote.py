"""Datasets in buckets (`s3://`, `gs://`, `hf://`), mirrored below the user's cache: a snapshot of links to blobs.

A blob is one version of one object, named by the hash of where it lies, its size and its ETag; it appears only when
it is whole, and is never fetched twice. A snapshot is a folder of hard links to blobs, named by the hash of what it
holds; it is never changed, so that the runs made from it keep their images when the bucket moves on.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nc_audit.dataset.ids import content_id
from nc_audit.errors import AuditError, DatasetError
from nc_audit.run import writing

MAX_OBJECTS = 1_000_000
_AT_ONCE = 16
_TRIES = 3
_PAUSE = 0.5
_GRACE = 60.0  # seconds before an answer may be called too slow
_SLOWEST = 1_000.0  # bytes per second
_MAGIC = re.compile(r"[*?[]")
_SPEC = re.compile(r"(s3|gs|hf)://(.+)", re.DOTALL)
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "hf": ("huggingface_hub", "")}
_CREDENTIALS = {
    "s3": "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon",
    "hf": "run hf auth login",
}
_VERSIONS = ("ETag", "etag", "blob_id", "oid", "md5Hash", "generation", "LastModified", "updated", "mtime")
_SHARDS = (".tar", ".tar.gz", ".tgz")
_PARQUET = (".parquet", ".pq")
_DATA = (*_SHARDS, *_PARQUET, ".arrow", ".csv", ".tsv", ".tab", ".txt", ".jsonl", ".ndjson", ".json")

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class _Object:
    """One object of a bucket: its whole key as its file system names it, and its path below the dataset's root."""

    key: str
    relative: str
    size: int
    version: str

    @property
    def is_data(self) -> bool:
        """Whether rows may stand in it, so that without it rows would be lost."""
        return self.relative.lower().endswith(_DATA)


@dataclass(frozen=True)
class _Bucket:
    """A file system of fsspec, and the words for it in messages; `endpoint` tells two servers apart."""

    scheme: str
    spec: str
    system: Any
    endpoint: str


class _RefusedError(Exception):
    """An object that is gone, not ours to read, or cannot be stored; no further try would help."""


def is_remote(spec: str) -> bool:
    """Whether a DATASET lies in a bucket that can be read."""
    return _SPEC.fullmatch(spec) is not None


def cache_folder() -> Path:
    """Where mirrors lie: `nc-audit/remote` below XDG_CACHE_HOME, else below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "nc-audit" / "remote"


def mirror(spec: str, progress: Progress | None = None) -> tuple[Path, str, tuple[str, ...]]:
    """A dataset of a bucket as files here; what is here already is not fetched again.

    Of a folder everything is fetched; of a file or pattern the files named and, where they are tables that name
    images, every other file below their folder that is no table or shard itself. An image that has vanished or
    may not be read is noted, and its rows are `missing_image`; a table or shard like that is an error.

    Args:
        spec: `s3://`, `gs://` or `hf://`, and a file, a folder, or a pattern with `*`, `**`, `?` or `[`.
        progress: told the objects done and their number.

    Returns:
        The path (or pattern) to load, a name for the run, and notes.

    Raises:
        DatasetError: nothing is there, access is refused, the network fails, or a package is not installed.
    """
    bucket, path = _opened(spec)
    root, chosen, others = _listed(bucket, path)
    _check_room(bucket, [*chosen, *others])
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DatasetError(
            f"{folder} cannot be made: {problem.strerror}", "set XDG_CACHE_HOME to a folder of yours"
        ) from problem
    blobs, lost = _fetched(bucket, folder, chosen, progress)
    if others and any(_needs_images(one, blobs[one]) for one in chosen if one in blobs):
        more, lost_too = _fetched(bucket, folder, others, progress)
        blobs, lost = {**blobs, **more}, {**lost, **lost_too}
    snapshot = _snapshot(bucket, folder, root, blobs)
    size = sum(one.size for one in blobs)
    notes = [f"{spec} is mirrored in {snapshot}: {len(blobs):,} files, {size:,} bytes"]
    if lost:
        first, why = next(iter(lost.items()))
        files = f"{len(lost):,} file{'s' if len(lost) > 1 else ''}"
        notes.append(f"{files} of {spec} could not be fetched, such as {first.relative!r}: {why}")
    # What a pattern or a file names is named again below the snapshot; of a folder the snapshot itself.
    below = path[len(root) :].strip("/")
    name = PurePosixPath(path if not _MAGIC.search(below) else root).name
    is_file = len(chosen) == 1 and chosen[0].key == path
    return (
        snapshot / below if below else snapshot,
        PurePosixPath(name).stem if is_file else name,
        tuple(notes),
    )


def _opened(spec: str) -> tuple[_Bucket, str]:
    """The file system a spec names, and the path in it."""
    found = _SPEC.fullmatch(spec)
    if not found or "\0" in spec or ".." in found[2].split("/"):
        raise DatasetError(f"{spec!r} names no bucket", "for example s3://bucket/folder/captions.csv")
    scheme = found[1]
    package, extra = _PACKAGES[scheme]
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        # The client's own patience is minutes; what fails to answer is tried again here.
        options["config_kwargs"] = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 1}}
    try:
        import fsspec

        system = fsspec.filesystem(scheme, **options)
    except ImportError as problem:
        hint = f"pip install 'nc-audit[{extra}]'" if extra else f"pip install {package}"
        raise DatasetError(f"{spec} needs the package {package}", hint) from problem
    except Exception as problem:
        raise _told(spec, scheme, problem) from problem
    stated = getattr(system, "endpoint_url", None) or getattr(system, "endpoint", None)
    endpoint = stated or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    path = system._strip_protocol(spec)
    return _Bucket(scheme, spec, system, str(endpoint)), str(path).rstrip("/")


def _listed(bucket: _Bucket, path: str) -> tuple[str, list[_Object], list[_Object]]:
    """The root of a dataset in its bucket, the objects it names, and those its tables may name."""
    system, spec = bucket.system, bucket.spec
    try:
        if _MAGIC.search(path):
            parts = path.split("/")
            first = next(at for at, part in enumerate(parts) if _MAGIC.search(part))
            if first == 0:
                raise DatasetError(
                    f"{spec}: a pattern needs a bucket", "for example s3://bucket/shards/*.tar"
                )
            root = "/".join(parts[:first])
            from fsspec.utils import glob_translate

            fits = re.compile(glob_translate(path))
            found = _objects(bucket, root)
            chosen = [one for one in found if fits.match(one.key) and not _is_hidden(one.relative)]
            if not chosen:
                raise DatasetError(
                    f"no file fits the pattern {spec}", f"{len(found):,} objects lie below {root}"
                )
        else:
            facts = system.info(path)
            if facts["type"] != "file":
                found = _objects(bucket, path)
                if not found:
                    raise DatasetError(f"{spec} holds no file", "check the bucket and the folder's name")
                return path, found, []
            root = path.rpartition("/")[0]
            chosen = [_object(facts, path, root)]
            stem = path.removesuffix(".gz").rpartition(".")[0]
            alone = path.lower().endswith((*_SHARDS, ".arrow"))
            found = [] if alone else _objects(bucket, root)
            if alone and system.exists(f"{stem}.parquet"):  # what img2dataset says about the shard
                chosen.append(_object(system.info(f"{stem}.parquet"), f"{stem}.parquet", root))
    except AuditError:
        raise
    except Exception as problem:  # every file system has its own errors
        raise _told(spec, bucket.scheme, problem) from problem
    stems = {one.key.removesuffix(".gz").rpartition(".")[0] for one in chosen if one.key.endswith(_SHARDS)}
    keys = {one.key for one in chosen}
    chosen += [one for one in found if one.key not in keys and one.key.removesuffix(".parquet") in stems]
    return root, chosen, [one for one in found if not one.is_data]


def _objects(bucket: _Bucket, root: str) -> list[_Object]:
    """Every object below a root, by key; `root` without a slash at its end."""
    if bucket.scheme == "s3":
        listing: Iterable[dict[str, Any]] = _pages(bucket, root)
    else:
        listing = bucket.system.find(root, detail=True).values()
    found = []
    for facts in listing:
        if facts.get("type", "file") == "file" and not facts["name"].endswith("/"):
            found.append(_object(facts, facts["name"], root))
        if len(found) > MAX_OBJECTS:
            raise DatasetError(
                f"{bucket.spec}: more than {MAX_OBJECTS:,} objects lie below {root}", "name a folder below it"
            )
    return sorted(found, key=lambda one: one.key)


def _pages(bucket: _Bucket, root: str) -> Iterable[dict[str, Any]]:
    """A listing page by page, so that a limit can stop it; fsspec itself would read it whole."""
    name, _, prefix = root.partition("/")
    more: dict[str, str] = {}
    while True:
        page = bucket.system.call_s3(
            "list_objects_v2", Bucket=name, Prefix=f"{prefix}/" if prefix else "", **more
        )
        for one in page.get("Contents", ()):
            yield {"name": f"{name}/{one['Key']}", "size": one["Size"], "ETag": one.get("ETag", "")}
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _object(facts: dict[str, Any], key: str, root: str) -> _Object:
    version = next((f"{name} {facts[name]}" for name in _VERSIONS if facts.get(name)), "")
    return _Object(key, key[len(root) + 1 :], int(facts.get("size") or 0), version)


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _check_room(bucket: _Bucket, objects: Sequence[_Object]) -> None:
    """Refuse before the first byte what the disk cannot hold."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    needed, free = sum(one.size for one in objects if not _blob(bucket, one).exists()), 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DatasetError(
            f"{bucket.spec} needs {needed:,} bytes, and {folder} has {free:,} free",
            "set XDG_CACHE_HOME to a larger disk, or name fewer files",
        )


def _blob(bucket: _Bucket, one: _Object) -> Path:
    name = content_id(bucket.scheme, bucket.endpoint, one.key, str(one.size), one.version)
    return cache_folder() / "blobs" / name[:2] / name


def _fetched(
    bucket: _Bucket, folder: Path, objects: Sequence[_Object], progress: Progress | None
) -> tuple[dict[_Object, Path], dict[_Object, str]]:
    """The blob of each object, and why others have none."""
    blobs: dict[_Object, Path] = {}
    lost: dict[_Object, str] = {}
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        results = pool.map(lambda one: _fetch(bucket, one), objects)
        for one, result in zip(objects, results, strict=True):
            if isinstance(result, Path):
                blobs[one] = result
            elif one.is_data:
                raise DatasetError(
                    f"{bucket.spec}: {one.relative!r} cannot be fetched: {result}",
                    "its rows would be lost; mend it, or name a folder or pattern without it",
                )
            else:
                lost[one] = result
            if progress:
                progress(len(blobs) + len(lost), len(objects))
    except DatasetError as problem:
        if "could not be reached" in problem.message:
            problem.message += f"; {len(blobs):,} of {len(objects):,} files are here"
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return blobs, lost


def _fetch(bucket: _Bucket, one: _Object) -> Path | str:
    """An object's blob, or why there is none.

    Raises:
        DatasetError: the network fails; then no row may be taken for one whose image is not there.
        DiskError: there is no room for it.
    """
    parts = one.relative.split("/")
    if "\0" in one.relative or any(part in ("", ".", "..") for part in parts):
        return "its key is no path below the dataset"
    if any(len(os.fsencode(part)) > 255 for part in parts):
        return "its key has a part of more than 255 bytes"
    path = _blob(bucket, one)
    if one.version and path.is_file() and path.stat().st_size == one.size:
        return path
    for number in range(1, _TRIES + 1):
        partial = _partial_beside(path)
        try:
            with writing(path):
                _download(bucket, one, partial)
                partial.replace(path)
            return path
        except AuditError:
            raise
        except _RefusedError as problem:
            return str(problem)
        except FileNotFoundError:
            return "it is no longer there"
        except PermissionError:
            return "access is refused"
        except Exception as problem:  # every file system has its own errors
            if number == _TRIES:
                raise DatasetError(
                    f"{bucket.spec}: {one.relative!r} could not be reached: {_one_line(problem)}",
                    "run it again: what is here is not fetched again",
                ) from problem
            time.sleep(_PAUSE * 2 ** (number - 1))
        finally:
            partial.unlink(missing_ok=True)
    raise AssertionError("the last try returns or raises")


def _partial_beside(path: Path) -> Path:
    """A new file for what is not whole yet."""
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    except OSError as problem:
        raise DatasetError(
            f"{path.parent} cannot be written: {problem.strerror}",
            "set XDG_CACHE_HOME to a folder of yours",
        ) from problem
    os.close(handle)
    return Path(name)


def _download(bucket: _Bucket, one: _Object, partial: Path) -> None:
    from fsspec.callbacks import Callback

    class Meter(Callback):
        """Ends an answer that is longer than its listing says, before it fills the disk, or that drips for ever."""

        taken, begun = 0, time.monotonic()

        def relative_update(self, inc: int = 1) -> None:
            self.taken += inc
            if self.taken > one.size:
                raise _RefusedError(f"it is longer than the {one.size:,} bytes of its listing")
            seconds = time.monotonic() - self.begun
            if seconds > _GRACE and self.taken < _SLOWEST * seconds:
                raise ConnectionError(f"{self.taken:,} bytes came in {seconds:.0f} s")

    bucket.system.get_file(one.key, str(partial), callback=Meter())
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    size = partial.stat().st_size
    if size != one.size:
        raise _RefusedError(f"it has {size:,} bytes, its listing says {one.size:,}")


def _needs_images(one: _Object, path: Path) -> bool:
    """Whether a file names images that lie beside it."""
    if one.relative.lower().endswith((*_SHARDS, ".arrow")):
        return False
    if one.relative.lower().endswith(_PARQUET):
        import pyarrow as pa
        import pyarrow.parquet as pq

        from nc_audit.dataset.images import embedded_columns

        try:
            return not embedded_columns(pq.read_schema(path))
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return False  # the loader says what is wrong with it
    return True


def _snapshot(bucket: _Bucket, folder: Path, root: str, blobs: dict[_Object, Path]) -> Path:
    """A folder with every blob under its object's path, made at once or not at all."""
    names = sorted(f"{one.relative}\n{path.name}" for one, path in blobs.items())
    target = folder / "snapshots" / content_id(bucket.scheme, bucket.endpoint, root, *names)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    try:
        for one, path in blobs.items():
            place = partial / one.relative
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    place.hardlink_to(path)
                except PermissionError:  # a disk that knows no hard links
                    shutil.copy2(path, place)
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as problem:
                raise DatasetError(
                    f"{bucket.spec}: {one.relative!r} is a file and a folder at once",
                    "name a folder or pattern with one of them only",
                ) from problem
            except OSError as problem:
                raise DatasetError(
                    f"{bucket.spec}: {one.relative!r} cannot be stored: {problem.strerror}",
                    "rename the object",
                ) from problem
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same files
                raise
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _told(spec: str, scheme: str, problem: Exception) -> DatasetError:
    """One line for what a file system raises before anything is fetched."""
    kind = type(problem).__name__
    if isinstance(problem, FileNotFoundError):
        return DatasetError(f"{spec} does not exist", "check the bucket and the key")
    if isinstance(problem, PermissionError):
        return DatasetError(f"{spec}: access is refused: {_one_line(problem)}", _CREDENTIALS[scheme])
    if "Credential" in kind or "credential" in str(problem).lower():
        return DatasetError(f"{spec}: no credentials were found", _CREDENTIALS[scheme])
    return DatasetError(f"{spec} cannot be read: {_one_line(problem)}", "check its name and the network")


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
