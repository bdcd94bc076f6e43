"""The folder of an export: whose it is, and how it is replaced as a whole.

An export is written into a hidden folder beside its place and takes the place by renaming, so that a reader sees the
old export or the new one and a killed export leaves nothing behind but that hidden folder, which the next one reuses.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nc_audit.dataset.guard import MADE_BY, MARKER, marker_of
from nc_audit.errors import DatasetError, RunError

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
    """
    place = out.resolve()
    partial, old = (place.with_name(f".{place.name}.{kind}") for kind in ("partial", "old"))
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as problem:
        raise DatasetError(f"{partial} cannot be made: {problem.strerror}", "give another --out") from problem
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise RunError(
                f"another process exports to {out}", "wait for it, or give another --out"
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
    finally:
        os.close(lock)


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
