"""Figures of detection and of calibration, from scores and the truth.

In all of them a score is higher for pairs more likely noisy, and the truth is True for noisy pairs. Pairs without
truth are left out beforehand.

Shapes: N = pairs; K = bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nc_audit.errors import ShapeError


def _checked(is_noisy: ArrayLike, value: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    noisy_N, value_N = np.asarray(is_noisy), np.asarray(value, np.float64)
    assert noisy_N.dtype == bool, "the truth comes first, as bool"
    if noisy_N.ndim != 1:
        raise ShapeError("the truth", "N", noisy_N.shape)
    if value_N.shape != noisy_N.shape:
        raise ShapeError("scores", f"{len(noisy_N)}", value_N.shape)
    return noisy_N, value_N


def auroc(is_noisy_N: ArrayLike, score_N: ArrayLike) -> float:
    """Chance that a noisy pair scores above a clean one, ties counted half.

    Args:
        is_noisy_N: shape [N], bool.
        score_N: shape [N], higher = noisier.

    Returns:
        0..1, .5 = no better than chance; not a number where all pairs are alike.

    Raises:
        ShapeError: scores and truth differ in length.

    Example:
        >>> auroc([False, False, True, True], [0.1, 0.4, 0.4, 0.9])
        0.875
    """
    noisy_N, score_N = _checked(is_noisy_N, score_N)
    if not noisy_N.any() or noisy_N.all():
        return float("nan")
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(noisy_N, score_N))


def average_precision(is_noisy_N: ArrayLike, score_N: ArrayLike) -> float:
    """Area under precision over recall, as steps; equal scores are one threshold.

    Args:
        is_noisy_N: shape [N], bool.
        score_N: shape [N], higher = noisier.

    Returns:
        0..1, the share of noisy pairs = no better than chance; not a number without any noisy pair.

    Raises:
        ShapeError: scores and truth differ in length.

    Example:
        >>> average_precision([True, False, True], [0.9, 0.8, 0.1]).__round__(4)
        0.8333
    """
    noisy_N, score_N = _checked(is_noisy_N, score_N)
    if not noisy_N.any():
        return float("nan")
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(noisy_N, score_N))


def f1(is_noisy_N: ArrayLike, called_N: ArrayLike) -> float:
    """Harmonic mean of precision and recall of what is called noisy.

    Args:
        is_noisy_N: shape [N], bool.
        called_N: which pairs are called noisy, such as those with a probability above .5, shape [N], bool.

    Returns:
        0..1; not a number where nothing is noisy and nothing is called so.

    Raises:
        ShapeError: truth and calls differ in length.

    Example:
        >>> f1([True, False, True], [True, True, False])
        0.5
    """
    called_N = np.asarray(called_N)
    assert called_N.dtype == bool, "calls are bool; compare probabilities with a threshold first"
    noisy_N, _ = _checked(is_noisy_N, called_N)
    total = int(called_N.sum()) + int(noisy_N.sum())
    return 2 * int((called_N & noisy_N).sum()) / total if total else float("nan")


def precision_at_rate(is_noisy_N: ArrayLike, score_N: ArrayLike, rate: float | None = None) -> float:
    """Share of noisy pairs among the highest scores, as many as a rate says.

    Of pairs that tie at the end of the list, the list holds an average draw: the order of the rows has no say.

    Args:
        is_noisy_N: shape [N], bool.
        score_N: shape [N], higher = noisier.
        rate: share of all pairs in the list, 0..1; the true share of noisy ones when not given.

    Returns:
        0..1; not a number where the list is empty.

    Raises:
        ShapeError: scores and truth differ in length.

    Example:
        >>> precision_at_rate([True, True, False, False], [0.9, 0.5, 0.5, 0.1])
        0.75
    """
    noisy_N, score_N = _checked(is_noisy_N, score_N)
    num = int(noisy_N.sum()) if rate is None else round(rate * len(score_N))
    if num == 0:
        return float("nan")
    last = np.partition(score_N, len(score_N) - num)[len(score_N) - num]
    above_N, tied_N = score_N > last, score_N == last
    left = num - int(above_N.sum())
    return float((noisy_N[above_N].sum() + left * noisy_N[tied_N].mean()) / num)


@dataclass(frozen=True)
class Reliability:
    """Stated against true noise in bins of equal width over 0..1; each array has shape [K].

    Attributes:
        low: lower bound, inside the bin.
        high: upper bound, outside the bin, but for the last.
        count: pairs in the bin.
        stated: mean noise probability in it; not a number where it is empty.
        true: share of noisy pairs in it; not a number where it is empty.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    count: NDArray[np.int64]
    stated: NDArray[np.float64]
    true: NDArray[np.float64]

    def expected_error(self) -> float:
        """Mean over pairs of the gap between stated and true in their bin, 0..1; not a number without pairs."""
        held = self.count > 0
        if not held.any():
            return float("nan")
        gap = np.abs(self.stated[held] - self.true[held])
        return float((self.count[held] * gap).sum() / self.count.sum())


def reliability(is_noisy_N: ArrayLike, probability_N: ArrayLike, num_bins: int = 15) -> Reliability:
    """A reliability table: what was stated and what was true, by bins of the stated probability.

    Args:
        is_noisy_N: shape [N], bool.
        probability_N: noise probabilities, shape [N], 0..1.
        num_bins: bins of equal width.

    Raises:
        ShapeError: probabilities and truth differ in length.

    Example:
        >>> table = reliability([False, True, True], [0.1, 0.2, 0.9], 2)
        >>> table.count.tolist(), table.true.tolist()
        ([2, 1], [0.5, 1.0])
    """
    noisy_N, probability_N = _checked(is_noisy_N, probability_N)
    edges = np.arange(num_bins + 1) / num_bins
    bin_N = np.clip(np.searchsorted(edges, probability_N, side="right") - 1, 0, num_bins - 1)
    count = np.bincount(bin_N, minlength=num_bins)
    empty = np.where(count > 0, 0.0, np.nan)
    stated, true = (
        np.bincount(bin_N, weights=value_N, minlength=num_bins) / np.maximum(count, 1) + empty
        for value_N in (probability_N, noisy_N.astype(np.float64))
    )
    return Reliability(edges[:-1], edges[1:], count, stated, true)


def expected_calibration_error(is_noisy_N: ArrayLike, probability_N: ArrayLike, num_bins: int = 15) -> float:
    """Mean gap between stated and true noise over bins of equal width, weighted by their pairs.

    Args:
        is_noisy_N: shape [N], bool.
        probability_N: noise probabilities, shape [N], 0..1.
        num_bins: bins of equal width.

    Returns:
        0..1, lower = better calibrated; not a number without pairs.

    Raises:
        ShapeError: probabilities and truth differ in length.

    Example:
        >>> expected_calibration_error([False, False, True, True], [0.25, 0.25, 0.75, 0.75])
        0.25
    """
    return reliability(is_noisy_N, probability_N, num_bins).expected_error()
