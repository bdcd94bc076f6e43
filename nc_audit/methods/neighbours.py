"""Agreement of a pair with its neighbours: what nearby images' captions and nearby captions' images say.

Shapes: B = pairs; R = reference pairs; D = dimensions; K = neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neighbour_distance(
    query_BD: Tensor,
    other_BD: Tensor,
    reference_query_RD: Tensor,
    reference_other_RD: Tensor,
    trust_R: Tensor,
    excluded_BR: Tensor,
    num_neighbours: int = 30,
    sharpness: float = 5.0,
) -> Tensor:
    """Distance of each pair's other side from the other sides of its neighbours.

    The K reference pairs nearest on the query side vote, each with weight softmax(sharpness x cosine) x trust.

    Args:
        query_BD: unit vectors of the side on which neighbours are looked for, shape [B, D].
        other_BD: unit vectors of the pairs' other side, shape [B, D].
        reference_query_RD: the same side of the reference pairs, shape [R, D].
        reference_other_RD: the other side of the reference pairs, shape [R, D].
        trust_R: probability of each reference pair to be clean, shape [R], 0..1.
        excluded_BR: references that must not vote (the pair's own image, say), shape [B, R].
        num_neighbours: K.
        sharpness: how much nearer neighbours count for more, 0..

    Returns:
        Shape [B], cosine distance, 0..2; higher = the neighbours contradict the pair. 1 where none may vote.

    Source:
        LEMoN (ICML 2025); trust in the place of its distance weighting is ours.
    """
    cosine_BR = (query_BD @ reference_query_RD.T).masked_fill(excluded_BR, float("-inf"))
    nearest, at = cosine_BR.topk(min(num_neighbours, cosine_BR.shape[1]), dim=1)
    votes = torch.where(nearest.isfinite(), torch.exp(sharpness * (nearest - 1)), 0.0) * trust_R[at]
    distance = 1 - torch.einsum("bd,bkd->bk", other_BD, reference_other_RD[at])
    total = votes.sum(1)
    voted = (votes * distance).sum(1) / total.clamp_min(torch.finfo(votes.dtype).tiny)
    return torch.where(total > 0, voted, torch.ones_like(voted))
