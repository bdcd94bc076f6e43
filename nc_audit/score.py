"""Stage 4, score: every distinct pair against the known swaps, its neighbours and all other captions and images.

`judge` turns what training handed on into one noise score with its probability. `look_around` finds where each
pair's own caption and image stand among the others, and which fit better. Both work in chunks; memory beyond the
embeddings does not grow with the number of pairs.

Shapes: I = images; C = captions; N = pairs; S = swaps; P = planted swaps; R = reference pairs; D = dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nc_audit.calibrate import (
    NoiseRate,
    by_image,
    calibrated,
    combine_held_out,
    noise_rate,
    rate_of_probabilities,
)
from nc_audit.errors import ShapeError
from nc_audit.methods.known_swaps import (
    Evidence,
    auroc_of_probabilities,
    fused,
    right_by_chance,
    worth,
)
from nc_audit.methods.matching import Pairs, positions
from nc_audit.methods.neighbours import nearest_references, neighbour_distance
from nc_audit.recipe import ScoreSection

_MOST_COSINES = 5 * 10**9  # in a search for ranks and best matches
_MOST_OWN = 30  # neighbours of the own image that are looked past


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
    *,
    own_captions_vote: bool = False,
) -> Neighbourhood:
    """Distance of each pair, and of each planted swap, from its neighbours on either side.

    A pair never votes on itself, nor do the captions of its image on the image.

    Args:
        image_ID: unit vectors of all images, shape [I, D].
        caption_CD: unit vectors of all captions, shape [C, D].
        pairs: the given pairs.
        planted: the swaps that sat in training.
        trust_N: probability of each given pair to be clean, shape [N].
        settings: the recipe's `score` section.
        generator: draws the reference pairs.
        own_captions_vote: an image's other captions are heard about its caption, being those of its very nearest
            image. Where noise strikes whole images they err together, and must not be.
    """
    order = torch.randperm(len(pairs), generator=generator)
    order = order[trust_N[order] >= settings.min_trust][: settings.references].sort().values
    reference = pairs.select(order)
    if not len(reference):
        nothing = Evidence(torch.zeros(len(pairs)), torch.zeros(len(planted)))
        return Neighbourhood(nothing, nothing)
    device = image_ID.device
    trust = trust_N[order].to(device)
    reference, pairs, planted = (one.to(device) for one in (reference, pairs, planted))
    reference_image, reference_caption = image_ID[reference.image_N], caption_CD[reference.caption_N]
    # What is near depends on the image (or the caption) alone, so each distinct one looks once. More are looked up than
    # vote, for those of the own image are left out.
    own = int(torch.bincount(reference.image_N).max())
    looked_up = settings.neighbours + min(own, _MOST_OWN)
    near_image = nearest_references(image_ID, reference_image, looked_up)
    near_caption = nearest_references(caption_CD, reference_caption, looked_up)

    def distances(asked: Pairs) -> tuple[Tensor, Tensor]:
        by_image, by_caption = [], []
        for image, caption in zip(asked.image_N.split(4096), asked.caption_N.split(4096), strict=True):
            ask = partial(
                neighbour_distance, num_neighbours=settings.neighbours, sharpness=settings.sharpness
            )
            cosine, at = near_image[0][image], near_image[1][image]
            excluded = reference.image_N[at] == image[:, None]
            if own_captions_vote:
                excluded &= reference.caption_N[at] == caption[:, None]
            by_image.append(ask(cosine, at, excluded, caption_CD[caption], reference_caption, trust))
            cosine, at = near_caption[0][caption], near_caption[1][caption]
            excluded = reference.image_N[at] == image[:, None]
            by_caption.append(ask(cosine, at, excluded, image_ID[image], reference_image, trust))
        return torch.cat(by_image).cpu(), torch.cat(by_caption).cpu()

    given, swaps = distances(pairs), distances(planted)
    return Neighbourhood(Evidence(given[0], swaps[0]), Evidence(given[1], swaps[1]))


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
    cosines = query_QD.new_empty(min(block, len(query_QD)), len(candidates_MD))
    for start in range(0, len(query_QD), block):
        part = query_QD[start : start + block]
        low, high = torch.searchsorted(ordered_query, query_N.new_tensor([start, start + len(part)])).tolist()
        if low == high:
            continue
        at = order[low:high]
        asking, own = query_N[at] - start, other_N[at]
        cosine = torch.mm(part, candidates_MD.T, out=cosines[: len(part)])
        known = position[own] >= 0
        # The own match from the very product its rivals come from, so that equal vectors tie exactly.
        own_cosine = (part[asking] * other_OD[own]).sum(1)
        own_cosine[known] = cosine[asking[known], position[own[known]]]
        cosine[asking[known], position[own[known]]] = float("-inf")
        top, top_at = cosine.max(1)
        best[at] = torch.where(torch.isfinite(top), candidate_M[top_at], -1)[asking]
        margin[at] = torch.where(torch.isfinite(top), top, torch.nan)[asking] - own_cosine
        for some in torch.arange(len(at), device=device).split(256):
            rank[at[some]] += _count_above(cosine[asking[some]], own_cosine[some])
    return LookUp(rank.cpu(), best.cpu(), margin.cpu())


def _count_above(values_BM: Tensor, bound_B: Tensor) -> Tensor:
    """How many of each row's values lie above the row's bound, int32, shape [B].

    Torch sums truth values one by one. Eight of them read as one integer are summed at once, up to 128 at a time, so
    that no byte overflows: six times as fast.
    """
    num, num_values = values_BM.shape
    is_above = values_BM.new_zeros(num, -(-num_values // 1024) * 1024, dtype=torch.bool)
    is_above[:, :num_values] = values_BM > bound_B[:, None]
    by_byte = is_above.view(torch.int64).view(num, -1, 128).sum(2).view(torch.uint8)
    return by_byte.sum(1, dtype=torch.int32)


def judge(
    given: Mapping[str, Tensor],
    swaps: Mapping[str, Tensor],
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    settings: ScoreSection,
    seed: int,
    *,
    whole_images: bool = False,
) -> tuple[NoiseRate, dict[str, Tensor]]:
    """Noise rate, noise score and probability of every distinct pair, from what training handed on.

    A method with known swaps is calibrated on them; another's own score and probability stand as they are.

    Args:
        given: quantities of the given pairs (`train.Judgement.given`).
        swaps: those of the known swaps; `image` and `caption` hold what is put together. Empty for a method without
            swaps.
        image_ID: unit vectors of all images by the final heads, shape [I, D], on any device.
        caption_CD: unit vectors of all captions by the final heads, shape [C, D], on the same.
        pairs: the given pairs.
        settings: the recipe's `score` section.
        seed: draws the bootstrap and the reference pairs.
        whole_images: noise strikes whole images; then each pair speaks for its image.

    Returns:
        The noise rate; `noise_score` (higher = noisier), `noise_probability` (0..1) and `neighbour_distance`.

    Raises:
        ShapeError: the vectors are not those of the pairs' images and captions.
    """
    if (len(image_ID), len(caption_CD)) != (pairs.num_images, pairs.num_captions):
        raise ShapeError(
            "image and caption vectors", f"{pairs.num_images}, D; {pairs.num_captions}, D", image_ID.shape
        )
    generator = torch.Generator().manual_seed(seed + 200)
    if not swaps:
        probability = given["noise_probability"]
        around = ask_neighbours(
            image_ID, caption_CD, pairs, pairs.select(torch.arange(0)), 1 - probability, settings, generator
        )
        rate = rate_of_probabilities(probability, pairs.image_N, seed)
        score = given["noise_score"]
    else:
        swapped = Pairs(swaps["image"], swaps["caption"], pairs.num_images, pairs.num_captions)
        by_chance = right_by_chance(
            swapped.image_N, swapped.caption_N, pairs.image_N, pairs.caption_N, pairs.num_captions
        )
        held_out = combine_held_out(
            Evidence(given["first"], swaps["first"]),
            Evidence(given["loss"], swaps["loss"]),
            Evidence(given["distance"], swaps["distance"]),
            pairs.image_N,
            swaps["image"],
            whole_images,
            seed,
            by_chance,
        )
        trust_N = 1 - held_out.posterior.given_N
        around = ask_neighbours(
            image_ID,
            caption_CD,
            pairs,
            swapped,
            trust_N,
            settings,
            generator,
            own_captions_vote=not whole_images,
        )
        # Losses rank better than cosines, and those of the final heads, which saw the most pairs, best of all.
        final = Evidence(given["final_loss"], swaps["final_loss"])
        held = Evidence(given["loss"], swaps["loss"])
        if whole_images:
            # The captions of a wrong image teach each other, those of a planted one have their own pairs to
            # contradict them: in sample the two differ a little, so the held-out look states the rate, and the swaps of
            # the final heads only how it spreads over their scores.
            first = Evidence(given["first"], swaps["first"])
            distance = Evidence(given["distance"], swaps["distance"])
            evidence = by_image(
                fused(first, held, distance, final, around.by_image, around.by_caption),
                pairs.image_N,
                swapped.image_N,
            )
            rate = held_out.rate
            probability = calibrated(evidence, rate, levelled=True).given_N
        else:
            evidence = fused(held, final, final, around.by_image, around.by_caption)
            if "zero_shot_loss" in given:
                untrained = Evidence(given["zero_shot_loss"], swaps["zero_shot_loss"])
                evidence = evidence + untrained.times(worth(untrained, held))
            rate = noise_rate(
                evidence,
                pairs.image_N,
                swapped.image_N,
                seed,
                also=(held_out.evidence, swaps["image"]),
                right_by_chance=by_chance,
            )
            probability = calibrated(evidence, rate).given_N
        score = evidence.standardised().given_N
        rate = rate.expecting(auroc_of_probabilities(probability, score))
    return rate, {
        "noise_score": score,
        "noise_probability": probability,
        "neighbour_distance": (around.by_image.given_N + around.by_caption.given_N) / 2,
    }


def num_searched(pairs: Pairs, settings: ScoreSection) -> int:
    """How many captions and images ranks and best matches search: fewer where very many ask, so that time is linear."""
    asking = max(pairs.num_images, pairs.num_captions)
    return min(settings.rank_candidates, asking, max(1_000, _MOST_COSINES // asking))


def look_around(
    image_ID: Tensor, caption_CD: Tensor, pairs: Pairs, settings: ScoreSection, seed: int
) -> dict[str, Tensor]:
    """Where each pair stands among all captions and images, and what fits better.

    Args:
        image_ID: unit vectors of all images by the final heads, shape [I, D], on any device.
        caption_CD: unit vectors of all captions by the final heads, shape [C, D], on the same.
        pairs: the given pairs.
        settings: the recipe's `score` section.
        seed: draws the candidates where there are more than are searched.

    Returns:
        Columns of `scores` by name, each of shape [N]; `best_caption` and `best_image` as indices, -1 for none.
    """
    generator = torch.Generator().manual_seed(seed + 300)
    searched = num_searched(pairs, settings)
    captions = look_up(image_ID, caption_CD, pairs.image_N, pairs.caption_N, searched, generator)
    images = look_up(caption_CD, image_ID, pairs.caption_N, pairs.image_N, searched, generator)
    return {
        "caption_rank": captions.rank,
        "image_rank": images.rank,
        "best_caption": captions.best,
        "best_caption_margin": captions.margin,
        "best_image": images.best,
        "best_image_margin": images.margin,
    }
