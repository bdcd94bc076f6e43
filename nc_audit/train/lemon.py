"""LEMoN in its fixed setting: the cosine of a pair, corrected by what its neighbours say (`methods.lemon`).

It works on the embeddings of aligned encoders as they are; with others, on those of plainly trained heads, which
the paper does not know.
"""

from __future__ import annotations

import torch

from nc_audit.methods.lemon import lemon_score, neighbour_noise
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs, Judgement, Progress, silent
from nc_audit.train.similarity import plain_space


def train_lemon(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Judge every pair by its own distance and its neighbours'.

    Adds `image_noise` (s_n, by nearby images) and `caption_noise` (s_m, by nearby captions), both 0..2, higher =
    the neighbours contradict the pair. `noise_probability` is the posterior of the worse of two normal components
    on the score, not calibrated.

    Raises:
        TrainingError: a loss is not finite.
    """
    lemon, pairs = settings.lemon, inputs.pairs
    space = plain_space(inputs, settings, progress)
    generator = torch.Generator().manual_seed(settings.seed + 20)
    reference_R = torch.randperm(len(pairs), generator=generator)[: lemon.references].sort().values
    distance_N = (1 - space.matches.similarity).clamp_min(0.0)
    image, caption = (space.image_ID, pairs.image_N), (space.caption_CD, pairs.caption_N)
    image_noise_N, caption_noise_N = (
        neighbour_noise(
            query_QD,
            other_XD,
            query_N,
            other_N,
            distance_N,
            reference_R,
            lemon.neighbours,
            lemon.nearness,
            lemon.cleanness,
        )
        for (query_QD, query_N), (other_XD, other_N) in ((image, caption), (caption, image))
    )
    score_N = lemon_score(
        distance_N, image_noise_N, caption_noise_N, lemon.image_factor, lemon.caption_factor
    )
    return space.judgement(inputs, score_N, image_noise=image_noise_N, caption_noise=caption_noise_N)
