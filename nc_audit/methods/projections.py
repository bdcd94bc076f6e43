"""Principal components of embeddings, deterministic in sign and bounded in cost.

Shapes: N = vectors; D = dimensions; K = components.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def principal_components(vectors_ND: Tensor, num: int, sample: int = 50_000) -> tuple[Tensor, Tensor]:
    """Scores on the leading principal axes, and the axes' standard deviations.

    Args:
        vectors_ND: shape [N, D].
        num: how many components at most.
        sample: the axes are found on an even subset of about this many rows.

    Returns:
        Scores of unit variance, shape [N, K]; standard deviations, shape [K], descending. K <= num, D and N - 1.
        The largest entry of each axis is positive, so that the result does not depend on the solver's mood.
    """
    step = max(1, math.ceil(len(vectors_ND) / sample))
    part = vectors_ND[::step].double()
    mean = part.mean(0)
    part = part - mean
    variances, axes = torch.linalg.eigh(part.T @ part / len(part))
    variances, axes = variances.flip(0), axes.flip(1)
    usable = int((variances > 1e-6 * variances[0]).sum())
    keep = max(1, min(num, usable, len(vectors_ND) - 1))
    variances, axes = variances[:keep].clamp_min(1e-12), axes[:, :keep]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    scores = (vectors_ND - mean.float()) @ (axes / variances.sqrt()).float()
    return scores, variances.sqrt().float()


def spread_components(vectors_ND: Tensor, num: int) -> Tensor:
    """Principal components, partly whitened: each scaled by the square root of its relative deviation.

    Returns:
        Shape [N, K]: what the heads take in.
    """
    scores, deviations = principal_components(vectors_ND, num)
    return scores * (deviations / deviations[0]).sqrt()
