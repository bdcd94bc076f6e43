"""Images that are there twice, or look as if they were, and what follows; images under too many captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nc_audit.findings.found import Found, Vectors, rows_of, usual_agreement

if TYPE_CHECKING:
    pass

PLACEHOLDER = 10  # captions at least
COPIED = 10  # images at least


def duplicates(
    found: Found,
    vectors: Vectors,
    names: Sequence[str | None],
    splits: Sequence[str | None],
    near: Sequence[tuple[int, int]],
) -> None:
    """Equal and near-equal images under other names, across splits, and with captions that disagree."""
    rows_of_image = rows_of(vectors.row_image, len(vectors.image))
    usual = usual_agreement(vectors)

    def leak(row: int, other: int, how: str) -> None:
        found.add(
            "leakage",
            row,
            f"{how} {names[other]} (row {other:,}), which is in split {splits[other]}, this row in {splits[row]}",
            other,
        )

    for rows in rows_of_image:
        first_by_name: dict[str | None, int] = {}
        first_by_split: dict[str | None, int] = {}
        for row in rows.tolist():
            first_by_name.setdefault(names[row], row)
            if splits[row]:
                first_by_split.setdefault(splits[row], row)
        if len(first_by_name) > 1:
            first = int(rows[0])
            for row in rows.tolist():
                if names[row] != names[first]:
                    found.add("duplicate_image", row, f"image equals {names[first]} (row {first:,})", first)
            groups = [rows[[names[r] == name for r in rows.tolist()]] for name in first_by_name]
            _contradictions(found, vectors, names, groups[0], groups[1:], usual)
        if len(first_by_split) > 1:
            firsts = list(first_by_split.values())
            for row in rows.tolist():
                other = next((one for one in firsts if splits[one] != splits[row]), None)
                if splits[row] and other is not None:
                    leak(row, other, "image equals")
    for a, b in near:
        first, second = int(rows_of_image[a][0]), int(rows_of_image[b][0])
        for rows, other in ((rows_of_image[a], second), (rows_of_image[b], first)):
            for row in rows.tolist():
                found.add(
                    "near_duplicate_image", row, f"image looks like {names[other]} (row {other:,})", other
                )
                if splits[row] and splits[other] and splits[row] != splits[other]:
                    leak(row, other, "image looks like")
        _contradictions(found, vectors, names, rows_of_image[a], [rows_of_image[b]], usual)


def _contradictions(
    found: Found,
    vectors: Vectors,
    names: Sequence[str | None],
    rows: np.ndarray,
    others: Sequence[np.ndarray],
    usual: float,
) -> None:
    """Captions of the same picture that agree no better than any two captions of the set."""
    for other in others:
        cosine = vectors.caption[vectors.row_caption[rows]] @ vectors.caption[vectors.row_caption[other]].T
        for mine, theirs, best in ((rows, other, cosine.max(1)), (other, rows, cosine.max(0))):
            partner = int(theirs[0])
            for row in mine[best <= usual].tolist():
                found.add(
                    "contradicting_captions",
                    row,
                    f"image equals {names[partner]} (row {partner:,}), whose captions disagree",
                    partner,
                )


def crowded(found: Found, vectors: Vectors) -> None:
    """Images under unusually many captions, captions over many images."""
    is_ok = vectors.row_image >= 0
    if not is_ok.any():
        return
    distinct = np.unique(np.stack([vectors.row_image[is_ok], vectors.row_caption[is_ok]]), axis=1)
    captions_I = np.bincount(distinct[0], minlength=len(vectors.image))
    images_C = np.bincount(distinct[1], minlength=len(vectors.caption))
    many = max(PLACEHOLDER, 4 * float(np.median(captions_I[captions_I > 0])))
    rows_of_image = rows_of(vectors.row_image, len(vectors.image))
    for image in np.flatnonzero(captions_I >= many).tolist():
        for row in rows_of_image[image].tolist():
            found.add("placeholder_image", row, f"image carries {captions_I[image]:,} different captions")
    rows_of_caption = rows_of(vectors.row_caption, len(vectors.caption))
    for caption in np.flatnonzero(images_C >= COPIED).tolist():
        for row in rows_of_caption[caption].tolist():
            found.add("copied_caption", row, f"caption also on {images_C[caption] - 1:,} other images")
