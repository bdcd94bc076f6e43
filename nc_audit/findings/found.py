"""What the searches see, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa

from nc_audit.schema import FINDING_KINDS, FINDINGS

_AT_ONCE = 1024  # pairs: their vectors stay in the cache


@dataclass
class Found:
    """Findings as they come in, and notes on searches that were capped."""

    rows: list[tuple[int, str, int | None, str, float | None]] = field(default_factory=list)
    capped: list[str] = field(default_factory=list)

    def add(
        self, kind: str, row: int, detail: str, partner: int | None = None, probability: float | None = None
    ) -> None:
        """One finding about one row."""
        self.rows.append((int(row), kind, None if partner is None else int(partner), detail, probability))

    def table(self, pairs: pa.Table) -> pa.Table:
        """The `findings` table, by kind in the order of `schema.FINDING_KINDS`, then by row."""
        order = {kind: at for at, kind in enumerate(FINDING_KINDS)}
        rows = sorted(self.rows, key=lambda one: (order[one[1]], one[0], one[2] or -1, one[3]))
        row = pa.array([one[0] for one in rows], pa.int64())
        return pa.table(
            [
                pairs["pair_id"].take(row),
                row,
                pa.array([one[1] for one in rows], pa.string()),
                pa.array([one[2] for one in rows], pa.int64()),
                pa.array([one[3] for one in rows], pa.string()),
                pa.array([FINDING_KINDS[one[1]][0] for one in rows], pa.string()),
                pa.array([one[4] for one in rows], pa.float32()),
            ],
            schema=FINDINGS,
        )


@dataclass(frozen=True)
class Vectors:
    """What the searches see; rows of `row_image` and `row_caption` (shape [N]) are -1 where a row is not ok.

    `image_embedding` [I, D] tells images apart; `image` [I, D] and `caption` [C, D] are unit vectors of the heads;
    `noise_probability` [N], not a number where a row is not ok.
    """

    row_image: np.ndarray
    row_caption: np.ndarray
    image_embedding: np.ndarray
    image: np.ndarray
    caption: np.ndarray
    noise_probability: np.ndarray


def rows_of(index_N: np.ndarray, num: int) -> list[np.ndarray]:
    """Rows of each index 0..num-1, ascending; -1 is nobody's."""
    order = np.argsort(index_N, kind="stable")
    borders = np.searchsorted(index_N[order], np.arange(num + 1))
    return [order[low:high] for low, high in pairwise(borders.tolist())]


def cosines(vectors: Vectors, image: np.ndarray, caption: np.ndarray) -> np.ndarray:
    """Cosine of each image with the caption beside it, in blocks."""
    parts = [
        np.einsum("nd,nd->n", vectors.image[image[some]], vectors.caption[caption[some]])
        for some in (slice(at, at + _AT_ONCE) for at in range(0, len(image), _AT_ONCE))
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def usual_agreement(vectors: Vectors) -> float:
    """Mean cosine of two captions drawn at random."""
    if len(vectors.caption) < 2:
        return -1.0
    return float(np.square(np.linalg.norm(vectors.caption.mean(0))))
