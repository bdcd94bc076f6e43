"""Two normal components on one quantity per pair: which of the two a pair belongs to.

The fit is that of `sklearn.mixture.GaussianMixture` in one dimension; the tests hold it against that from the same
start. It starts from the best split in two, where a library starts from one near it: ten rounds do not forget the
start, and with this one the result is the same on every machine.

Shapes: N = pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nc_audit.errors import ShapeError

MAX_ROUNDS = 10
TOLERANCE = 1e-2
ADDED_VARIANCE = 5e-4


def clean_posterior(value_N: Tensor, force_share: float = 0.01) -> Tensor:
    """Posterior of the lower-mean component of two normals, fitted on min-max-normalised values.

    The wider component also reaches below the narrower one, so the posterior need not fall with the value.
    It always finds two groups: on a set without noise it calls a share of it noisy all the same.

    Args:
        value_N: losses, or anything that is lower for clean pairs, shape [N]; finite.
        force_share: where every posterior is above .5, this share of the pairs, those with the lowest posterior
            (the highest value among equals), is lowered to .5, so that some count as noisy; 0 = never.

    Returns:
        Shape [N], 0..1; higher = cleaner; not calibrated. All 1 where the values do not vary.

    Raises:
        ShapeError: if the input is not one-dimensional.

    Source:
        NCR (NeurIPS 2021), its code's settings: at most 10 rounds, tolerance .01, .0005 added to each variance.

    Example:
        >>> clean_posterior(torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1]))
        tensor([1., 1., 1., 0., 0.])
    """
    if value_N.dim() != 1:
        raise ShapeError("values", "N", value_N.shape)
    if len(value_N) < 2 or value_N.min() == value_N.max():
        return torch.ones_like(value_N)
    value = value_N.double()
    value = (value - value.min()) / (value.max() - value.min())
    posterior = _low_posterior(value).to(value_N.dtype)
    if force_share > 0 and posterior.min() > 0.5:
        num = max(1, int(force_share * len(value)))
        by_value = value.argsort(descending=True, stable=True)
        lowest = by_value[posterior[by_value].argsort(stable=True)][:num]
        posterior[lowest] = 0.5
    return posterior


def _low_posterior(value_N: Tensor) -> Tensor:
    """Expectation maximisation from the best split in two, float64; posterior of the lower mean, shape [N]."""
    share_N2 = _best_split(value_N)
    bound = -math.inf
    parameters = _maximise(value_N, share_N2)
    for _ in range(MAX_ROUNDS):
        previous = bound
        log_joint_N2 = _log_joint(value_N, *parameters)
        log_density_N = log_joint_N2.logsumexp(1)
        parameters = _maximise(value_N, (log_joint_N2 - log_density_N[:, None]).exp())
        bound = log_density_N.mean().item()
        if abs(bound - previous) < TOLERANCE:
            break
    low = int(parameters[0].argmin())
    return _log_joint(value_N, *parameters).softmax(1)[:, low]


def _best_split(value_N: Tensor) -> Tensor:
    """The two-means clustering, exact in one dimension: memberships 0 or 1, shape [N, 2]."""
    ordered, order = value_N.sort(stable=True)
    num = len(ordered)
    below = torch.arange(1, num, dtype=ordered.dtype, device=ordered.device)
    sums = ordered.cumsum(0)
    mean_below = sums[:-1] / below
    mean_above = (sums[-1] - sums[:-1]) / (num - below)
    between = below * (num - below) * (mean_above - mean_below).square()
    cut = int(between.argmax()) + 1
    share_N2 = torch.zeros(num, 2, dtype=ordered.dtype, device=ordered.device)
    share_N2[order[:cut], 0] = 1
    share_N2[order[cut:], 1] = 1
    return share_N2


def _maximise(value_N: Tensor, share_N2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and shares of the two components, each of shape [2]."""
    size_2 = share_N2.sum(0) + 10 * torch.finfo(value_N.dtype).eps
    mean_2 = (share_N2 * value_N[:, None]).sum(0) / size_2
    variance_2 = (share_N2 * (value_N[:, None] - mean_2).square()).sum(0) / size_2 + ADDED_VARIANCE
    return mean_2, variance_2, size_2 / size_2.sum()


def _log_joint(value_N: Tensor, mean_2: Tensor, variance_2: Tensor, share_2: Tensor) -> Tensor:
    """Log of share times density, shape [N, 2]."""
    squared = (value_N[:, None] - mean_2).square() / variance_2
    return share_2.log() - 0.5 * (squared + (2 * math.pi * variance_2).log())
