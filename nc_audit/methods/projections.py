"""Principal components of embeddings, deterministic in sign and bounded in cost.

Shapes: N = vectors; D = dimensions; K = components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nc_audit.room import room_for


@dataclass(frozen=True)
class Projection:
    """A linear map of centred vectors: `mean` of shape [D], `matrix` of shape [D, K]."""

    mean: Tensor
    matrix: Tensor
    is_identity: bool = False

    def __call__(self, vectors_ND: Tensor) -> Tensor:
        """The projected vectors, shape [N, K] (or [..., K]), float32; the very tensor where nothing changes."""
        if self.is_identity:
            return vectors_ND
        num, dim = vectors_ND.shape[:-1], self.matrix.shape[1]
        projected = room_for(num.numel(), dim).to(vectors_ND.device).view(*num, dim)
        for part, made in zip(vectors_ND.split(65_536), projected.split(65_536), strict=True):
            made.copy_((part - self.mean) @ self.matrix)
        return projected

    @classmethod
    def of(cls, mean: Tensor, matrix: Tensor) -> Projection:
        """A projection read back from its tensors; where it changes nothing it is known as such."""
        rows, columns = matrix.shape
        is_identity = rows == columns and not mean.any() and torch.equal(matrix, torch.eye(rows))
        return cls(mean, matrix, is_identity)

    @classmethod
    def identity(cls, num: int) -> Projection:
        """Vectors as they are."""
        return cls(torch.zeros(num), torch.eye(num), is_identity=True)


def unit_vectors(vectors_ND: Tensor) -> Tensor:
    """The vectors at unit length, shape [N, D], float32, made a part at a time."""
    unit = room_for(*vectors_ND.shape)
    for part, made in zip(vectors_ND.split(65_536), unit.split(65_536), strict=True):
        made.copy_(normalize(part.float(), dim=1))
    return unit


def principal_projection(
    vectors_ND: Tensor, num: int, whitening: float = 1.0, sample: int = 50_000
) -> Projection:
    """Projection onto the leading principal axes.

    Args:
        vectors_ND: shape [N, D].
        num: how many components at most.
        whitening: 1 gives every component unit variance; w leaves component k the standard deviation
            (s_k / s_1)^(1 - w), so .5 keeps half of the spread, on a log scale.
        sample: the axes are found on an even subset of about this many rows.

    Returns:
        A projection to K <= num, D and N - 1 components. The largest entry of each axis is positive, so that the
        result does not depend on the solver's mood.
    """
    step = max(1, math.ceil(len(vectors_ND) / sample))
    part = vectors_ND[::step].to(torch.float64, copy=True)  # centred in place below
    mean = part.mean(0)
    part -= mean
    variances, axes = torch.linalg.eigh(part.T @ part / len(part))
    variances, axes = variances.flip(0), axes.flip(1)
    usable = int((variances > 1e-6 * variances[0]).sum())
    keep = max(1, min(num, usable, len(vectors_ND) - 1))
    deviations, axes = variances[:keep].clamp_min(1e-12).sqrt(), axes[:, :keep]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    wanted = (deviations / deviations[0]) ** (1 - whitening)
    return Projection(mean.float(), (axes * (wanted / deviations)).float())
