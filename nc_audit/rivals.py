"""Which captions and images rival each pair's own: the ranks of the own ones, and what fits better.

Each distinct image looks through captions once, each distinct caption through images. Up to some billions of cosines
all are compared with all. Beyond that ranks stand among a random part of the others; best matches come from all of
them by an index of faiss where that extra is installed, and from the same part where it is not.

Shapes: I = images; C = captions; N = pairs; Q = queries; O = others, the side looked through; D = dimensions.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nc_audit.errors import RecipeError
from nc_audit.methods.matching import Pairs, positions
from nc_audit.methods.rows import paired_products, rows_at
from nc_audit.recipe import ScoreSection

_MOST_COSINES = {"cpu": 5 * 10**9, "cuda": 10**12}
"""From either side; those of a GPU are meant for sets of a few million pairs, and untried."""
_LEAST = 1_000  # others that are compared, however many ask
_CELLS_PER_ROOT = 2.0  # cells of the index, by the root of what it holds
_LEARNT_FROM = 40  # vectors per cell
_CELLS_LOOKED_INTO = 12
_MOST_OWN = 64  # matches of the index that are looked past for being the query's own
_WEIGHED = 4  # of the others, by their true cosines
_ASKED_AT_ONCE = 8_192
_PIECE = 64  # of a row of cosines
_COUNTED_AT_ONCE = 64  # queries, so that what is counted stays in the cache


@dataclass(frozen=True)
class Reach:
    """How far the search goes: with how many others everything is compared, and whether an index holds all of them."""

    compared: int
    has_index: bool = False

    def told(self, num_images: int, num_captions: int) -> str | None:
        """What a user should know: in a sentence what was not searched; None where everything was."""
        sides = {"captions": num_captions, "images": num_images}
        left_out = [f"{num:,} {side}" for side, num in sides.items() if num > self.compared]
        if self.has_index or not left_out:
            return None
        return (
            f"ranks and best matches: {self.compared:,} of {' and of '.join(left_out)} were searched; "
            "pip install 'nc-audit[faiss]' finds best matches among all"
        )


def check_search(settings: ScoreSection) -> bool:
    """Whether faiss is installed.

    Raises:
        RecipeError: it is asked for and is not.
    """
    has_faiss = importlib.util.find_spec("faiss") is not None
    if settings.search == "faiss" and not has_faiss:
        raise RecipeError('score.search = "faiss" needs the package faiss', "pip install 'nc-audit[faiss]'")
    return has_faiss


def reach(num_images: int, num_captions: int, settings: ScoreSection, device: str = "cpu") -> Reach:
    """How far to search where so many images and captions ask: fewer others where very many do, so that time is linear.

    Raises:
        RecipeError: faiss is asked for and not installed.
    """
    asking = max(num_images, num_captions)
    most = _MOST_COSINES["cpu" if device == "cpu" else "cuda"]
    compared = min(settings.rank_candidates, asking, max(_LEAST, most // max(1, asking)))
    has_faiss = check_search(settings)
    return Reach(compared, has_faiss and settings.search != "part" and compared < asking)


def look_around(
    image_ID: Tensor, caption_CD: Tensor, pairs: Pairs, far: Reach, seed: int
) -> dict[str, Tensor]:
    """Where each pair stands among all captions and images, and what fits better.

    Args:
        image_ID: unit vectors of all images by the final heads, shape [I, D], on any device.
        caption_CD: unit vectors of all captions by the final heads, shape [C, D], on the same.
        pairs: the given pairs.
        far: how far to search.
        seed: draws what is searched where that is not all.

    Returns:
        Columns of `scores` by name, each of shape [N]; `best_caption` and `best_image` as indices, -1 for none.
    """
    generator = torch.Generator().manual_seed(seed + 300)
    captions = look_up(image_ID, caption_CD, pairs.image_N, pairs.caption_N, far.compared, generator)
    images = look_up(caption_CD, image_ID, pairs.caption_N, pairs.image_N, far.compared, generator)
    if far.has_index:
        captions = widened(captions, image_ID, caption_CD, pairs.image_N, pairs.caption_N, seed)
        images = widened(images, caption_CD, image_ID, pairs.caption_N, pairs.image_N, seed)
    return {
        "caption_rank": captions.rank,
        "image_rank": images.rank,
        "best_caption": captions.best,
        "best_caption_margin": captions.margin,
        "best_image": images.best,
        "best_image_margin": images.margin,
    }


@dataclass(frozen=True)
class LookUp:
    """Where each pair's own match stands among the others, and what fits better; each of shape [N].

    Ranks count from 1 = best. `best` is -1 where there is no other; `margin` is its cosine minus the own one's.
    """

    rank: Tensor
    best: Tensor
    margin: Tensor


def look_up(
    query_QD: Tensor,
    other_OD: Tensor,
    query_N: Tensor,
    other_N: Tensor,
    num_candidates: int,
    generator: torch.Generator,
    block: int = 512,
) -> LookUp:
    """Rank each pair's own other side among the other sides of all pairs, and find the best that is not its own.

    All others that the query is paired with are left out: they are matches, not rivals.

    Args:
        query_QD: unit vectors of the side that asks, shape [Q, D].
        other_OD: unit vectors of the side looked up, shape [O, D].
        query_N: each pair's index on the asking side, shape [N].
        other_N: each pair's index on the other side, shape [N].
        num_candidates: search at most this many others, drawn at random where there are more.
        generator: draws them.
        block: queries at a time; memory is block x candidates.
    """
    num_others, device = len(other_OD), other_OD.device
    query_N, other_N = query_N.to(device), other_N.to(device)
    candidate_M = torch.arange(num_others)
    if num_others > num_candidates:
        candidate_M = torch.randperm(num_others, generator=generator)[:num_candidates].sort().values
    position = positions(candidate_M, num_others).to(device)
    candidate_M = candidate_M.to(device)
    candidates_MD = other_OD[candidate_M]
    order = query_N.argsort(stable=True)
    ordered_query = query_N[order]
    rank = torch.ones(len(query_N), dtype=torch.int32, device=device)
    best = torch.full((len(query_N),), -1, dtype=torch.long, device=device)
    margin = torch.full((len(query_N),), float("nan"), device=device)
    width = -(-len(candidates_MD) // _PIECE) * _PIECE
    cosines = query_QD.new_full((min(block, len(query_QD)), width), float("-inf"))
    for start in range(0, len(query_QD), block):
        part = query_QD[start : start + block]
        low, high = torch.searchsorted(ordered_query, query_N.new_tensor([start, start + len(part)])).tolist()
        if low == high:
            continue
        at = order[low:high]
        asking, own = query_N[at] - start, other_N[at]
        cosine = torch.mm(part, candidates_MD.T, out=cosines[: len(part), : len(candidates_MD)])
        known = position[own] >= 0
        # The own match from the very product its rivals come from, so that equal vectors tie exactly.
        own_cosine = (rows_at(part, asking) * rows_at(other_OD, own)).sum(1)
        own_cosine[known] = cosine[asking[known], position[own[known]]]
        cosine[asking[known], position[own[known]]] = float("-inf")
        top, top_at = _largest(cosines[: len(part)])
        best[at] = torch.where(torch.isfinite(top), candidate_M[top_at], -1)[asking]
        margin[at] = torch.where(torch.isfinite(top), top, torch.nan)[asking] - own_cosine
        for rows, some in _a_few_at_once(asking, len(part)):
            rank[at[some]] += _count_above(cosine[rows], own_cosine[some])
    return LookUp(rank.cpu(), best.cpu(), margin.cpu())


def _a_few_at_once(asking_B: Tensor, num: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Rows of queries, and the places among the pairs that ask them, some at a time: first pairs first, then others.

    The first pairs of queries of which each has one ask by a slice, which copies no row.

    Args:
        asking_B: row of each pair's query, ascending, shape [B].
        num: rows there are.
    """
    is_first = torch.ones_like(asking_B, dtype=torch.bool)
    is_first[1:] = asking_B[1:] != asking_B[:-1]
    for mine in (is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0]):
        is_whole = len(mine) == num and bool(is_first[mine[0]])
        for start in range(0, len(mine), _COUNTED_AT_ONCE):
            some = mine[start : start + _COUNTED_AT_ONCE]
            yield slice(start, start + len(some)) if is_whole else asking_B[some], some


