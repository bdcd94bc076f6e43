"""The decision file of a run, written to: appended under a lock, flushed to the disk before anybody is told.

A line, once there, is never changed. Several servers may hold the same file open; each sees the others' lines.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nc_audit.decisions import DECISIONS, FILE, UNDO
from nc_audit.errors import RunError

Entry = dict[str, Any]


class Journal:
    """What stands in a decision file, by pair and by reviewer, kept up to date with the file.

    The meaning is that of `decisions.effective_decisions`: the last decision of a pair that was not undone stands.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FILE
        self.num_torn = 0
        self._lock = threading.RLock()
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._offset = self._number = self.num_torn = 0
        self._standing: dict[str, list[Entry]] = {}
        self._order: dict[str, list[str]] = {}
        self._first: dict[tuple[str, str], Entry] = {}

    def refresh(self) -> None:
        """Read what was added since the last time, by us or by others.

        Raises:
            RunError: a line is JSON but no decision.
        """
        with self._lock:
            try:
                with self.path.open("rb") as handle:
                    if os.fstat(handle.fileno()).st_size < self._offset:
                        self._forget()
                    handle.seek(self._offset)
                    added = handle.read()
            except FileNotFoundError:
                self._forget()
                return
            whole, newline, rest = added.rpartition(b"\n")
            if newline:
                for line in whole.split(b"\n"):
                    self._take(line)
                self._offset += len(whole) + 1
            # The last line of a file mended by hand may lack its line feed; a torn one waits for its end.
            if rest and _parsed(rest) is not None:
                self._take(rest)
                self._number -= 1
                self._offset += len(rest)

    def append(self, entries: Sequence[Entry]) -> None:
        """Add lines; when this returns they are on the disk, all of them, or none on an error.

        Raises:
            OSError: the file cannot be written.
        """
        lines = "".join(json.dumps(entry, ensure_ascii=True) + "\n" for entry in entries).encode("ascii")
        with self._lock, _opened(self.path) as file:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                lines = b"\n" + lines
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
            self.refresh()

    def standing(self, pair_id: str) -> Entry | None:
        """The decision that stands for a pair, whoever took it."""
        entries = self._standing.get(pair_id)
        return entries[-1] if entries else None

    def by_reviewer(self, pair_id: str) -> dict[str, Entry]:
        """The standing decision of each reviewer of a pair, in the order of the file."""
        last = {entry["reviewer"]: entry for entry in self._standing.get(pair_id, ())}
        return dict(sorted(last.items(), key=lambda item: item[1]["line"]))

    def first_of(self, pair_id: str, reviewer: str) -> Entry | None:
        """What a reviewer decided about a pair at first, undone or not."""
        return self._first.get((pair_id, reviewer))

    def in_conflict(self, pair_id: str) -> bool:
        """Whether reviewers disagree about a pair: another decision, or another caption."""
        if len(self._standing.get(pair_id, ())) < 2:
            return False
        return len({(e["decision"], e.get("caption")) for e in self.by_reviewer(pair_id).values()}) > 1

    def decided(self) -> list[str]:
        """Ids of the pairs about which a decision stands, in the order of the file."""
        return [pair_id for pair_id, entries in self._standing.items() if entries]

    def last_of(self, reviewer: str, among: Sequence[str] | set[str] | dict[str, int]) -> str | None:
        """The pair, of those given, about which a reviewer decided last."""
        return next((one for one in reversed(self._order.get(reviewer, [])) if one in among), None)

    def _take(self, line: bytes) -> None:
        self._number += 1
        if not line.strip():
            return
        entry = _parsed(line)
        if entry is None:
            self.num_torn += 1
            return
        entry = _checked(entry, f"{self.path}: line {self._number:,}") | {"line": self._number}
        pair_id, reviewer = entry["pair_id"], entry["reviewer"]
        entries, order = self._standing.setdefault(pair_id, []), self._order.setdefault(reviewer, [])
        if entry["decision"] != UNDO:
            entries.append(entry)
            order.append(pair_id)
            self._first.setdefault((pair_id, reviewer), entry)
            return
        own = [at for at, earlier in enumerate(entries) if earlier["reviewer"] == reviewer]
        if own:
            del entries[own[-1]]
            del order[len(order) - 1 - order[::-1].index(pair_id)]


def _parsed(line: bytes) -> Any:
    """The JSON value of a line; None where it is torn."""
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _checked(entry: Any, where: str) -> Entry:
    hint = "mend the line; nothing was changed"
    if not isinstance(entry, dict) or not isinstance(entry.get("pair_id"), str):
        raise RunError(f"{where} is no decision: it needs pair_id and decision", hint)
    if entry.get("decision") not in (*DECISIONS, UNDO):
        raise RunError(f"{where} is no decision: it needs pair_id and decision", hint)
    caption = entry.get("caption")
    if entry["decision"] in ("fix", "rematch") and not (isinstance(caption, str) and caption.strip()):
        raise RunError(f"{where}: {entry['decision']} without a caption", hint)
    if entry["decision"] not in ("fix", "rematch"):
        entry = {name: value for name, value in entry.items() if name != "caption"}
    return entry | {"reviewer": str(entry.get("reviewer") or ""), "time": str(entry.get("time") or "")}


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file, open to be appended to, for this process alone."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_size == 0:
            # A new file is only safe once its folder names it on the disk.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        yield file
    finally:
        os.close(file)
