"""Stage 4, score: every distinct pair against the known swaps, its neighbours and all other captions and images.

`combine` turns the evidence of training into one noise score with its probability. `look_up` finds where each
pair's own caption and image stand among the others, and which fit better. Both work in chunks; memory beyond the
embeddings does not grow with the number of pairs.

Shapes: I = images; C = captions; N = pairs; S = swaps; P = planted swaps; R = reference pairs; D = dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nc_audit.calibrate import NoiseRate, noise_rate
from nc_audit.methods.known_swaps import Evidence, fused, intra_image_correlation
from nc_audit.methods.matching import Pairs
from nc_audit.methods.neighbours import neighbour_distance
from nc_audit.recipe import ScoreSection

IMAGE_MODE_CORRELATION = 0.5
IMAGE_MODE_MIN_RATE = 0.03


def strikes_whole_images(posterior_N: Tensor, rate: float, image_N: Tensor) -> bool:
    """Whether noise seems to strike all captions of an image together, rather than pair by pair.

    Args:
        posterior_N: noise probability of the first look, shape [N].
        rate: its noise rate, 0..1.
        image_N: index of each pair's image, shape [N].
    """
    correlation = intra_image_correlation(posterior_N, image_N)
    return correlation > IMAGE_MODE_CORRELATION and rate > IMAGE_MODE_MIN_RATE


def image_mean(value_N: Tensor, image_N: Tensor) -> Tensor:
    """Mean of a value over the pairs of each pair's image, shape [N]."""
    size = int(image_N.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, image_N, value_N.double())
    return (total / torch.bincount(image_N, minlength=size).clamp_min(1))[image_N].to(value_N.dtype)


@dataclass(frozen=True)
class Neighbourhood:
    """What the nearest pairs say, as evidence from either side."""

    by_image: Evidence
    by_caption: Evidence


def ask_neighbours(
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    planted: Pairs,
    trust_N: Tensor,
    settings: ScoreSection,
    generator: torch.Generator,
) -> Neighbourhood:
    """Distance of each pair, and of each planted swap, from its neighbours on either side.

    Args:
        image_ID: unit vectors of all images, shape [I, D].
        caption_CD: unit vectors of all captions, shape [C, D].
        pairs: the given pairs.
        planted: the swaps that sat in training.
        trust_N: probability of each given pair to be clean, shape [N].
        settings: the recipe's `score` section.
        generator: draws the reference pairs.
    """
    order = torch.randperm(len(pairs), generator=generator)
    order = order[trust_N[order] >= settings.min_trust][: settings.references].sort().values
    reference = pairs.select(order)
    if not len(reference):
        nothing = Evidence(torch.zeros(len(pairs)), torch.zeros(len(planted)))
        return Neighbourhood(nothing, nothing)
    trust = trust_N[order]
    reference_image, reference_caption = image_ID[reference.image_N], caption_CD[reference.caption_N]

    def distances(asked: Pairs) -> tuple[Tensor, Tensor]:
        by_image, by_caption = [], []
        for image, caption in zip(asked.image_N.split(1024), asked.caption_N.split(1024), strict=True):
            same_image = image[:, None] == reference.image_N[None, :]
            query, other = image_ID[image], caption_CD[caption]
            by_image.append(
                neighbour_distance(
                    query, other, reference_image, reference_caption, trust, same_image, settings.neighbours
                )
            )
            by_caption.append(
                neighbour_distance(
                    other, query, reference_caption, reference_image, trust, same_image, settings.neighbours
                )
            )
        return torch.cat(by_image), torch.cat(by_caption)

    given, swaps = distances(pairs), distances(planted)
    return Neighbourhood(Evidence(given[0], swaps[0]), Evidence(given[1], swaps[1]))


@dataclass(frozen=True)
class HeldOut:
    """The fused out-of-fold evidence: rate and posterior that training did not touch."""

    evidence: Evidence
    rate: NoiseRate
    posterior: Evidence


def combine_held_out(
    first: Evidence,
    loss: Evidence,
    distance: Evidence,
    pairs: Pairs,
    swap_image_S: Tensor,
    whole_images: bool,
    seed: int,
) -> HeldOut:
    """Fuse the first look with the held-out loss and distance.

    When noise strikes whole images, each pair speaks for its image: the evidence is averaged over the image's
    pairs, on given pairs and on swaps alike.
    """
    evidence = fused(first, loss, distance)
    if whole_images:
        evidence = Evidence(
            image_mean(evidence.given_N, pairs.image_N), image_mean(evidence.swaps_S, swap_image_S)
        ).standardised()
    rate = noise_rate(evidence, pairs.image_N, swap_image_S, seed)
    return HeldOut(evidence, rate, evidence.posterior(rate.estimate))


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
    num_others = len(other_OD)
    candidate_M = torch.arange(num_others)
    if num_others > num_candidates:
        candidate_M = torch.randperm(num_others, generator=generator)[:num_candidates].sort().values
    position = torch.full((num_others,), -1, dtype=torch.long)
    position[candidate_M] = torch.arange(len(candidate_M))
    candidates_MD = other_OD[candidate_M]
    order = query_N.argsort(stable=True)
    ordered_query = query_N[order]
    rank = torch.ones(len(query_N), dtype=torch.int32)
    best = torch.full((len(query_N),), -1, dtype=torch.long)
    margin = torch.full((len(query_N),), float("nan"))
    for start in range(0, len(query_QD), block):
        part = query_QD[start : start + block]
        low, high = torch.searchsorted(ordered_query, torch.tensor([start, start + len(part)])).tolist()
        if low == high:
            continue
        at = order[low:high]
        asking, own = query_N[at] - start, other_N[at]
        cosine = part @ candidates_MD.T
        own_cosine = (part[asking] * other_OD[own]).sum(1)
        known = position[own] >= 0
        cosine[asking[known], position[own[known]]] = float("-inf")
        top, top_at = cosine.max(1)
        best[at] = torch.where(torch.isfinite(top), candidate_M[top_at], -1)[asking]
        margin[at] = torch.where(torch.isfinite(top), top, torch.nan)[asking] - own_cosine
        for some in torch.arange(len(at)).split(256):
            rank[at[some]] += (cosine[asking[some]] > own_cosine[some, None]).sum(1, dtype=torch.int32)
    return LookUp(rank, best, margin)
