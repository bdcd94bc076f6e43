"""LEMoN: a pair's own distance, and what the neighbours on each side have to say about the other.

Shapes: I = images; C = captions; N = pairs; R = reference pairs; Q = queries of one side; X = the other side;
K = neighbours; D = dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nc_audit.errors import ShapeError

_PAIRS_AT_ONCE = 4096
_COSINES_AT_ONCE = 2**24


def nearest_references(
    vectors_QD: Tensor, query_N: Tensor, reference_R: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """The reference pairs nearest to each query on the query's side.

    Args:
        vectors_QD: unit vectors of one side, shape [Q, D].
        query_N: index of each pair's vector on that side, shape [N].
        reference_R: which pairs are references, shape [R], 0..N-1.
        num: how many neighbours.

    Returns:
        Cosines (-1..1, falling) and positions among the references, both of shape [Q, min(num, R)].

    Example:
        >>> cosine, at = nearest_references(torch.eye(2), torch.tensor([0, 1]), torch.tensor([1]), 5)
        >>> cosine.tolist(), at.tolist()
        ([[0.0], [1.0]], [[0], [0]])
    """
    reference_RD = vectors_QD[query_N[reference_R]]
    rows = max(1, _COSINES_AT_ONCE // max(1, len(reference_R)))
    found = [
        (part @ reference_RD.T).topk(min(num, len(reference_R)), dim=1) for part in vectors_QD.split(rows)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def neighbour_noise(
    query_QD: Tensor,
    other_XD: Tensor,
    query_N: Tensor,
    other_N: Tensor,
    distance_N: Tensor,
    reference_R: Tensor,
    num_neighbours: int = 30,
    nearness: float = 0.1,
    cleanness: float = 5.0,
) -> Tensor:
    """How far a pair's other side is from the other sides of its neighbours, per pair.

    Mean over the K reference pairs j nearest on the query side, the pair itself left out, of
    d_other(pair, j) x exp(-nearness x d_query(pair, j)) x exp(-cleanness x d(j)), where d is one minus the cosine
    and d(j) a reference's distance between its own two sides.

    Args:
        query_QD: unit vectors of the side on which neighbours are looked for, shape [Q, D].
        other_XD: unit vectors of the other side, shape [X, D].
        query_N: index of each pair's query-side vector, shape [N].
        other_N: index of each pair's other-side vector, shape [N].
        distance_N: distance between the two sides of each pair, shape [N], 0..2.
        reference_R: which pairs are references, distinct, shape [R], 0..N-1.
        num_neighbours: K.
        nearness: tau_1, how fast the say of a neighbour falls with its distance, 0..
        cleanness: tau_2, how fast it falls with the neighbour's distance between its own two sides, 0..

    Returns:
        Shape [N], 0..2; higher = the neighbours contradict the pair. 0 where nobody but the pair is a reference.

    Raises:
        ShapeError: `distance_N` is not of the pairs.

    Source:
        s_n and s_m of LEMoN (ICML 2025). Its code puts the inner product itself into the first exponent, which
        multiplies both by exp(nearness); this is the formula.

    Example:
        >>> side, pair = torch.eye(3), torch.arange(3)
        >>> neighbour_noise(side, side, pair, pair, torch.zeros(3), pair, 2, 0.0, 0.0)
        tensor([1., 1., 1.])
    """
    if distance_N.shape != query_N.shape:
        raise ShapeError("distances", "N", distance_N.shape)
    if not len(reference_R):
        return torch.zeros_like(distance_N)
    # One more than needed: a pair that finds itself drops itself, any other drops the last.
    cosine_QK, at_QK = nearest_references(query_QD, query_N, reference_R, num_neighbours + 1)
    trust_R = torch.exp(-cleanness * distance_N[reference_R])
    reference_other_R = other_N[reference_R]
    parts = []
    for pair_B in torch.arange(len(query_N)).split(_PAIRS_AT_ONCE):
        cosine_BK, at_BK = cosine_QK[query_N[pair_B]], at_QK[query_N[pair_B]]
        kept_BK = reference_R[at_BK] != pair_B[:, None]
        if at_BK.shape[1] > num_neighbours:
            kept_BK[:, -1] &= ~kept_BK[:, :-1].all(1)
        other_cosine_BK = torch.einsum(
            "bd,bkd->bk", other_XD[other_N[pair_B]], other_XD[reference_other_R[at_BK]]
        )
        say_BK = torch.exp(-nearness * (1 - cosine_BK)) * trust_R[at_BK] * kept_BK
        noise_B = ((1 - other_cosine_BK) * say_BK).sum(1) / kept_BK.sum(1).clamp_min(1)
        parts.append(noise_B.clamp_min(0.0))
    return torch.cat(parts) if parts else torch.zeros_like(distance_N)


def lemon_score(
    distance_N: Tensor,
    image_noise_N: Tensor,
    caption_noise_N: Tensor,
    image_factor: float = 5.0,
    caption_factor: float = 5.0,
) -> Tensor:
    """A pair's own distance plus what both kinds of neighbours say, per pair.

    Args:
        distance_N: one minus the cosine of the pair, shape [N], 0..2.
        image_noise_N: `neighbour_noise` by nearby images, shape [N], 0..2.
        caption_noise_N: `neighbour_noise` by nearby captions, shape [N], 0..2.
        image_factor: beta, 0..
        caption_factor: gamma, 0..; both 0 leave the distance alone.

    Returns:
        Shape [N], 0..; higher = noisier.

    Source:
        LEMoN (ICML 2025); the factors are its fixed setting, chosen without labels.

    Example:
        >>> lemon_score(torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([0.0]))
        tensor([1.7500])
    """
    return distance_N + image_factor * image_noise_N + caption_factor * caption_noise_N
