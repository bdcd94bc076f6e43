"""Subsets of a dataset: what the card in its `README.md` lists under `configs`, as the hub keeps them.

A card names a subset, its files by split (paths and patterns below the folder), and perhaps which subset is the
default one. Without it the files of all subsets would be read as one dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nc_audit.errors import DatasetError, nearest

CARD = "README.md"
_MAX_CARD = 1 << 22
_HEAD = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Subset:
    """One entry of `configs`: its patterns with the split each belongs to, in the card's order."""

    name: str
    patterns: tuple[tuple[str | None, str], ...]
    is_default: bool

    def files(self, names: list[str]) -> list[tuple[str, str | None]]:
        """Those of the folder's files that it names, with their splits, each once, in the card's order.

        Args:
            names: every file below the folder, relative to it.
        """
        found: dict[str, str | None] = {}
        parts = [name.split("/") for name in names]
        for split, pattern in self.patterns:
            wanted = pattern.split("/")
            for name, of_name in zip(names, parts, strict=True):
                if _fits(of_name, wanted):
                    found.setdefault(name, split)
        return list(found.items())


def subsets_of(folder: Path) -> list[Subset]:
    """The subsets that a folder's card lists; none where it has no card, or one that lists none."""
    card = folder / CARD
    try:
        if not card.is_file() or card.stat().st_size > _MAX_CARD:
            return []
        head = _HEAD.match(card.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []
    if head is None:
        return []
    import yaml

    try:
        facts = yaml.safe_load(head[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    listed = facts.get("configs") if isinstance(facts, dict) else None
    return [subset for entry in listed if (subset := _subset(entry))] if isinstance(listed, list) else []


def choose(folder: Path, subsets: list[Subset], wanted: str | None) -> tuple[Subset | None, list[str]]:
    """The subset to read, and what to tell: the one wanted, else the default one, else the only one.

    Raises:
        DatasetError: the one wanted is not listed, or there are several and none is the default one.
    """
    names = [subset.name for subset in subsets]
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if wanted is not None:
        for subset in subsets:
            if subset.name == wanted:
                return subset, []
        if not subsets:
            raise DatasetError(
                f"{folder} has no subset {wanted!r}: its {CARD} lists none under configs",
                "leave --subset out",
            )
        raise DatasetError(f"{folder} has no subset {wanted!r}", nearest(wanted, names))
    if len(subsets) < 2:
        return (subsets[0] if subsets else None), []
    default = [one for one in subsets if one.is_default] or [one for one in subsets if one.name == "default"]
    if not default:
        raise DatasetError(
            f"{folder} has {len(subsets)} subsets: {listed}",
            f"name one, for instance --subset {names[0]}",
            candidates=names,
        )
    others = ", ".join(name for name in names[:20] if name != default[0].name)
    return default[0], [f"the subset {default[0].name} is read; --subset reads another: {others}"]


def files_below(folder: Path) -> list[str]:
    """Every file below a folder, relative to it, by name; hidden ones and hidden folders left out."""

    def walk() -> Iterator[str]:
        for place, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if not name.startswith("."):
                    yield Path(place, name).relative_to(folder).as_posix()

    return sorted(walk())


def _subset(entry: Any) -> Subset | None:
    if not isinstance(entry, dict):
        return None
    name, below = _word(entry.get("config_name", "default")), entry.get("data_dir")
    patterns = list(_patterns(entry.get("data_files")))
    prefix = f"{below.strip('/')}/" if isinstance(below, str) and below.strip("./") else ""
    if not patterns and prefix:
        patterns = [(None, "**")]
    return (
        None
        if name is None
        else Subset(
            name,
            tuple((split, prefix + pattern.removeprefix("./")) for split, pattern in patterns),
            entry.get("default") is True,
        )
    )


def _word(value: Any) -> str | None:
    """A name as the card writes it; numbers are what YAML makes of names such as 2014."""
    return str(value) if isinstance(value, str | int | float) else None


def _patterns(value: Any, split: str | None = None) -> Iterator[tuple[str | None, str]]:
    """`data_files` in any of its shapes: a pattern, a list of them, or entries with a split and a path."""
    if isinstance(value, str):
        yield split, value
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, str):
                yield split, one
            elif isinstance(one, dict) and split is None:
                yield from _patterns(one.get("path"), _word(one.get("split")) or "train")
    elif isinstance(value, dict) and split is None:
        for name, one in value.items():
            yield from _patterns(one, _word(name) or "train")


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern: `*`, `?` and `[` within a part, `**` over any number.

    All places in the pattern that the parts so far can lead to are followed at once, so that no pattern takes long.

    Example:
        >>> _fits(["data", "a", "train-0.csv"], ["data", "**", "train-*"]), _fits(["data", "a", "b"], ["data", "*"])
        (True, False)
    """

    def with_skipped(places: set[int]) -> set[int]:
        for at in sorted(places):
            while at < len(pattern) and pattern[at] == "**":
                places.add(at := at + 1)
        return places

    places = with_skipped({0})
    for part in name:
        reached = set()
        for at in places:
            if at < len(pattern):
                if pattern[at] == "**":
                    reached.add(at)
                elif fnmatchcase(part, pattern[at]):
                    reached.add(at + 1)
        places = with_skipped(reached)
    return len(pattern) in places
