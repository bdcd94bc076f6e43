"""A first look at the pairs, from the embeddings alone and before any head is trained.

The mutual-information variation of each pair is fitted on other images and reweighted a few times towards the pairs
that look clean; known swaps give it a probability. Where encoders are aligned, their own cosine adds to it.

Shapes: I = images; C = captions; N = given pairs; S = planted swaps; T = N + S, the swaps behind the pairs;
D = dimensions; K = principal components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from nc_audit.methods.known_swaps import Evidence, worth
from nc_audit.methods.matching import Pairs, match
from nc_audit.methods.mutual_information import GaussianDependence, Moments
from nc_audit.methods.projections import principal_projection, unit_vectors
from nc_audit.methods.rows import rows_at
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs

MIN_WEIGHT = 0.001
_MOST_FITTED = 65_536  # pairs, evenly drawn


@dataclass(frozen=True)
class View:
    """Whitened principal components of both sides, as a Gaussian takes them: shapes [I, K], [C, K']."""

    image_IK: Tensor
    caption_CK: Tensor

    def joint(self, pairs: Pairs, at: Tensor) -> Tensor:
        """The image's components of some pairs beside the caption's, shape [len(at), K + K']."""
        return torch.cat(
            [rows_at(self.image_IK, pairs.image_N[at]), rows_at(self.caption_CK, pairs.caption_N[at])], 1
        )


def views_of(image_ID: Tensor, caption_CD: Tensor, num_pairs: int, settings: TrainSection) -> list[View]:
    """A view for each of `first_look_dims`, as far as there are pairs enough to fit on.

    Args:
        image_ID: image embeddings, shape [I, D].
        caption_CD: caption embeddings, shape [C, D'].
        num_pairs: how many pairs there are.
        settings: `first_look_dims`.
    """
    cap = max(2, num_pairs // 12)
    dims = sorted({min(num, cap) for num in settings.first_look_dims})
    # The components of fewer dimensions are the first of those of more.
    image, caption = (principal_projection(side, dims[-1])(side) for side in (image_ID, caption_CD))
    return [View(image[:, :num], caption[:, :num]) for num in dims]


@dataclass(frozen=True)
class FirstLook:
    """What the embeddings alone say of each pair."""

    evidence: Evidence
    variation_N: Tensor
    rate: float
    posterior_N: Tensor


def first_look(
    views: Sequence[View], pairs: Pairs, swaps: Pairs, fold_T: Tensor, settings: TrainSection
) -> FirstLook:
    """Mutual-information variation of each pair, out of fold by image, reweighted towards the clean pairs.

    A fold's own pairs are not fitted on, yet they helped to weigh those that are: they have supported what is like
    them. So the swaps are fitted on and weighed in the same way, and score as noise does.

    Args:
        views: what is looked at, by `views_of`; what they say is summed.
        pairs: the given pairs.
        swaps: the planted swaps, S of them.
        fold_T: fold of each given pair and of each swap behind them, the same for all pairs of an image,
            shape [N + S].
        settings: `first_look_rounds`, `shrinkage`.

    Returns:
        Evidence (higher = noisier), the raw variation (nats, higher = agree), the rate and the posterior.
    """
    total: Evidence | None = None
    variation_N = torch.zeros(len(pairs))
    for view in views:
        one, raw = _variation_rounds(view, pairs, swaps, fold_T, settings)
        total = one.standardised() if total is None else total + one.standardised()
        variation_N = variation_N + raw / len(views)
    assert total is not None
    rate = total.rate()
    return FirstLook(total, variation_N, rate, total.posterior(rate).given_N)


def _variation_rounds(
    view: View, pairs: Pairs, swaps: Pairs, fold_T: Tensor, settings: TrainSection
) -> tuple[Evidence, Tensor]:
    num = len(pairs)
    together = pairs.and_more(swaps)
    weight_T, variation_T = torch.ones(len(together)), torch.empty(len(together))
    evidence = Evidence(torch.zeros(num), torch.zeros(len(swaps)))
    inside = [(fold_T == fold).nonzero().squeeze(1) for fold in range(int(fold_T.max()) + 1)]
    # What is fitted on the pairs outside a fold: each fold's sums are worked out once, and those of the others added.
    step = max(1, math.ceil(len(together) / _MOST_FITTED))
    for _ in range(settings.first_look_rounds):
        sums = [Moments.of(view.joint(together, at[::step]), weight_T[at[::step]]) for at in inside]
        for fold, at in enumerate(inside):
            others = reduce(Moments.__add__, (one for other, one in enumerate(sums) if other != fold))
            dependence = GaussianDependence.of_moments(others, view.image_IK.shape[1], settings.shrinkage)
            for part in at.split(65_536):
                variation_T[part] = dependence.variation(
                    rows_at(view.image_IK, together.image_N[part]),
                    rows_at(view.caption_CK, together.caption_N[part]),
                )
        evidence = Evidence(-variation_T[:num], -variation_T[num:])
        found = evidence.posterior(evidence.rate())
        weight_T = (1 - torch.cat([found.given_N, found.swaps_S])).clamp_min(MIN_WEIGHT)
    return evidence, variation_T[:num].clone()


def zero_shot(inputs: Inputs, swaps: Pairs) -> Evidence | None:
    """What aligned encoders say without any training: the loss of pairs and swaps by their own cosine.

    None where the encoders are not aligned.
    """
    if inputs.logit_scale is None:
        return None
    image, caption = unit_vectors(inputs.image_ID), unit_vectors(inputs.caption_CD)
    asked = [(one.image_N, one.caption_N) for one in (inputs.pairs, swaps)]
    strays = inputs.pairs.carrier_of_captions()[swaps.caption_N]
    given, swapped = match(image, caption, inputs.logit_scale, inputs.candidates, *asked, strays=strays)
    return Evidence(given.loss, swapped.loss)


def joined(look: FirstLook, more: Evidence | None) -> FirstLook:
    """A first look with one more signal, counted as far as it tells given pairs from swaps."""
    if more is None:
        return look
    total = look.evidence.standardised() + more.times(worth(more, look.evidence))
    rate = total.rate()
    return FirstLook(total, look.variation_N, rate, total.posterior(rate).given_N)