def _largest(values_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest value and the first place where it is, shapes [B]; rows are whole pieces.

    Torch finds the largest of many several at once where it is not asked for the place: so that is looked for in the
    one piece that has it.
    """
    pieces_BPS = values_BM.unflatten(1, (-1, _PIECE))
    piece_B = pieces_BPS.amax(2).argmax(1)
    row_B = torch.arange(len(values_BM), device=values_BM.device)
    top_B, place_B = pieces_BPS[row_B, piece_B].max(1)
    return top_B, piece_B * _PIECE + place_B


def _count_above(values_BM: Tensor, bound_B: Tensor) -> Tensor:
    """How many of each row's values lie above the row's bound, int32, shape [B].

    Truth values as float32, of which sums are exact up to 16 million: torch makes and sums them several at once, which
    it does not where they are booleans.
    """
    is_above = torch.empty_like(values_BM, dtype=torch.float32)
    return torch.gt(values_BM, bound_B[:, None], out=is_above).sum(1).int()


def widened(
    found: LookUp, query_QD: Tensor, other_OD: Tensor, query_N: Tensor, other_N: Tensor, seed: int
) -> LookUp:
    """The same with the best match among all others, where an index finds one that fits better than the found.

    The index (inverted lists over cells of k-means, a byte a number) proposes, float32 cosines decide. It misses some:
    what is nearest may lie in a cell that is not looked into.

    Args:
        found: of a search among a part of the others.
        query_QD: unit vectors of the side that asks, shape [Q, D].
        other_OD: unit vectors of the side looked through, shape [O, D].
        query_N: each pair's index on the asking side, shape [N].
        other_N: each pair's index on the other side, shape [N].
        seed: of the index's cells.
    """
    import faiss

    query_QD, other_OD = query_QD.cpu(), other_OD.cpu()
    num, dims = other_OD.shape
    cells = max(1, int(_CELLS_PER_ROOT * math.sqrt(num)))
    coarse = faiss.IndexFlatIP(dims)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, dims, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.nprobe = min(cells, _CELLS_LOOKED_INTO)
    index.cp.seed, index.cp.spherical = seed, True
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _LEARNT_FROM
    generator = torch.Generator().manual_seed(seed)
    learnt_from = torch.randperm(num, generator=generator)[: _LEARNT_FROM * cells].sort().values
    faiss.omp_set_num_threads(torch.get_num_threads())
    index.train(other_OD[learnt_from].numpy())
    for part in other_OD.split(_ASKED_AT_ONCE):
        index.add(part.numpy())

    own = (query_N * num + other_N).unique()
    most_own = int(torch.bincount(query_N).max())
    best_Q = torch.full((len(query_QD),), -1, dtype=torch.long)
    top_Q = torch.full((len(query_QD),), -torch.inf)
    for at in torch.arange(len(query_QD)).split(_ASKED_AT_ONCE):
        _, proposed = index.search(query_QD[at].numpy(), min(most_own, _MOST_OWN) + _WEIGHED)
        proposed_BK = torch.from_numpy(proposed)
        keys = at[:, None] * num + proposed_BK
        place = torch.searchsorted(own, keys).clamp_max(len(own) - 1)
        is_rival = (proposed_BK >= 0) & (own[place] != keys)
        # the first few that are not the query's own, moved to the front
        order = (~is_rival).byte().argsort(dim=1, stable=True)[:, :_WEIGHED]
        proposed_BK, is_rival = proposed_BK.gather(1, order), is_rival.gather(1, order)
        cosine_BK = torch.einsum("bd,bkd->bk", query_QD[at], other_OD[proposed_BK.clamp_min(0)])
        cosine, first = cosine_BK.masked_fill(~is_rival, -torch.inf).max(1)
        best, known = proposed_BK.gather(1, first[:, None])[:, 0], torch.isfinite(cosine)
        best_Q[at], top_Q[at] = torch.where(known, best, -1), torch.where(known, cosine, -torch.inf)
    own_cosine = paired_products(query_QD, other_OD, query_N, other_N)
    margin = top_Q[query_N] - own_cosine
    is_better = (best_Q[query_N] >= 0) & ~(margin <= found.margin)
    return replace(
        found,
        best=torch.where(is_better, best_Q[query_N], found.best),
        margin=torch.where(is_better, margin, found.margin),
    )
