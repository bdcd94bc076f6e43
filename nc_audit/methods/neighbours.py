"""Agreement of a pair with its neighbours: what nearby images' captions and nearby captions' images say.

Shapes: Q = distinct queries; B = pairs; R = reference pairs; D = dimensions; L = looked up; K = neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nc_audit.methods.rows import rows_at


def nearest_references(
    query_QD: Tensor, reference_RD: Tensor, num: int, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """The references nearest to each query, nearest first.

    Args:
        query_QD: unit vectors, shape [Q, D].
        reference_RD: unit vectors of the same side of the reference pairs, shape [R, D].
        num: how many, L; all where there are fewer.
        block: queries at a time; memory is block x R.

    Returns:
        Cosines, and indices as int32, each of shape [Q, L].
    """
    num = min(num, len(reference_RD))
    nearest = query_QD.new_empty(len(query_QD), num)
    at = query_QD.new_empty(len(query_QD), num, dtype=torch.int32)
    cosine = query_QD.new_empty(min(block, len(query_QD)), len(reference_RD))
    for start in range(0, len(query_QD), block):
        part = query_QD[start : start + block]
        found = torch.mm(part, reference_RD.T, out=cosine[: len(part)]).topk(num, dim=1)
        nearest[start : start + block], at[start : start + block] = found.values, found.indices
    return nearest, at


def neighbour_distance(
    nearest_BL: Tensor,
    at_BL: Tensor,
    excluded_BL: Tensor,
    other_BD: Tensor,
    reference_other_RD: Tensor,
    trust_R: Tensor,
    num_neighbours: int = 30,
    sharpness: float = 5.0,
) -> Tensor:
    """Distance of each pair's other side from the other sides of its neighbours.

    The K nearest references that are not excluded vote, each with weight softmax(sharpness x cosine) x trust.

    Args:
        nearest_BL: cosines of each pair's query side with the references looked up, nearest first, shape [B, L].
        at_BL: which references these are, shape [B, L].
        excluded_BL: which of them must not vote (the pair's own image, say), shape [B, L].
        other_BD: unit vectors of the pairs' other side, shape [B, D].
        reference_other_RD: the other side of the reference pairs, shape [R, D].
        trust_R: probability of each reference pair to be clean, shape [R], 0..1.
        num_neighbours: K; fewer vote where more than L - K are excluded.
        sharpness: how much nearer neighbours count for more, 0..

    Returns:
        Shape [B], cosine distance, 0..2; higher = the neighbours contradict the pair. 1 where none may vote.

    Source:
        LEMoN (ICML 2025); trust in the place of its distance weighting is ours.
    """
    # The first K that may vote, moved to the front.
    order = excluded_BL.byte().argsort(dim=1, stable=True)[:, :num_neighbours]
    nearest, at, excluded = (one.gather(1, order) for one in (nearest_BL, at_BL, excluded_BL))
    votes = torch.where(excluded, 0.0, torch.exp(sharpness * (nearest - 1))) * trust_R[at]
    distance = 1 - torch.einsum("bd,bkd->bk", other_BD, rows_at(reference_other_RD, at))
    total = votes.sum(1)
    voted = (votes * distance).sum(1) / total.clamp_min(torch.finfo(votes.dtype).tiny)
    return torch.where(total > 0, voted, torch.ones_like(voted))
