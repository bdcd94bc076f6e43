"""The distinct ok pairs of a run in the order people see them, fetched a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.errors import DatasetError, nearest
from nc_audit.report.joined import joined
from nc_audit.report.text import plain
from nc_audit.run import Run
from nc_audit.schema import TAGS_KNOWN
from nc_audit.tag import model_tags

_PAIRS = ["pair_id", "image_id", "image", "image_uri", "caption", "split", "status", "duplicate_of"]
_SCORES = [
    "noise_probability",
    "noise_score",
    "best_caption",
    "best_caption_margin",
    "best_image",
    "best_image_margin",
]


@dataclass(frozen=True)
class ReviewPair:
    """One distinct pair as a reviewer sees it; numbers that are missing are None.

    Attributes:
        at: position in the queue, 0-based.
        row: row of its first copy in the input; `copies` rows hold it.
        tag: what the model says, whatever people decided since.
        probability: noise probability, 0..1.
        reasons: what stands in the tags, strongest first.
        best_caption: fits the image best by the model; margins are cosines, -2..2.
    """

    at: int
    pair_id: str
    row: int
    copies: int
    image_id: str
    image: str
    caption: str
    split: str | None
    tag: str | None
    probability: float | None
    reasons: list[str]
    best_caption: str | None
    best_caption_margin: float | None
    best_image: str | None
    best_image_id: str | None
    best_image_margin: float | None


class Queue:
    """The pairs of a review: all, those of some tags, or a given sample, worst first unless it is a sample.

    Attributes:
        at: position by pair_id.
        uri_of: where the bytes of an image of this run are, by image_id.
        num_tagged: distinct ok pairs of the whole run by the model's tag.
        population: their ids, sorted.
    """

    def __init__(self, run: Run, tags: Sequence[str] | None = None) -> None:
        for tag in tags or ():
            if tag not in TAGS_KNOWN:
                raise DatasetError(f"--tag: there is no tag {plain(tag)!r}", nearest(tag, TAGS_KNOWN))
        table = joined(run, pairs=_PAIRS, scores=_SCORES, tags=["reasons"])
        table = table.append_column("tag", model_tags(run))
        table = table.filter(pc.equal(table["status"], "ok"))
        first = pc.coalesce(table["duplicate_of"], table["row"]).to_numpy()
        distinct, copies = np.unique(first, return_counts=True)
        with_image = table.select(["image_id", "image_uri"])
        self.uri_of: dict[str, str] = dict(
            zip(with_image["image_id"].to_pylist(), with_image["image_uri"].to_pylist(), strict=True)
        )
        self._id_of: dict[str, str] | None = None
        self._names = table.select(["image", "image_id"])
        table = table.filter(pc.is_null(table["duplicate_of"]))
        number = copies[np.searchsorted(distinct, table["row"].to_numpy())]
        table = table.append_column("copies", pa.array(number, pa.int64()))
        counts = {one["values"]: one["counts"] for one in pc.value_counts(table["tag"]).to_pylist()}
        self.num_tagged = {tag: counts.get(tag, 0) for tag in TAGS_KNOWN}
        self.population: list[str] = sorted(table["pair_id"].to_pylist())
        self._all = table
        wanted = (
            table if not tags else table.filter(pc.is_in(table["tag"], value_set=pa.array(tags, pa.string())))
        )
        order = [("noise_probability", "descending"), ("noise_score", "descending"), ("row", "ascending")]
        self._show(wanted.take(pc.sort_indices(wanted, sort_keys=order)))

    def only(self, pair_ids: Sequence[str]) -> None:
        """Show these pairs, in this order, and no others."""
        self._show(self._all.take(self._places(pair_ids)))

    def tag_of(self, pair_ids: Sequence[str]) -> list[str | None]:
        """The model's tags of pairs of the run; None for what is no pair of it."""
        return self._all["tag"].take(self._places(pair_ids)).to_pylist()

    def _places(self, pair_ids: Sequence[str]) -> pa.Array:
        return pc.index_in(pa.array(pair_ids, pa.string()), value_set=self._all["pair_id"].combine_chunks())

    def _show(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self.pair_ids: list[str] = self._table["pair_id"].to_pylist()
        self.at = {pair_id: at for at, pair_id in enumerate(self.pair_ids)}

    def __len__(self) -> int:
        return len(self.pair_ids)

    def page(self, start: int, count: int) -> list[ReviewPair]:
        """Pairs from a position on; fewer at the end."""
        rows = self._table.slice(max(0, start), max(0, count)).to_pylist()
        return [self._pair(max(0, start) + at, row) for at, row in enumerate(rows)]

    def _pair(self, at: int, row: dict[str, Any]) -> ReviewPair:
        better = row["best_image"]
        return ReviewPair(
            at=at,
            pair_id=row["pair_id"],
            row=row["row"],
            copies=row["copies"],
            image_id=row["image_id"],
            image=row["image"] or "",
            caption=row["caption"] or "",
            split=row["split"],
            tag=row["tag"],
            probability=_finite(row["noise_probability"]),
            reasons=row["reasons"] or [],
            best_caption=row["best_caption"],
            best_caption_margin=_finite(row["best_caption_margin"]),
            best_image=better,
            best_image_id=None if better is None else self._image_id(better),
            best_image_margin=_finite(row["best_image_margin"]),
        )

    def _image_id(self, name: str) -> str | None:
        if self._id_of is None:
            names, ids = (self._names[column].to_pylist() for column in ("image", "image_id"))
            self._id_of = dict(zip(reversed(names), reversed(ids), strict=True))
        return self._id_of.get(name)


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 6)
