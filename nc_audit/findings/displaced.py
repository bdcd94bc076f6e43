"""Captions that stand on another row than their image: shifted blocks, and re-matches of single ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nc_audit.findings.found import Found, Vectors, cosines

SHIFTS = 10
MAX_REMATCH_PROBABILITY = 0.95
REMATCHED = 50_000  # displaced images or captions searched, at most
_TILE = (512, 4_096)  # images and captions compared at once
_BAND = 64  # rows: offsets up to it share a product
_BLOCK = 128  # rows of such a product


def block_shifts(found: Found, vectors: Vectors, sources: Sequence[str]) -> dict[int, tuple[int, float]]:
    """Runs of rows of one source whose images fit the captions a constant number of rows away.

    For each offset the evidence of a row is the cosine with the caption that far away minus that with its own, mean
    over the rows of an image that stand together. A run counts when its log likelihood ratio, of that evidence being
    as strong as own captions usually are against being none at all, exceeds what the best run among as many rows and
    offsets reaches by chance in one of 10,000 sets; half the ratio is discounted, as neighbours are not independent.

    Returns:
        The row whose caption fits, and the probability, by row.
    """
    result: dict[int, tuple[int, float]] = {}
    is_ok = vectors.row_image >= 0
    by_source: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        by_source.setdefault(source, []).append(row)
    for source in sorted(by_source):
        rows = np.asarray(by_source[source])
        rows = rows[is_ok[rows]]
        if len(rows) < 40:
            continue
        image, caption = vectors.row_image[rows], vectors.row_caption[rows]
        run = np.concatenate([[0], np.cumsum(image[1:] != image[:-1])])
        per_image = max(1, round(len(rows) / (run[-1] + 1)))
        steps = {*range(1, SHIFTS + 1), *(per_image * one for one in range(1, SHIFTS + 1))}
        offsets = [sign * step for step in sorted(steps) for sign in (1, -1) if step < len(rows) // 2]
        needed = 2 * np.log(1e4 * (run[-1] + 1) * max(1, len(offsets)))
        own, *others = _cosines_by_offset(vectors, image, caption, [0, *offsets])
        candidates: list[tuple[float, int, int, int]] = []
        for offset, other in zip(offsets, others, strict=True):
            ratio = _shift_evidence(image, run, own, other, offset)
            if ratio is not None:
                candidates += [
                    (-score, offset, low, high) for score, low, high in _runs(ratio, float(needed))
                ]
        taken = np.zeros(run[-1] + 1, dtype=bool)
        for _, offset, low, high in sorted(candidates):
            if taken[low : high + 1].any() or high - low < 4:
                continue
            taken[low : high + 1] = True
            inside = np.flatnonzero((run >= low) & (run <= high))
            detail = (
                f"rows {rows[inside[0]]:,} to {rows[inside[-1]]:,} fit captions {abs(offset):,} "
                f"row{'s' if abs(offset) > 1 else ''} {'later' if offset > 0 else 'earlier'}"
            )
            for at in inside.tolist():
                if 0 <= at + offset < len(rows):
                    right = int(rows[at + offset])
                    result[int(rows[at])] = (right, MAX_REMATCH_PROBABILITY)
                    found.add("block_shift", int(rows[at]), detail, right, MAX_REMATCH_PROBABILITY)
    return result


def _cosines_by_offset(
    vectors: Vectors, image: np.ndarray, caption: np.ndarray, offsets: Sequence[int]
) -> list[np.ndarray]:
    """Cosines of each row's image with the caption so many rows away, for each offset; any number beyond the ends.

    Small offsets share a product of a block of rows with all captions around it: more to multiply, but read once.
    """
    num = len(image)
    shared = [offset for offset in offsets if abs(offset) <= _BAND]
    reach = max(map(abs, shared), default=0)
    columns = np.asarray(shared, dtype=np.int64) + reach
    band = np.empty((len(shared), num), dtype=np.float32)
    for low in range(0, num, _BLOCK):
        high = min(num, low + _BLOCK)
        around = caption[np.arange(low - reach, high + reach).clip(0, num - 1)]
        product = vectors.image[image[low:high]] @ vectors.caption[around].T
        # Row r meets the captions from column r on.
        step, width = product.strides, 2 * reach + 1
        diagonal = np.lib.stride_tricks.as_strided(product, (high - low, width), (sum(step), step[1]))
        band[:, low:high] = diagonal[:, columns].T
    of_shared = dict(zip(shared, band, strict=True))
    at = np.arange(num)
    return [
        of_shared[offset]
        if offset in of_shared
        else cosines(vectors, image, caption[(at + offset).clip(0, num - 1)])
        for offset in offsets
    ]


def _shift_evidence(
    image: np.ndarray, run: np.ndarray, own: np.ndarray, other: np.ndarray, offset: int
) -> np.ndarray | None:
    """Log likelihood ratio of each image's rows to be shifted; None where own captions hardly stand out."""
    low, high = max(0, -offset), len(image) - max(0, offset)
    at = np.arange(low, high)
    at = at[image[at] != image[at + offset]]
    num = np.bincount(run[at], minlength=run[-1] + 1)
    total = np.bincount(run[at], other[at] - own[at], minlength=run[-1] + 1)
    known = num > 0
    if known.sum() < 20:
        return None
    gain = np.where(known, total / np.maximum(num, 1), 0.0)
    usual = -float(np.median(gain[known]))
    spread = float(np.median(np.abs(gain[known] + usual))) * 1.4826
    if usual <= 0 or usual < 0.5 * spread:
        return None
    gain = np.clip(gain, -3 * usual, 3 * usual)
    return np.where(known, usual / max(spread, 1e-6) ** 2 * (gain - usual / 2), 0.0)


