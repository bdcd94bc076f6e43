"""Stage 4, score: every distinct pair against the known swaps and its neighbours.

`judge` turns what training handed on into one noise score with its probability. It works in chunks; memory beyond the
embeddings does not grow with the number of pairs. What else fits a pair's image or caption is found in `rivals`.

Shapes: I = images; C = captions; N = pairs; S = swaps; P = planted swaps; R = reference pairs; D = dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nc_audit.calibrate import (
    NoiseRate,
    by_image,
    calibrated,
    combine_held_out,
    mean_rate,
    noise_rate,
    rate_of_probabilities,
)
from nc_audit.errors import ShapeError
from nc_audit.methods.known_swaps import (
    Evidence,
    auroc_of_probabilities,
    fused,
    pooled,
    right_by_chance,
    worth,
)
from nc_audit.methods.matching import Pairs
from nc_audit.methods.neighbours import nearest_references, neighbour_distance
from nc_audit.methods.rows import rows_at
from nc_audit.recipe import ScoreSection

if TYPE_CHECKING:
    from nc_audit.unlikely_words import WordMaps

_MOST_OWN = 30  # neighbours of the own image that are looked past
_WORDS = 1.5  # how much what words tell against a pair counts, where it tells as much as held-out heads


@dataclass(frozen=True)
class Neighbourhood:
    """What the nearest pairs say, as evidence from either side."""

    by_image: Evidence
    by_caption: Evidence

    @property
    def distance(self) -> Tensor:
        """Mean distance of each given pair from both sides' neighbours, shape [N]."""
        return (self.by_image.given_N + self.by_caption.given_N) / 2


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
            by_image.append(ask(cosine, at, excluded, rows_at(caption_CD, caption), reference_caption, trust))
            cosine, at = near_caption[0][caption], near_caption[1][caption]
            excluded = reference.image_N[at] == image[:, None]
            by_caption.append(ask(cosine, at, excluded, rows_at(image_ID, image), reference_image, trust))
        return torch.cat(by_image).cpu(), torch.cat(by_caption).cpu()

    given, swaps = distances(pairs), distances(planted)
    return Neighbourhood(Evidence(given[0], swaps[0]), Evidence(given[1], swaps[1]))


@dataclass(frozen=True)
class Draw:
    """What training hands on of one draw of known swaps (`train.Judgement`), and the vectors its own heads give.

    Attributes:
        given: quantities of the given pairs.
        swaps: those of the known swaps; `image` and `caption` hold what is put together. Empty for a method without
            swaps.
        image_ID: unit vectors of all images, shape [I, D], on any device.
        caption_CD: unit vectors of all captions, shape [C, D], on the same.
    """

    given: Mapping[str, Tensor]
    swaps: Mapping[str, Tensor]
    image_ID: Tensor
    caption_CD: Tensor

    def evidence(self, name: str) -> Evidence:
        """One quantity on given pairs and swaps."""
        return Evidence(self.given[name], self.swaps[name])

    @property
    def right(self) -> Tensor:
        """Probability of each given pair to be right by training alone, shape [N], 0..1."""
        if "clean_posterior" in self.given:
            return self.given["clean_posterior"]
        return 1 - self.given["noise_probability"]


