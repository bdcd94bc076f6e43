"""Figures of retrieval: recall of matching captions and images, and mean average precision of hash codes.

Ties count against: whoever ranks everything alike must not win.

Shapes: I = images; C = captions; N = pairs; Q = queries; G = gallery, what is searched; K = bits; D = dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.errors import DatasetError, ShapeError

_CELLS_AT_ONCE = 2**24
_ROUNDING = 1e-6  # of float32 cosines; equal vectors multiply to slightly different ones in different places


@dataclass(frozen=True)
class Recall:
    """Recall at the top K in percent, 0..100, by K, in both directions; higher = better.

    Attributes:
        image_to_caption: share of images that find one of their captions among the top K captions.
        caption_to_image: share of captions that find one of their images among the top K images.
    """

    image_to_caption: dict[int, float]
    caption_to_image: dict[int, float]

    @property
    def total(self) -> float:
        """Sum of all values (rSum), 0..600 for three K."""
        return sum(self.image_to_caption.values()) + sum(self.caption_to_image.values())

    @property
    def mean(self) -> float:
        """Mean of all values (mR), 0..100."""
        return self.total / (len(self.image_to_caption) + len(self.caption_to_image))

    def columns(self) -> dict[str, float]:
        """All values by short names: i2t_r1, t2i_r1 ..., mr, rsum."""
        values = {f"i2t_r{k}": value for k, value in self.image_to_caption.items()}
        values |= {f"t2i_r{k}": value for k, value in self.caption_to_image.items()}
        return values | {"mr": self.mean, "rsum": self.total}


def ranks(query_QD: Tensor, gallery_GD: Tensor, query_N: Tensor, gallery_N: Tensor) -> Tensor:
    """Rank of the best match of each query: one plus how many others of the gallery reach its cosine.

    A query's other matches are no rivals. Others whose cosine is the same up to rounding rank before the match.

    Args:
        query_QD: unit vectors, shape [Q, D].
        gallery_GD: unit vectors, shape [G, D].
        query_N: the query of each matching pair, shape [N].
        gallery_N: what it matches, shape [N].

    Returns:
        Shape [Q], 1..G; 0 for a query without a match.

    Raises:
        ShapeError: the vectors differ in dimensions.

    Example:
        >>> ranks(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 0]))
        tensor([1, 2])
    """
    if query_QD.dim() != 2 or gallery_GD.dim() != 2 or query_QD.shape[1] != gallery_GD.shape[1]:
        raise ShapeError("the gallery", f"G, {query_QD.shape[-1]}", gallery_GD.shape)
    order = query_N.argsort(stable=True)
    query_N, gallery_N = query_N[order], gallery_N[order]
    found = []
    rows = max(1, _CELLS_AT_ONCE // max(1, len(gallery_GD)))
    for start in range(0, len(query_QD), rows):
        cosine_BG = query_QD[start : start + rows] @ gallery_GD.T
        low, high = torch.searchsorted(query_N, torch.tensor([start, start + len(cosine_BG)])).tolist()
        at = query_N[low:high] - start, gallery_N[low:high]
        best_B = cosine_BG.new_full((len(cosine_BG),), float("-inf"))
        best_B = best_B.scatter_reduce(0, at[0], cosine_BG[at], "amax")
        cosine_BG[at] = float("-inf")
        rank_B = 1 + (cosine_BG >= best_B[:, None] - _ROUNDING).sum(1)
        found.append(torch.where(best_B.isfinite(), rank_B, 0))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def recall_at_k(
    image_ID: Tensor,
    caption_CD: Tensor,
    image_of_pair: Tensor,
    caption_of_pair: Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> Recall:
    """Recall in both directions, for images with several captions and captions of several images.

    All images and captions are searched; those without a pair are not asked.

    Args:
        image_ID: unit vectors of images, shape [I, D].
        caption_CD: unit vectors of captions, shape [C, D].
        image_of_pair: image of each matching pair, shape [N].
        caption_of_pair: its caption, shape [N].
        ks: lengths of the list that is looked at.

    Raises:
        DatasetError: there is no pair.
        ShapeError: the vectors differ in dimensions.

    Example:
        >>> recall = recall_at_k(torch.eye(4), torch.eye(4), torch.arange(4), torch.tensor([0, 1, 3, 2]), (1, 2))
        >>> recall.image_to_caption, recall.mean, recall.total
        ({1: 50.0, 2: 50.0}, 50.0, 200.0)
    """
    if not len(image_of_pair):
        raise DatasetError(
            "there is no pair to retrieve", "evaluate a split that has both images and captions"
        )
    both = (
        ranks(image_ID, caption_CD, image_of_pair, caption_of_pair),
        ranks(caption_CD, image_ID, caption_of_pair, image_of_pair),
    )
    images, captions = ({k: 100 * float((rank[rank > 0] <= k).double().mean()) for k in ks} for rank in both)
    return Recall(images, captions)


def mean_average_precision(
    query_codes: Tensor,
    database_codes: Tensor,
    query_class: Tensor,
    database_class: Tensor,
    k: int = 20,
    *,
    full_ranking: bool = False,
) -> float:
    """Mean average precision at k of hash codes by Hamming distance; relevant = of the query's class.

    Equal distances rank by place in the database. A query that finds nothing relevant counts as 0.

    Args:
        query_codes: codes of -1 and 1, shape [Q, K].
        database_codes: codes of -1 and 1, shape [G, K].
        query_class: shape [Q].
        database_class: shape [G].
        k: how many count.
        full_ranking: False: the mean, over the relevant items among the first k, of the precision at their ranks.
            True: the same over the first k relevant items wherever they rank.

    Returns:
        0..1, higher = better.

    Raises:
        ShapeError: codes or classes do not fit each other.
        DatasetError: there is no query.

    Source:
        hashing literature; with `full_ranking` as CHNR's author computes mAP@20 (arXiv 2202.13117, code).

    Example:
        >>> code = torch.tensor([[1, 1], [1, -1], [-1, -1]])
        >>> mean_average_precision(code[:1], code, torch.tensor([7]), torch.tensor([7, 0, 7])).__round__(4)
        0.8333
        >>> mean_average_precision(code[:1], code, torch.tensor([7]), torch.tensor([7, 0, 7]), 2)
        1.0
    """
    bits = query_codes.shape[-1]
    if query_codes.dim() != 2 or database_codes.dim() != 2 or database_codes.shape[1] != bits:
        raise ShapeError("codes of the database", f"G, {bits}", database_codes.shape)
    for name, classes, codes in (
        ("classes of the queries", query_class, query_codes),
        ("classes of the database", database_class, database_codes),
    ):
        if classes.shape != codes.shape[:1]:
            raise ShapeError(name, f"{len(codes)}", classes.shape)
    if not len(query_codes):
        raise DatasetError("there is no query to retrieve with", "evaluate a split that has pairs")
    database = database_codes.float()
    place_G = torch.arange(1, len(database) + 1, dtype=torch.float64)
    total = 0.0
    rows = max(1, _CELLS_AT_ONCE // max(1, len(database)))
    for query_BK, class_B in zip(query_codes.float().split(rows), query_class.split(rows), strict=True):
        # Inner products of codes are whole numbers, exact in float32; they fall as the Hamming distance grows.
        order_BG = (query_BK @ database.T).argsort(dim=1, descending=True, stable=True)
        relevant_BG = database_class[order_BG] == class_B[:, None]
        if full_ranking:
            counted_BG = relevant_BG & (relevant_BG.cumsum(1) <= k)
        else:
            counted_BG = relevant_BG.clone()
            counted_BG[:, k:] = False
        precision_BG = relevant_BG.cumsum(1) / place_G
        mean_B = (precision_BG * counted_BG).sum(1) / counted_BG.sum(1).clamp_min(1)
        total += float(mean_B.sum())
    return total / len(query_codes)
