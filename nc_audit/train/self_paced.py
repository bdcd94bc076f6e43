"""The default method: self-paced heads over frozen embeddings, calibrated on known swaps.

No clean labels are needed. What keeps noise from being learnt:

1. A first posterior from the embeddings alone (`first_look`): the mutual-information variation of each pair,
   fitted on other images and reweighted a few times, with a probability calibrated on known swaps.
2. Heads that never score what they trained on (`train_folds`): K pairs of heads in lockstep, each leaving out
   one fold. After every epoch the held-out loss of each pair sets its self-paced weight for the next.
3. Final heads (`train_final`) on all pairs, with known swaps planted among them: swaps that sat in training
   like any noise score like noise that did, and so calibrate in-sample scores. They are trained twice: the second
   weights come from what the first heads found.

Shapes: I = images; C = captions; N = pairs; S = swaps; M = candidates; E = epochs; D = dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nc_audit.calibrate import by_image, combine_held_out, strikes_whole_images
from nc_audit.errors import DatasetError
from nc_audit.methods import contrastive, known_swaps, self_paced
from nc_audit.methods.heads import Heads
from nc_audit.methods.known_swaps import Evidence, fused, worth
from nc_audit.methods.matching import Matches, Pairs, match
from nc_audit.methods.mutual_information import GaussianDependence
from nc_audit.methods.projections import principal_projection
from nc_audit.methods.uncertainty import chance_loss
from nc_audit.model import Model
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import (
    Inputs,
    Judgement,
    Plan,
    Progress,
    Trainer,
    Trajectory,
    columns_of,
    new_heads,
    silent,
)

MIN_WEIGHT = 0.001


def assign_folds(group_N: Tensor, num_folds: int, generator: torch.Generator) -> Tensor:
    """A fold per pair, equal for pairs of one group, folds of nearly equal numbers of groups.

    Returns:
        Shape [N], 0..num_folds-1.
    """
    groups, inverse = group_N.unique(return_inverse=True)
    order = torch.randperm(len(groups), generator=generator)
    return (order % num_folds)[inverse]


# --- 1. a first look --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstLook:
    """What the embeddings alone say of each pair."""

    evidence: Evidence
    variation_N: Tensor
    rate: float
    posterior_N: Tensor


def first_look(
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    swaps: Pairs,
    fold_N: Tensor,
    settings: TrainSection,
) -> FirstLook:
    """Mutual-information variation of each pair, out of fold by image, reweighted towards the clean pairs.

    Args:
        image_ID: image embeddings, shape [I, D].
        caption_CD: caption embeddings, shape [C, D'].
        pairs: the given pairs.
        swaps: known swaps, whole sets of N one behind the other; each shares the folds of the pair in its place.
        fold_N: fold of each pair, the same for all pairs of an image, shape [N].
        settings: `first_look_dims`, `first_look_rounds`, `shrinkage`.

    Returns:
        Evidence (higher = noisier), the raw variation (nats, higher = agree), the rate and the posterior.
    """
    total: Evidence | None = None
    variation_N = torch.zeros(len(pairs))
    cap = max(2, len(pairs) // 12)
    dims = sorted({min(d, cap) for d in settings.first_look_dims})
    for num in dims:
        image = principal_projection(image_ID, num)(image_ID)
        caption = principal_projection(caption_CD, num)(caption_CD)
        one, raw = _variation_rounds(image, caption, pairs, swaps, fold_N, settings)
        total = one.standardised() if total is None else total + one.standardised()
        variation_N = variation_N + raw / len(dims)
    assert total is not None
    rate = total.rate()
    return FirstLook(total, variation_N, rate, total.posterior(rate).given_N)


def _variation_rounds(
    image_IK: Tensor,
    caption_CK: Tensor,
    pairs: Pairs,
    swaps: Pairs,
    fold_N: Tensor,
    settings: TrainSection,
) -> tuple[Evidence, Tensor]:
    weight_N = torch.ones(len(pairs))
    evidence = Evidence(torch.zeros(len(pairs)), torch.zeros(len(swaps)))
    fold_S = fold_N.repeat(len(swaps) // len(pairs))
    for _ in range(settings.first_look_rounds):
        given, swapped = torch.empty(len(pairs)), torch.empty(len(swaps))
        for fold in range(int(fold_N.max()) + 1):
            outside = (fold_N != fold).nonzero().squeeze(1)
            fit = outside[:: max(1, math.ceil(len(outside) / 200_000))]
            dependence = GaussianDependence(
                image_IK[pairs.image_N[fit]],
                caption_CK[pairs.caption_N[fit]],
                weight_N[fit],
                settings.shrinkage,
            )
            for asked, fold_of, result in ((pairs, fold_N, given), (swaps, fold_S, swapped)):
                for part in (fold_of == fold).nonzero().squeeze(1).split(65_536):
                    result[part] = dependence.variation(
                        image_IK[asked.image_N[part]], caption_CK[asked.caption_N[part]]
                    )
        evidence = Evidence(-given, -swapped)
        weight_N = (1 - evidence.posterior(evidence.rate()).given_N).clamp_min(MIN_WEIGHT)
    return evidence, -evidence.given_N


def zero_shot(inputs: Inputs, swaps: Pairs) -> Evidence | None:
    """What aligned encoders say without any training: the loss of pairs and swaps by their own cosine.

    None where the encoders are not aligned.
    """
    if inputs.logit_scale is None:
        return None
    image, caption = (functional.normalize(one, dim=1) for one in (inputs.image_ID, inputs.caption_CD))
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


# --- 2. out-of-fold heads -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folds:
    """Out-of-fold results: what heads say of pairs they never trained on.

    `loss` and `distance` are evidence averaged over the later epochs; `matches` holds every quantity of the given
    pairs, averaged likewise. `trajectory` holds the held-out loss after each scored epoch, the weight used in it, and
    the division its losses give.
    """

    loss: Evidence
    distance: Evidence
    matches: Matches
    trajectory: Trajectory
    scale: float


def weighted(trainer: Trainer, weight_N: Tensor, at_B: Tensor) -> Tensor:
    """Contrastive loss of a batch with its pairs' weights, a scalar."""
    cosine_BB, image, caption = trainer.cosines(at_B)
    losses = contrastive.in_batch_loss(
        trainer.heads.scale() * cosine_BB, contrastive.negatives_mask(image, caption)
    )
    return (weight_N[at_B] * losses).mean()


def train_folds(
    inputs: Inputs,
    swaps: Pairs,
    prior_N: Tensor,
    fold_N: Tensor,
    settings: TrainSection,
    seed: int,
    progress: Progress = silent,
) -> Folds:
    """Train K pairs of heads in lockstep and score every pair by the heads that left its fold out.

    Args:
        inputs: the given pairs, what heads take in, what pairs are scored against.
        swaps: known swaps, whole sets of N one behind the other; each shares the fold of the pair in its place.
        prior_N: weight of each pair before any loss is known, shape [N], 0..1.
        fold_N: fold of each pair, shape [N], 0..K-1.
        settings: the recipe's `train` section.
        seed: initialisation, batches, dropout.
        progress: told the epoch.

    Returns:
        Held-out results, averaged over the epochs from `first_counted_epoch`, and the trajectory.
    """
    pairs, candidates = inputs.pairs, inputs.candidates
    num_folds = int(fold_N.max()) + 1
    fold_S = fold_N.repeat(len(swaps) // len(pairs))
    stray_S = pairs.carrier_of_captions()[swaps.caption_N]
    inside = [(fold_N == k).nonzero().squeeze(1) for k in range(num_folds)]
    outside = [(fold_N != k).nonzero().squeeze(1) for k in range(num_folds)]
    plan = Plan.of(min(len(o) for o in outside), settings)
    chance = chance_loss(len(candidates.caption_M))
    given_sum = Matches.zeros(len(pairs))
    swap_sum = Matches.zeros(len(swaps))
    swapped = [(fold_S == k).nonzero().squeeze(1) for k in range(num_folds)]
    trajectory = Trajectory()
    weight_N = prior_N.clone()
    counted = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainers = [
            Trainer(
                new_heads(inputs, settings),
                inputs,
                pairs.select(outside[k]),
                plan,
                settings,
                settings.weight_decay,
                seed + 1 + k,
                precision=inputs.precision,
            )
            for k in range(num_folds)
        ]
        for epoch in range(1, plan.epochs + 1):
            loss_N = torch.empty(len(pairs))
            is_scored = plan.is_scored(epoch, len(pairs))
            counts = is_scored and epoch >= settings.first_counted_epoch
            for k, trainer in enumerate(trainers):
                train_weight = weight_N[outside[k]]
                train_weight = train_weight / train_weight.mean().clamp_min(1e-9)
                trainer.run_epoch(partial(weighted, trainer, train_weight))
                if not is_scored:
                    continue
                image, caption = trainer.embed()
                scale = trainer.heads.scale().item()
                at, also = inside[k], swapped[k]
                asked = [
                    (pairs.image_N[at], pairs.caption_N[at]),
                    (swaps.image_N[also], swaps.caption_N[also]),
                ]
                found = match(
                    image,
                    caption,
                    scale,
                    candidates,
                    *asked[: 1 + counts],
                    strays=stray_S[also] if counts else None,
                )
                loss_N[at] = found[0].loss
                if counts:
                    given_sum.add_(at, found[0])
                    swap_sum.add_(also, found[1])
            progress("train", epoch, plan.epochs)
            if not is_scored:
                continue
            counted += counts
            relative = loss_N / chance
            division_N = self_paced.divide(relative, settings.clean_at, settings.noisy_at)
            trajectory.record(loss_N, weight_N, division_N, epoch)
            weight_N = prior_N * pace(relative, epoch, settings)
    of_given, of_swaps = given_sum.divided(counted), swap_sum.divided(counted)
    return Folds(
        Evidence(of_given.loss, of_swaps.loss),
        Evidence(-of_given.similarity, -of_swaps.similarity),
        of_given,
        trajectory,
        sum(trainer.heads.scale().item() for trainer in trainers) / len(trainers),
    )


def pace(relative_loss_N: Tensor, epoch: int, settings: TrainSection) -> Tensor:
    """Self-paced weight for the next epoch from the held-out relative loss: easy pairs first, then harder ones.

    Both thresholds grow by the same factor, from 1 after `pace_from` to `pace_growth` at the last epoch.

    Returns:
        Shape [N], 0..1; all 1 while the heads still warm up.
    """
    if settings.pace == "none" or epoch < settings.pace_from:
        return torch.ones_like(relative_loss_N)
    progress = (epoch - settings.pace_from) / max(1, settings.epochs - settings.pace_from)
    grown = 1 + (settings.pace_growth - 1) * progress
    if settings.pace == "divided":
        return self_paced.divided_weight(
            relative_loss_N, grown * settings.clean_at, grown * settings.noisy_at, settings.ambiguous_factor
        )
    return self_paced.pace_weight(relative_loss_N, grown * settings.noisy_at)


@dataclass(frozen=True)
class Final:
    """Heads trained on everything, with in-sample evidence on the given pairs and on the planted swaps."""

    heads: Heads
    loss: Evidence
    distance: Evidence


def train_final(
    inputs: Inputs,
    planted: Pairs,
    weight_N: Tensor,
    planted_weight_P: Tensor,
    settings: TrainSection,
    seed: int,
    progress: Progress = silent,
) -> Final:
    """Train one pair of heads on all given pairs and on planted swaps, and score both in sample.

    Args:
        inputs: the given pairs, what heads take in, what pairs are scored against.
        planted: known swaps that sit in training as noise does.
        weight_N: weight of each given pair, shape [N], 0..1.
        planted_weight_P: weight of each planted swap, by the same rule, shape [P], 0..1.
        settings: the recipe's `train` section.
        seed: initialisation, batches, dropout.
        progress: told the epoch.

    Returns:
        The heads; loss and cosine distance, averaged over the later epochs.
    """
    pairs = inputs.pairs
    together = Pairs(
        torch.cat([pairs.image_N, planted.image_N]),
        torch.cat([pairs.caption_N, planted.caption_N]),
        pairs.num_images,
        pairs.num_captions,
    )
    weights = torch.cat([weight_N, planted_weight_P])
    weights = weights / weights.mean().clamp_min(1e-9)
    plan = Plan.of(len(together), settings)
    loss, distance = torch.zeros(len(together)), torch.zeros(len(together))
    stray_P = pairs.carrier_of_captions()[planted.caption_N]
    counted = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = new_heads(inputs, settings, settings.final_input_dropout)
        trainer = Trainer(
            heads,
            inputs,
            together,
            plan,
            settings,
            settings.final_weight_decay,
            seed + 1,
            precision=inputs.precision,
        )
        for epoch in range(1, plan.epochs + 1):
            trainer.run_epoch(partial(weighted, trainer, weights))
            if epoch >= settings.first_counted_epoch and plan.is_scored(epoch, len(together)):
                vectors, scale = trainer.embed(), heads.scale().item()
                asked = [(one.image_N, one.caption_N) for one in (pairs, planted)]
                of_given, of_planted = match(*vectors, scale, inputs.candidates, *asked, strays=stray_P)
                loss += torch.cat([of_given.loss, of_planted.loss])
                distance -= torch.cat([of_given.similarity, of_planted.similarity])
                counted += 1
            progress("train on everything", epoch, plan.epochs)
    heads.eval()
    num = len(pairs)
    return Final(
        heads,
        Evidence(loss[:num] / counted, loss[num:] / counted),
        Evidence(distance[:num] / counted, distance[num:] / counted),
    )


# --- 4. the whole ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Everything the method has learnt, per distinct pair and per known swap, and the final heads.

    `swaps` are the known swaps; `planted` indexes those that sat in the final training, whose evidence stands behind
    that of the given pairs in `final`.
    """

    first: FirstLook
    folds: Folds
    final: Final
    model: Model
    swaps: Pairs
    planted: Tensor
    whole_images: bool
    untrained: Evidence | None = None

    def judgement(self, num_candidates: int) -> Judgement:
        """What scoring goes on from: see `score.score_swapped` for the names."""
        first, folds, final = self.first, self.folds, self.final
        num = len(self.swaps)
        given = columns_of(folds.matches, num_candidates) | {
            "first": first.evidence.given_N,
            "distance": folds.distance.given_N,
            "final_loss": final.loss.given_N,
            "final_distance": final.distance.given_N,
            "weight": torch.stack(folds.trajectory.weights).mean(0),
            "clean_posterior": 1 - first.posterior_N,
            "mi_variation": first.variation_N,
        }
        swaps = {
            "image": self.swaps.image_N,
            "caption": self.swaps.caption_N,
            "first": first.evidence.swaps_S,
            "loss": folds.loss.swaps_S,
            "distance": folds.distance.swaps_S,
            "final_loss": _placed(final.loss.swaps_S, self.planted, num),
            "final_distance": _placed(final.distance.swaps_S, self.planted, num),
        }
        if self.untrained is not None:
            given["zero_shot_loss"] = self.untrained.given_N
            swaps["zero_shot_loss"] = self.untrained.swaps_S
        facts = {
            "first_look_rate": round(first.rate, 6),
            "whole_images": self.whole_images,
            "logit_scale": round(folds.scale, 6),
            "num_candidates": num_candidates,
        }
        return Judgement(given, swaps, facts, folds.trajectory, self.model)


def _placed(values: Tensor, at: Tensor, num: int) -> Tensor:
    """Values at their places among `num`, not a number elsewhere."""
    result = torch.full((num,), float("nan"))
    result[at] = values
    return result


def train_robustly(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Trained:
    """The three steps of the method on frozen embeddings.

    Args:
        inputs: frozen embeddings, pairs, candidates.
        settings: the recipe's `train` section.
        progress: told what is trained and how far.

    Raises:
        DatasetError: an image carries nearly every caption, so that it cannot be mismatched.
        TrainingError: a loss is not finite.
    """
    pairs, seed = inputs.pairs, settings.seed
    image_ID, caption_CD = inputs.image_ID, inputs.caption_CD
    generator = torch.Generator().manual_seed(seed)
    look_fold_N = assign_folds(pairs.image_N, settings.first_look_folds, generator)
    group_N = torch.arange(len(pairs))
    fold_N = assign_folds(group_N, settings.folds, generator)
    block_N = look_fold_N * settings.folds + fold_N
    swaps = _known_swaps(pairs, block_N, settings, generator, whole_images=False)
    untrained = zero_shot(inputs, swaps)
    first = joined(first_look(image_ID, caption_CD, pairs, swaps, look_fold_N, settings), untrained)
    whole_images = strikes_whole_images(first.posterior_N, first.rate, pairs.image_N)
    if whole_images:
        group_N = pairs.image_N
        fold_N = assign_folds(group_N, settings.folds, generator)
        block_N = look_fold_N * settings.folds + fold_N
        swaps = _known_swaps(pairs, block_N, settings, generator, whole_images=True)
        untrained = zero_shot(inputs, swaps)
        first = joined(first_look(image_ID, caption_CD, pairs, swaps, look_fold_N, settings), untrained)
    prior_N = (1 - first.posterior_N).clamp_min(MIN_WEIGHT)
    trusted_N = torch.zeros(len(pairs), dtype=torch.bool) if inputs.trusted_N is None else inputs.trusted_N
    prior_N[trusted_N] = 1.0
    folds = train_folds(inputs, swaps, prior_N, fold_N, settings, seed, progress)
    held_out = combine_held_out(
        first.evidence, folds.loss, folds.distance, pairs.image_N, swaps.image_N, whole_images, seed
    )
    # Whole groups are planted, so that swapped images stand or fall together as wrong ones do.
    groups = group_N.unique()
    chosen = torch.randperm(len(groups), generator=generator)[
        : max(1, round(settings.planted_share * len(groups)))
    ]
    group_of_swap_N = swaps.image_N[: len(pairs)] if whole_images else group_N
    planted = torch.isin(group_of_swap_N, groups[chosen]).nonzero().squeeze(1)
    sitting_in = swaps.select(planted)
    noise = Evidence(held_out.posterior.given_N, held_out.posterior.swaps_S[planted])
    held_loss = Evidence(folds.loss.given_N, folds.loss.swaps_S[planted])
    # Where little is noisy, what weights cost most is hard but right pairs, so that they are milder there. The captions
    # of a wrong image confirm each other, and would be learnt.
    power = 1.0 if whole_images else min(1.0, settings.final_power + held_out.rate.estimate)
    for again in range(settings.final_rounds):
        final = train_final(
            inputs,
            sitting_in,
            torch.where(trusted_N, 1.0, (1 - noise.given_N).clamp_min(MIN_WEIGHT) ** power),
            (1 - noise.swaps_S).clamp_min(MIN_WEIGHT) ** power,
            settings,
            seed + 100 + again,
            progress,
        )
        evidence = fused(held_loss, final.loss, final.loss)
        if whole_images:
            evidence = by_image(evidence, pairs.image_N, sitting_in.image_N)
        noise = evidence.posterior(evidence.rate())
    model = Model(final.heads, inputs.image_projection, inputs.caption_projection)
    return Trained(first, folds, final, model, swaps, planted, whole_images, untrained)


def _known_swaps(
    pairs: Pairs,
    block_N: Tensor,
    settings: TrainSection,
    generator: torch.Generator,
    *,
    whole_images: bool,
) -> Pairs:
    """Sets of known swaps within blocks, one behind the other, `settings.known_swaps` or eight sets of them."""
    given = (pairs.image_N, pairs.caption_N, pairs.num_captions)
    images, captions = [], []
    for _ in range(min(8, math.ceil(settings.known_swaps / len(pairs)))):
        if whole_images:
            image_N, caption_N = known_swaps.draw_image_swaps(*given, generator, block_N)
        else:
            image_N, caption_N = pairs.image_N, known_swaps.draw_swaps(*given, generator, block_N)
        _check_swaps(image_N, caption_N)
        images.append(image_N)
        captions.append(caption_N)
    return Pairs(torch.cat(images), torch.cat(captions), pairs.num_images, pairs.num_captions)


def train_self_paced(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Train by this method; see `train_robustly`."""
    return train_robustly(inputs, settings, progress).judgement(len(inputs.candidates.caption_M))


def _check_swaps(image_N: Tensor, caption_N: Tensor) -> None:
    num = len(image_N[caption_N < 0].unique())
    if num:
        who = "1 image carries" if num == 1 else f"{num:,} images carry"
        raise DatasetError(
            f"{who} nearly every caption of the set, so none can be mismatched",
            "audit a set in which images have captions of their own",
        )