def judge(
    draws: Sequence[Draw],
    pairs: Pairs,
    settings: ScoreSection,
    seed: int,
    *,
    whole_images: bool = False,
    words: WordMaps | None = None,
) -> tuple[NoiseRate, dict[str, Tensor]]:
    """Noise rate, noise score and probability of every distinct pair, from what training handed on.

    A method with known swaps is calibrated on them; another's own score and probability stand as they are.

    Args:
        draws: one or several of the same pairs.
        pairs: the given pairs.
        settings: the recipe's `score` section.
        seed: draws the bootstrap and the reference pairs.
        whole_images: noise strikes whole images; then each pair speaks for its image.
        words: tell against a pair word by word, where noise strikes pairs one by one.

    Returns:
        The noise rate; `noise_score` (higher = noisier), `noise_probability` (0..1) and `neighbour_distance`.

    Raises:
        ShapeError: the vectors are not those of the pairs' images and captions.
    """
    for draw in draws:
        if (len(draw.image_ID), len(draw.caption_CD)) != (pairs.num_images, pairs.num_captions):
            raise ShapeError(
                "image and caption vectors",
                f"{pairs.num_images}, D; {pairs.num_captions}, D",
                draw.image_ID.shape,
            )
    if not draws[0].swaps:
        (draw,) = draws
        probability = draw.given["noise_probability"]
        around = ask_neighbours(
            draw.image_ID,
            draw.caption_CD,
            pairs,
            pairs.select(torch.arange(0)),
            1 - probability,
            settings,
            torch.Generator().manual_seed(seed + 200),
        )
        rate = rate_of_probabilities(probability, pairs.image_N, seed)
        score, distance = draw.given["noise_score"], around.distance
    else:
        weighed = [
            _weigh(draw, pairs, settings, seed + at, words, whole_images=whole_images)
            for at, draw in enumerate(draws)
        ]
        rate = mean_rate([one.rate for one in weighed])
        evidence = weighed[0].evidence
        if len(weighed) > 1:
            found = [calibrated(one.evidence, one.rate, levelled=True).given_N for one in weighed]
            evidence = pooled([one.evidence for one in weighed], torch.stack(found).mean(0))
            rate = rate.separating(evidence)
        # In sample, swaps and noise differ a little: what is wrong teaches itself, a swap has given pairs to contradict
        # it. So the rate, for the most part, is what held-out looks say, and the swaps of the final heads only tell how
        # it spreads over their scores.
        probability = calibrated(evidence, rate, levelled=True).given_N
        score = evidence.standardised().given_N
        rate = rate.expecting(auroc_of_probabilities(probability, score))
        distance = weighed[0].around.distance
    return rate, {"noise_score": score, "noise_probability": probability, "neighbour_distance": distance}


@dataclass(frozen=True)
class _Weighed:
    """All evidence of one draw in one, the rate by it, and what neighbours said."""

    evidence: Evidence
    rate: NoiseRate
    around: Neighbourhood


def _weigh(
    draw: Draw,
    pairs: Pairs,
    settings: ScoreSection,
    seed: int,
    words: WordMaps | None,
    *,
    whole_images: bool,
) -> _Weighed:
    swapped = Pairs(draw.swaps["image"], draw.swaps["caption"], pairs.num_images, pairs.num_captions)
    by_chance = right_by_chance(
        swapped.image_N, swapped.caption_N, pairs.image_N, pairs.caption_N, pairs.num_captions
    )
    first, held, distance = (draw.evidence(name) for name in ("first", "loss", "distance"))
    held_out = combine_held_out(
        first, held, distance, pairs.image_N, swapped.image_N, whole_images, seed, by_chance
    )
    around = ask_neighbours(
        draw.image_ID,
        draw.caption_CD,
        pairs,
        swapped,
        1 - held_out.posterior.given_N,
        settings,
        torch.Generator().manual_seed(seed + 200),
        own_captions_vote=not whole_images,
    )
    # Losses rank better than cosines, and those of the final heads, which saw the most pairs, best of all.
    final = draw.evidence("final_loss")
    if whole_images:
        evidence = fused(first, held, distance, final, around.by_image, around.by_caption)
        return _Weighed(by_image(evidence, pairs.image_N, swapped.image_N), held_out.rate, around)
    evidence = fused(held, final, final, around.by_image, around.by_caption)
    if "zero_shot_loss" in draw.given:
        untrained = draw.evidence("zero_shot_loss")
        evidence = evidence + untrained.times(worth(untrained, held))
    if words is not None and settings.words:
        total, least = _told_by(words, swapped, seed)
        weight = _WORDS * worth(fused(total, least), held)
        evidence = evidence + total.times(weight) + least.times(weight)
    rate = noise_rate(
        evidence,
        pairs.image_N,
        swapped.image_N,
        seed,
        also=(held_out.evidence, swapped.image_N),
        right_by_chance=by_chance,
    )
    return _Weighed(evidence.standardised(), rate, around)


def _told_by(words: WordMaps, swapped: Pairs, seed: int) -> tuple[Evidence, Evidence]:
    """What all words tell against pairs and swaps, and what the least likely one does."""
    given = words.given
    swaps = words.swaps(swapped.image_N.numpy(), swapped.caption_N.numpy(), seed)
    total, least = (given.total_N, swaps.total_N), (given.least, swaps.least)
    return Evidence(*map(torch.from_numpy, total)), Evidence(*map(torch.from_numpy, least))
