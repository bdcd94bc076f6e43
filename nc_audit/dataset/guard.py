"""Formulas in csv: what a spreadsheet would run is written with a leading apostrophe, and read without it.

The apostrophe goes before every cell that begins with =, +, -, @, a tab or a line break, after any apostrophes of its
own, so that taking one away gives back exactly what was there. It is taken away only from a csv that is known to be
an export of ours: `export.json` stands beside it and names it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")  # the last four are full-width
_GUARDED = re.compile("'+[=+\\-@\t\r\n＝＋－＠]")

MARKER = "export.json"
MADE_BY = "nc-audit export"
_MAX_MARKER = 1 << 28


def guard(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula.

    Example:
        >>> guard("=1+1"), guard("a = b"), guard("'=1")
        ("'=1+1", 'a = b', "''=1")
    """
    return f"'{cell}" if _FORMULA.match(cell) else cell


def unguard(cell: str) -> str:
    """What `guard` was given.

    Example:
        >>> unguard("'=1+1"), unguard("'tis"), unguard("''=1")
        ('=1+1', "'tis", "'=1")
    """
    return cell[1:] if _GUARDED.match(cell) else cell


def marker_of(folder: Path) -> dict[str, Any] | None:
    """What `export.json` says when the folder is an export of ours; None when it is none."""
    path = folder / MARKER
    try:
        if not path.is_file() or path.stat().st_size > _MAX_MARKER:
            return None
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(marker, dict) and marker.get("made_by") == MADE_BY
    return marker if is_ours and isinstance(marker.get("files"), list) else None


def is_guarded(path: Path) -> bool:
    """Whether a csv is part of an export of ours."""
    marker = marker_of(path.parent)
    return marker is not None and marker.get("format") == "csv" and path.name in marker["files"]


def lists_of(folder: Path) -> set[str]:
    """The files of an export of ours that speak about it; no dataset, whatever is in them."""
    lists = {"dropped.csv", "rematches.csv", "croissant.json", MARKER}
    return lists if marker_of(folder) is not None else set()


def data_files(folder: Path) -> list[tuple[str, str | None]]:
    """The files of an export of ours that state its pairs, with the split of each; none for any other folder.

    Only names of files that lie in the folder itself are believed.
    """
    marker = marker_of(folder)
    found = marker.get("data") if marker else None
    if not isinstance(found, list):
        return []
    files: list[tuple[str, str | None]] = []
    for entry in found:
        name = entry.get("file") if isinstance(entry, dict) else None
        split = entry.get("split") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(split, str | None) or "\0" in name:
            return []
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return []
        files.append((name, split))
    return files
