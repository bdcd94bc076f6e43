"""The folder of an export: whose it is, and how it is replaced as a whole.

An export is written into a hidden folder beside its place and takes the place by renaming, so that a reader sees the
old export or the new one and a killed export leaves nothing behind but that hidden folder, which the next one reuses.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nc_audit.dataset.guard import MADE_BY, MARKER, marker_of
from nc_audit.errors import DatasetError
from nc_audit.run import no_room, sign_lock, take_lock, writing

_MANY_FILES = 500


def write_marker(folder: Path, **facts: Any) -> None:
    """Say that the folder is a finished export, and which files are its own; the last file to be written."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    document = {"made_by": MADE_BY, **facts, "files": sorted([*names, MARKER])}
    (folder / MARKER).write_text(json.dumps(document, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


def check_place(out: Path, *, overwrite: bool, keep: Sequence[Path]) -> None:
    """Nothing, when an export may be written at `out`.

    It may when nothing is there, when the folder is empty or holds an earlier export and nothing else, or when
    `overwrite` says so.

    Args:
        out: the folder to be.
        overwrite: replace whatever is there.
        keep: folders that are never replaced, nor one that holds them: the run, the dataset, the working folder.

    Raises:
        DatasetError: it may not.
    """
    place = out.resolve()
    for folder in keep:
        if folder.resolve().is_relative_to(place):
            raise DatasetError(f"{out} cannot be replaced: it holds {folder}", "give another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise DatasetError(f"{out} is a file, not a folder", "give another --out")
    foreign = _foreign_files(out)
    if foreign and not overwrite:
        raise DatasetError(
            f"{out} holds files that are not of an earlier export: {len(foreign):,}, such as {foreign[0]!r}",
            "give another --out, or --overwrite to delete all that is there",
        )


def _foreign_files(folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    marker = marker_of(folder)
    if marker is None:
        return names
    own = {name for name in marker["files"] if isinstance(name, str)}
    return [name for name in names if name not in own]


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """An empty folder to write to; on success it takes the place of `out`, on failure it is removed.

    Raises:
        RunError: another process exports to the same place.
        DatasetError: the folder cannot be made.
        DiskError: there is no room for what is written to it.
    """
    place = out.resolve()
    partial, old = (place.with_name(f".{place.name}.{kind}") for kind in ("partial", "old"))
    with _held(place, out), writing(out):
        try:
            partial.mkdir(exist_ok=True)
            if partial.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, "it is a link")
        except OSError as problem:
            if no_room(problem):
                raise
            raise DatasetError(
                f"{partial} cannot be made: {problem.strerror}", "give another --out"
            ) from problem
        _clear(partial)
        try:
            yield partial
            _sync(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        partial.rename(place)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _held(place: Path, out: Path) -> Iterator[None]:
    """The place, for this process alone, by a file beside it that says who holds it."""
    lock = place.with_name(f".{place.name}.lock")
    while True:
        try:
            with writing(lock):
                place.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as problem:
            raise DatasetError(
                f"{lock} cannot be made: {problem.strerror}", "give another --out"
            ) from problem
        try:
            take_lock(file, fcntl.LOCK_EX, str(out), "wait for it, or give another --out")
            with suppress(FileNotFoundError):
                # Who held it before may have taken the file away between our opening and locking it.
                if os.path.samestat(os.fstat(file), lock.stat()):
                    sign_lock(file)
                    try:
                        yield
                    finally:
                        lock.unlink(missing_ok=True)
                    return
        finally:
            os.close(file)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) > _MANY_FILES:
        # One by one, a hundred thousand small images would take minutes.
        os.sync()
        return
    for path in files:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
