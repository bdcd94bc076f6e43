"""A run directory: tables, embeddings and a manifest that is the only truth about what is done.

A file is written under a partial name, flushed, renamed, and then recorded in `run.json`, which itself is
replaced atomically. A stage is done when the manifest lists it under the key of its inputs and its files are
there with the recorded digests; otherwise it is stale and runs again. One process at a time writes to a run: the
kernel holds its lock, and lets go of it however the process ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nc_audit import __version__
from nc_audit.decisions import read_decisions
from nc_audit.errors import AuditError, DiskError, RunError
from nc_audit.schema import check_table

MANIFEST = "run.json"
FORMAT = 1
RUNS = Path("runs")
LATEST = "latest"
LOCK = ".lock"
_READERS_NEED = 5.0
"""Seconds within which whoever reads a run is through with its tables."""
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file would be larger than is allowed here",
}


def digest_of(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order; 32 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of a write for which there is no room what could not be written, where, and how much is free.

    Raises:
        DiskError: in the place of whatever the writer raised; what failed for other reasons passes as it is.
    """
    try:
        yield
    except AuditError:
        raise
    except Exception as problem:
        why = no_room(problem)
        if why is None:
            raise
        raise DiskError(
            f"{why}: {path} could not be written{_free_at(path)}",
            "make room, then give the same command again; nothing half-written stands in its way",
            path=str(path),
        ) from problem


def no_room(problem: Exception) -> str | None:
    """In words, that a write failed for want of room; None where it failed for another reason."""
    if isinstance(problem, OSError) and problem.errno in _NO_ROOM:
        return _NO_ROOM[problem.errno]
    # Writers in other languages say it in words alone.
    said = re.search(r"\(os error (\d+)\)|No space left on device", str(problem))
    if said is None:
        return None
    return _NO_ROOM.get(int(said[1]) if said[1] else errno.ENOSPC)


def _free_at(path: Path) -> str:
    place = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    try:
        return f" ({shutil.disk_usage(place).free / 1e6:,.1f} MB free in {place})"
    except OSError:
        return ""