def _runs(ratio: np.ndarray, needed: float) -> list[tuple[float, int, int]]:
    """Runs of the highest sum, each at least `needed`, not overlapping: sum, first, last."""
    result: list[tuple[float, int, int]] = []
    total, start, best, end = 0.0, 0, 0.0, -1
    for at, value in enumerate([*ratio.tolist(), float("-inf")]):
        if total <= 0:
            total, start, best, end = 0.0, at, 0.0, -1
        total += value
        if total > best:
            best, end = total, at
        if end >= 0 and (total <= 0 or total < best - needed):
            if best >= needed:
                result.append((best, start, end))
            total = 0.0
    return result


def rematches(found: Found, vectors: Vectors, known: dict[int, tuple[int, float]]) -> None:
    """For likely noisy pairs, the displaced caption that fits the image best and whose best image it is.

    The probability compares the cosine with those of clean pairs and with hard mismatches, the best of 16 random
    captions of each clean image; two normal densities of one spread, mismatches four times as likely beforehand.
    """
    noisy = np.nan_to_num(vectors.noise_probability, nan=0.0) >= 0.5
    noisy[list(known)] = False
    rows = np.flatnonzero(noisy)
    clean = np.flatnonzero(vectors.noise_probability < 0.1)
    if len(rows) < 2 or len(clean) < 50:
        return
    images, captions = np.unique(vectors.row_image[rows]), np.unique(vectors.row_caption[rows])
    if max(len(images), len(captions)) > REMATCHED:
        found.capped.append(
            f"re-matches: the first {REMATCHED:,} displaced images and captions were searched"
        )
        images, captions = images[:REMATCHED], captions[:REMATCHED]
    draw = np.random.default_rng(0)
    clean = draw.permutation(clean)[:5000]
    right = cosines(vectors, vectors.row_image[clean], vectors.row_caption[clean])
    wrong = np.full(len(clean), -1.0)
    for _ in range(16):
        other = vectors.row_caption[draw.permutation(clean)]
        cosine = cosines(vectors, vectors.row_image[clean], other)
        wrong = np.maximum(wrong, np.where(other == vectors.row_caption[clean], -1.0, cosine))
    spread = float(np.sqrt((right.var() + wrong.var()) / 2)) or 1e-6
    slope = float(right.mean() - wrong.mean()) / spread**2
    middle = float(right.mean() + wrong.mean()) / 2
    if slope <= 0:
        return
    best_caption, value, best_image = best_of_each_other(vectors.image[images], vectors.caption[captions])
    own = {
        (int(vectors.row_image[r]), int(vectors.row_caption[r]))
        for r in np.flatnonzero(vectors.row_image >= 0)
    }
    carrier = {int(vectors.row_caption[r]): int(r) for r in rows[::-1]}
    chosen: dict[int, tuple[int, float]] = {}
    for at, image in enumerate(images.tolist()):
        caption = int(captions[best_caption[at]])
        if best_image[best_caption[at]] != at or (image, caption) in own:
            continue
        probability = 1 / (1 + 4 * np.exp(-np.clip(slope * (value[at] - middle), -50, 50)))
        chosen[image] = (carrier[caption], min(float(probability), 0.9))
    for row in rows.tolist():
        partner, probability = chosen.get(int(vectors.row_image[row]), (-1, 0.0))
        if probability >= 0.5:
            found.add("rematch", row, f"the caption of row {partner:,} fits the image", partner, probability)


def best_of_each_other(
    image_ID: np.ndarray, caption_CD: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The caption closest to each image and the image closest to each caption, of equally close ones the first.

    Args:
        image_ID: unit vectors, shape [I, D].
        caption_CD: unit vectors, shape [C, D].

    Returns:
        Index and cosine of each image's caption, both of shape [I]; index of each caption's image, shape [C].
    """
    import torch

    images, captions = torch.from_numpy(image_ID), torch.from_numpy(caption_CD)
    best_caption, best_image = (
        torch.zeros(len(images), dtype=torch.long),
        torch.zeros(len(captions), dtype=torch.long),
    )
    of_image, of_caption = torch.full((len(images),), -torch.inf), torch.full((len(captions),), -torch.inf)
    for low in range(0, len(images), _TILE[0]):
        mine = slice(low, low + _TILE[0])
        for begin in range(0, len(captions), _TILE[1]):
            theirs = slice(begin, begin + _TILE[1])
            cosine = images[mine] @ captions[theirs].T
            for dim, side, start, value, best in (
                (1, mine, begin, of_image, best_caption),
                (0, theirs, low, of_caption, best_image),
            ):
                top, at = cosine.max(dim)
                is_better = top > value[side]
                value[side] = torch.where(is_better, top, value[side])
                best[side] = torch.where(is_better, at + start, best[side])
    return best_caption.numpy(), of_image.numpy(), best_image.numpy()
