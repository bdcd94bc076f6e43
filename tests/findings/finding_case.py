"""A set of pairs without faults, whose parts tests change before they look for findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nc_audit.findings import Vectors, find_all
from nc_audit.schema import PAIRS, check_table
from nc_audit.unlikely_words import WordMaps

NUM, DIM = 400, 32


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Case:
    """A set of images with one good caption each; tests change its parts before they look for findings."""

    def __init__(self, num: int = NUM, per_image: int = 1, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.image_embedding = draw.normal(size=(num, 64)).astype(np.float32)
        self.image = unit(draw.normal(size=(num, DIM)))
        self.row_image = np.repeat(np.arange(num), per_image)
        rows = num * per_image
        self.caption = unit(self.image[self.row_image] + 0.12 * draw.normal(size=(rows, DIM)))
        self.row_caption = np.arange(rows)
        self.noise = np.full(rows, 0.02)
        self.captions: list[str | None] = [f"a drawn picture of thing {row}" for row in range(rows)]
        self.names = [f"images/{image}.png" for image in self.row_image.tolist()]
        self.splits: list[str | None] = [None] * rows
        self.status = ["ok"] * rows
        self.hashes = dict(enumerate(draw.integers(0, 2**63, num).tolist()))

    def pairs(self) -> pa.Table:
        values: dict[str, list[Any]] = {
            "row": list(range(len(self.names))),
            "pair_id": [f"p{row}" for row in range(len(self.names))],
            "image": self.names,
            "caption": self.captions,
            "split": self.splits,
            "source": ["captions.csv"] * len(self.names),
            "status": self.status,
        }
        return pa.table(
            [pa.array(values.get(f.name, [None] * len(self.names)), f.type) for f in PAIRS], schema=PAIRS
        )

    @property
    def vectors(self) -> Vectors:
        is_ok = np.array([status == "ok" for status in self.status])
        return Vectors(
            np.where(is_ok, self.row_image, -1),
            np.where(is_ok, self.row_caption, -1),
            self.image_embedding,
            self.image,
            self.caption,
            np.where(is_ok, self.noise, np.nan),
        )

    def find(self, image_rank: np.ndarray | None = None, is_cut: Sequence[bool] = ()) -> list[dict[str, Any]]:
        is_ok = np.array([status == "ok" for status in self.status])
        rank = np.ones(len(self.names), np.int64) if image_rank is None else image_rank
        found = find_all(self.pairs(), self.vectors, rank, self.hashes.get, is_cut, self.unlikely(is_ok))
        assert not found.capped
        return check_table("findings", found.table(self.pairs())).to_pylist()

    def unlikely(self, is_ok: np.ndarray) -> dict[int, str]:
        """What is told of rows, as the score stage makes it of distinct pairs."""
        texts = {caption: text or "" for caption, text in zip(self.row_caption, self.captions, strict=True)}
        captions = [texts.get(number, "") for number in range(len(self.caption))]
        rows = np.flatnonzero(is_ok)
        both = np.stack([self.row_image[rows], self.row_caption[rows]], 1)
        both, first, pair_of_row = np.unique(both, axis=0, return_index=True, return_inverse=True)
        found = WordMaps(self.image_embedding, *both.T, captions, 1 - self.noise[rows[first]]).given
        return {
            row: found.told(pair, captions[self.row_caption[row]])
            for row, pair in zip(rows.tolist(), pair_of_row.ravel().tolist(), strict=True)
            if found.is_named[pair] and self.noise[row] < 0.5
        }


def told(findings: Sequence[dict[str, Any]], kind: str) -> dict[int, str]:
    return {one["row"]: one["detail"] for one in findings if one["kind"] == kind}
