"""Some of many vectors, and the inner products of some with some.

Shapes: N = places; D = dimensions; X, Y = vectors of either side.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 65_536


def rows_at(values_XD: Tensor, at: Tensor) -> Tensor:
    """`values_XD[at]`, whole rows, which torch copies several times as fast as what is indexed.

    Args:
        values_XD: shape [X, ...].
        at: places from 0 on, of any shape.

    Returns:
        Shape [*at.shape, ...].

    Example:
        >>> rows_at(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1], [0]])).tolist()
        [[[3, 4]], [[1, 2]]]
    """
    return values_XD.index_select(0, at.reshape(-1)).view(*at.shape, *values_XD.shape[1:])


def paired_products(one_XD: Tensor, other_YD: Tensor, one_N: Tensor, other_N: Tensor) -> Tensor:
    """Inner products of pairs of vectors, a part of the pairs at a time, shape [N].

    Args:
        one_XD: vectors of one side.
        other_YD: vectors of the other side.
        one_N: index of each pair's vector on one side.
        other_N: likewise on the other.
    """
    parts = zip(one_N.split(_PAIRS_AT_ONCE), other_N.split(_PAIRS_AT_ONCE), strict=True)
    return torch.cat([torch.linalg.vecdot(rows_at(one_XD, x), rows_at(other_YD, y)) for x, y in parts])