@contextmanager
def replacing(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """A partial path to write to; on success flushed and renamed to `path`, on failure removed.

    Args:
        path: the file.
        flushed: wait until the disk holds it; not worth the wait for thousands of files that are easily made again.

    Raises:
        DiskError: there is no room for it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            yield partial
            if flushed:
                with partial.open("rb") as handle:
                    os.fsync(handle.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def take_lock(file: int, how: int, what: str, hint: str) -> None:
    """Lock an open file, whose text says who holds it alone, or refuse at once.

    Args:
        file: its descriptor; closing it lets go.
        how: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`. Who wants it alone waits some seconds for those who only read.
        what: is in use, for the message.
        hint: what to do then.

    Raises:
        RunError: another process holds it, or the disk knows no locks.
    """
    until = time.monotonic() + _READERS_NEED
    while True:
        try:
            return fcntl.flock(file, how | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunError(
                    f"{what} cannot be locked: {problem.strerror}", "put it on a disk that knows locks"
                ) from problem
            holder = _holder(file)
            if holder or time.monotonic() > until:
                raise RunError(
                    f"{what} is in use by {holder or 'another process, which reads it'}", hint
                ) from problem
        time.sleep(0.05)


def sign_lock(file: int) -> None:
    """Write into a locked file which process holds it, and since when; on a full disk the lock holds without."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)


def _holder(file: int) -> str | None:
    """Who says to hold a locked file; None where nobody does, or somebody who is no more."""
    text = os.pread(file, 200, 0).decode("utf-8", "replace").strip()
    found = re.fullmatch(r"process (\d+) on (\S+) since .*", text)
    if found is None:
        return None
    if found[2] == socket.gethostname():
        try:
            os.kill(int(found[1]), 0)
        except (ProcessLookupError, OverflowError):
            return None
        except PermissionError:
            pass
    return text


def write_parquet(table: pa.Table, path: Path) -> None:
    """One Parquet file, committed atomically; the same table gives the same bytes."""
    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd", row_group_size=1 << 17)


class Run:
    """One run directory: its manifest, its tables, and which stages are done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {"format": FORMAT, "tool": __version__, "stages": {}, "files": {}}

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run.

        Raises:
            RunError: there is no run at `path`, or its manifest cannot be read.
        """
        run = cls(path)
        manifest = path / MANIFEST
        if not manifest.exists():
            raise RunError(
                f"{path} is not a run: it has no {MANIFEST}",
                "nc-audit score DATASET makes one; nc-audit runs lists them",
            )
        try:
            run.manifest = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise RunError(
                f"{manifest} is not readable: {problem}", "score the dataset again with --force"
            ) from problem
        stages = run.manifest.get("stages") if isinstance(run.manifest, dict) else None
        files = run.manifest.get("files") if isinstance(run.manifest, dict) else None
        if (
            not isinstance(stages, dict)
            or not isinstance(files, dict)
            or run.manifest.get("format") != FORMAT
        ):
            raise RunError(
                f"{manifest} has another format than {FORMAT}", "use the version of nc-audit that wrote it"
            )
        return run

    @classmethod
    def latest(cls, runs: Path = RUNS) -> Run:
        """The run that was scored last under `runs`.

        Raises:
            RunError: nothing was scored there yet.
        """
        pointer = runs / LATEST
        if not (pointer / MANIFEST).exists():
            raise RunError(f"no run yet under {runs}/", "nc-audit score DATASET, or name one with --run DIR")
        target = pointer.resolve()
        is_sibling = target.parent == runs.resolve()
        return cls.open(runs / target.name if is_sibling else target)

    def save(self) -> None:
        """Replace the manifest atomically."""
        with replacing(self.path / MANIFEST) as partial:
            partial.write_text(
                json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    def decided(self, decision: str) -> list[str]:
        """Ids, sorted, of the pairs on which people decided so; a pair's last decision that was not undone stands.

        Raises:
            RunError: a line of decisions.jsonl is no decision.
        """
        standing, _ = read_decisions(self.path)
        return sorted(pair_id for pair_id, one in standing.items() if one.decision == decision)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The run, to be written to by this process alone.

        Raises:
            RunError: another process holds it. DiskError: there is no room for the lock.
        """
        lock = self.path / LOCK
        with writing(lock):
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            take_lock(file, fcntl.LOCK_EX, str(self.path), "wait for it, or score into another --out")
            sign_lock(file)
            try:
                yield
            finally:
                os.ftruncate(file, 0)
        finally:
            os.close(file)

    def check_free(self) -> None:
        """Whether this process could write to the run: its lock, where it has one, is taken and given back.

        Raises:
            RunError: another process holds it. DiskError: there is no room for the lock.
        """
        if (self.path / LOCK).exists():
            with ExitStack() as held:
                held.enter_context(self.locked())

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The run while nobody writes to it, for seconds, to read several of its tables as they belong together.

        Raises:
            RunError: another process writes to it.
        """
        try:
            file = os.open(self.path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # Never locked, or not ours to lock, as a run on a disk that is only read: so nobody writes to it here.
            yield
            return
        try:
            take_lock(file, fcntl.LOCK_SH, str(self.path), "wait for it")
            self.manifest = Run.open(self.path).manifest
            yield
        finally:
            os.close(file)

    def is_done(self, stage: str, key: str) -> bool:
        """Whether the manifest lists the stage under this key and its files are as recorded."""
        entry = self.manifest["stages"].get(stage)
        if not entry or entry["key"] != key:
            return False
        return all(self._is_intact(name) for name in entry["files"])

    def _is_intact(self, name: str) -> bool:
        path, known = self.path / name, self.manifest["files"].get(name)
        return known is not None and path.is_file() and file_digest(path) == known["sha256"]

    def stage(self, name: str) -> dict[str, Any]:
        """What the manifest says of a finished stage.

        Raises:
            RunError: the stage is not done.
        """
        entry = self.manifest["stages"].get(name)
        if not entry:
            dataset = self.manifest.get("dataset", {}).get("path", "DATASET")
            raise RunError(
                f"{self.path}: stage {name} is not done",
                f"nc-audit score {dataset} --out {self.path} resumes it",
            )
        return entry

    def commit(self, stage: str, key: str, files: Mapping[str, int], seconds: float, **facts: Any) -> None:
        """Record a finished stage with its files (name and row count), forgetting the stages that came after."""
        for name, rows in files.items():
            path = self.path / name
            self.manifest["files"][name] = {
                "rows": rows,
                "bytes": path.stat().st_size,
                "sha256": file_digest(path),
            }
        self.manifest["stages"][stage] = {
            "key": key,
            "files": list(files),
            "seconds": round(seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **facts,
        }
        self.save()

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A table of the run (`pairs`, `scores`, `tags`), checked against its schema unless `columns` are named.

        Raises:
            RunError: the table is not there, or lacks one of the `columns`.
        """
        path = self.path / f"{name}.parquet"
        if not path.is_file():
            dataset = self.manifest.get("dataset", {}).get("path", "DATASET")
            raise RunError(
                f"{self.path} has no {name}.parquet", f"nc-audit score {dataset} --out {self.path} makes it"
            )
        missing = sorted({*(columns or ())} - {*pq.read_schema(path).names})
        if missing:
            raise RunError(
                f"{path} has no column {', '.join(missing)}", "score the dataset again with --force"
            )
        table = pq.read_table(path, columns=columns)
        return table if columns else check_table(name, table)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write `name`.parquet atomically, after a check against its schema."""
        write_parquet(check_table(name, table), self.path / f"{name}.parquet")


def remember_latest(path: Path, runs: Path = RUNS) -> None:
    """Make `path` the run that the commands without --run take: the symbolic link `runs/latest`."""
    with writing(runs / LATEST):
        runs.mkdir(parents=True, exist_ok=True)
        partial = runs / f".{LATEST}.{os.getpid()}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(os.path.relpath(path.resolve(), runs.resolve()), target_is_directory=True)
        partial.replace(runs / LATEST)


def list_runs(runs: Path = RUNS) -> list[Run]:
    """The runs in a folder, by name; unreadable ones are left out."""
    found = []
    for manifest in sorted(runs.glob(f"*/{MANIFEST}")):
        if manifest.parent.name == LATEST:
            continue
        try:
            found.append(Run.open(manifest.parent))
        except RunError:
            continue
    return found
