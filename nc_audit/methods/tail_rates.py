"""The noise rate behind its estimates by the tails of the known swaps' scores, free of clean pairs in them.

The upper tail of the swaps' scores that holds the share q of them holds r q of the given pairs for the noise and, for
the clean ones among them, (1 - r) c(q). Given pairs over swaps estimate r + (1 - r) c(q) / q: the wider the tail, the
less it varies and the more clean pairs reach into it. What is known of c is that it dies off faster than q; two rules
say how, and are fitted over all tails at once.

Shapes: Q = tails; B = bootstrap draws; K = terms of a fit; D = distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

RATE_TAILS = tuple(round(0.10 + 0.05 * step, 2) for step in range(17))
"""Shares of the swaps that the tails hold."""
_LEAK_POWERS = (
    (6, 0.0),
    (3, 4.0),
    (1.5, 8.0),
)  # with what each must fit better by than the one before, chi-square
_DISTANCES = tuple(round(0.2 * step, 1) for step in range(1, 31))


def rates_by_two_rules(point_Q: Tensor, draw_BQ: Tensor) -> Tensor:
    """The noise rate by `rate_by_powers` and by `rate_by_distance`.

    Args:
        point_Q: estimate by each of `RATE_TAILS`, shape [Q].
        draw_BQ: the same in bootstrap draws, shape [B, Q]; their covariance weighs the tails.

    Returns:
        0..1, of the point and of each draw, shape [2, 1 + B].
    """
    covariance = torch.cov(draw_BQ.T)
    variance = covariance.diagonal()
    # Half way to its diagonal: a covariance of nearly equal tails, inverted as it stands, weighs their differences.
    covariance = (covariance + torch.diag(variance)) / 2
    covariance = covariance + (1e-6 + 1e-3 * variance.mean()) * torch.eye(len(point_Q), dtype=torch.float64)
    precision = torch.linalg.inv(covariance)
    estimates = torch.cat([point_Q[None], draw_BQ])
    return torch.stack([rate_by_powers(estimates, precision), rate_by_distance(estimates, precision)])


def rate_by_powers(estimates_BQ: Tensor, precision_QQ: Tensor) -> Tensor:
    """Noise rate where the clean pairs' part of an estimate is a q^k, a >= 0.

    Powers k are fitted by generalised least squares and averaged by their likelihood on the first estimate. Good
    evidence dies off steeply, so lower powers must fit clearly better to count: where the evidence is weak and the
    pairs are few, this rule errs upwards.

    Args:
        estimates_BQ: by each of `RATE_TAILS`, the point first and draws behind it, shape [1 + B, Q].
        precision_QQ: inverse covariance of one line of it.

    Returns:
        Shape [1 + B], 0..1.
    """
    tail_Q = torch.tensor(RATE_TAILS, dtype=torch.float64)

    def fit(design_QK: Tensor) -> tuple[Tensor, Tensor]:
        solve = torch.linalg.solve(design_QK.T @ precision_QQ @ design_QK, design_QK.T @ precision_QQ)
        coefficients = estimates_BQ @ solve.T
        residual = estimates_BQ - coefficients @ design_QK.T
        return coefficients, ((residual @ precision_QQ) * residual).sum(1)

    flat = torch.ones_like(tail_Q)[:, None]
    level, misfit = fit(flat)
    rates, misfits = [], []
    for power, penalty in _LEAK_POWERS:
        leaking, other = fit(torch.cat([flat, tail_Q[:, None] ** power], 1))
        impossible = leaking[:, 1] < 0
        rates.append(torch.where(impossible, level[:, 0], leaking[:, 0]))
        misfits.append(torch.where(impossible, misfit, other)[0] + penalty)
    weight = torch.softmax(-torch.stack(misfits) / 2, 0)
    return (weight[:, None] * torch.stack(rates)).sum(0).clamp(0.0, 1.0)


def rate_by_distance(estimates_BQ: Tensor, precision_QQ: Tensor) -> Tensor:
    """Noise rate where swaps and clean pairs score by two normal distributions of one width, a distance d apart.

    Then c(q) = Phi(Phi^-1(q) - d), and with d goes how many clean pairs there are in each tail, not only how they die
    off. Distances of .2 to 6 standard deviations are averaged by likelihood, in each draw anew. Where the evidence is
    weak, a set without noise and one with some look alike to it, and it says something between.

    Args:
        estimates_BQ: by each of `RATE_TAILS`, shape [1 + B, Q].
        precision_QQ: inverse covariance of one line of it.

    Returns:
        Shape [1 + B], 0..1.
    """
    tail_Q = torch.tensor(RATE_TAILS, dtype=torch.float64)
    distance_D = torch.tensor(_DISTANCES, dtype=torch.float64)
    clean_DQ = torch.special.ndtr(torch.special.ndtri(tail_Q) - distance_D[:, None]) / tail_Q
    # estimate = clean + r (1 - clean): one unknown
    slope_DQ = 1 - clean_DQ
    weighed_DQ = slope_DQ @ precision_QQ
    above_BDQ = estimates_BQ[:, None] - clean_DQ
    rate_BD = ((above_BDQ * weighed_DQ).sum(2) / (slope_DQ * weighed_DQ).sum(1)).clamp(0.0, 1.0)
    residual_BDQ = above_BDQ - rate_BD[:, :, None] * slope_DQ
    misfit_BD = ((residual_BDQ @ precision_QQ) * residual_BDQ).sum(2)
    return (torch.softmax(-misfit_BD / 2, 1) * rate_BD).sum(1).clamp(0.0, 1.0)
