"""Noise probability of a given mean, as a smooth rising curve of the score.

What the known swaps tell of each score is scattered by how many of them there are: by a step-wise fit, a few hundred
wrong images are stated .1 too clean here and .1 too noisy there. Odds that rise smoothly with the score say as much
with fewer steps to err in, and where there are many swaps they follow any rising curve.

Shapes: N = given pairs; S = known swaps; Q = bins of scores; P = pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nc_audit.methods.known_swaps import bins_of
from nc_audit.methods.minimum import minimum

_BINS = 2048
_AT_ONCE = 1 << 16  # scores, so that memory stays flat
_PIECES = 16
_SLOPES_APART = 0.5  # how far the log slopes of neighbouring pieces differ, a deviation
_SLOPE, _ANY_SLOPE = 0.7, 3.0  # log slope per deviation of the scores, and how far it may be from that
_STARTS = (_SLOPE, -1.0)  # log slopes from which the fit is sought
_STEEPEST = 7.0
_HOLD_MEAN = 40.0


def levelled_posterior(
    score_N: Tensor, swap_score_S: Tensor, mean: float, swaps_right: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Probability p of each pair to be noise, rising with the score, whose mean over the given pairs is given.

    Of a swap, the density is p / mean times that of a given pair; of those that are right, (1 - p) / (1 - mean) times.
    So for every p(score) it is known how likely each score is a swap's rather than a given pair's; the log odds of p,
    linear in pieces between quantiles of the scores, are those by which the scores as they are were likeliest, with
    a normal prior on how much the log slopes of neighbouring pieces differ.

    Args:
        score_N: scores of the given pairs, higher = noisier, shape [N].
        swap_score_S: scores of known swaps, shape [S]. They show the shape of noise, not its level: that is `mean`.
        mean: of the given pairs' probabilities, 0..1.
        swaps_right: share of the swaps that are right by chance, 0..1; at most half of 1 - mean counts.

    Returns:
        For the given pairs, shape [N], and for the swaps by the same rule, shape [S]: float64, 0..1,
        non-decreasing in the score.
    """
    num, num_swaps = len(score_N), len(swap_score_S)
    if not 0 < mean < 1:
        return torch.full((num,), mean, dtype=torch.float64), torch.full(
            (num_swaps,), mean, dtype=torch.float64
        )
    with torch.inference_mode(False), torch.enable_grad():
        scores = torch.cat([score_N, swap_score_S]).detach().double().clone()
        bins, num_bins = bins_of(scores, _BINS)
        at_Q, place = bins.unique(return_inverse=True)
        total_Q = torch.bincount(bins, minlength=num_bins)[at_Q].double()
        centre_Q = torch.bincount(bins, scores, minlength=num_bins)[at_Q] / total_Q
        given_Q = torch.bincount(place[:num], minlength=len(at_Q)).double()
        swaps_Q = total_Q - given_Q
        # Scores that are equal speak once: pairs of one image may have one score.
        once = len(scores.unique()) / len(scores)
        rises_QP = _rises(centre_Q, centre_Q)
        right = min(swaps_right, (1 - mean) / 2)

        def unlikely(slope_P: Tensor, level: Tensor) -> Tensor:
            posterior_Q = torch.sigmoid(level + rises_QP @ _slopes(slope_P))
            found = ((given_Q * posterior_Q).sum() / num).clamp(1e-9, 1 - 1e-9)
            density_Q = (1 - right) * posterior_Q / found + right * (1 - posterior_Q) / (1 - found)
            odds_Q = (num_swaps / num * density_Q).clamp_min(1e-30)
            fit = total_Q @ torch.log1p(odds_Q) - swaps_Q @ odds_Q.log()
            fit = fit + _HOLD_MEAN / 2 * len(scores) * (found - mean).square()
            bends = (slope_P.diff() / _SLOPES_APART).square().sum()
            return once * fit + (bends + ((slope_P - _SLOPE) / _ANY_SLOPE).square().sum()) / 2

        fit = _least(lambda fit: unlikely(fit[:-1], fit[-1]), math.log(mean / (1 - mean)))
        slope_P, level = fit[:-1], fit[-1]
    with torch.no_grad():
        slopes_P = _slopes(slope_P)
        odds = torch.cat([_rises(some, centre_Q) @ slopes_P for some in scores.split(_AT_ONCE)])
        low, high = level - 60 - odds.max(), level + 60 - odds.min()
        for _ in range(80):
            level = (low + high) / 2
            if torch.sigmoid(level + odds[:num]).mean() < mean:
                low = level
            else:
                high = level
        posterior = torch.sigmoid(high + odds)
    return posterior[:num], posterior[num:]


def _least(cost: Callable[[Tensor], Tensor], level: float) -> Tensor:
    """The log slopes and the level, shape [P + 1], of the least cost.

    Where wrong pairs are few and far from the rest it has more valleys than one: of those that starts lead to, the
    deepest counts.
    """
    starts = [torch.tensor([*[slope] * _PIECES, level], dtype=torch.float64) for slope in _STARTS]
    return min((minimum(cost, start) for start in starts), key=lambda found: found[1])[0]


def _slopes(log_slope_P: Tensor) -> Tensor:
    """From their logs, within bounds that a long step on the way to the fit would else leave for infinity."""
    return log_slope_P.clamp(-_STEEPEST, _STEEPEST).exp()


def _rises(scores_N: Tensor, centre_Q: Tensor) -> Tensor:
    """How far each score has risen through each piece, in deviations of the scores, shape [N, P].

    Pieces lie between quantiles of the bins' centres; the first and the last one go on beyond.
    """
    ends = centre_Q.quantile(torch.linspace(0, 1, _PIECES + 1, dtype=torch.float64))
    ends[0], ends[-1] = -math.inf, math.inf
    starts = ends[:-1].clone()
    starts[0] = ends[1]
    risen = scores_N[:, None].clamp(ends[:-1], ends[1:]) - starts
    return risen / centre_Q.std(correction=0).clamp_min(1e-9)
