"""The default method: self-paced heads over frozen embeddings, calibrated on known swaps.

No clean labels are needed. What keeps noise from being learnt:

1. A first posterior from the embeddings alone (`first_look`), with a probability calibrated on known swaps.
2. Heads that never score what they trained on (`train_folds`): K pairs of heads in lockstep, each leaving out
   one fold. After every epoch the held-out loss of each pair sets its self-paced weight for the next.
3. Final heads (`train_final`) on all pairs. They are trained twice: the second weights come from what the first
   heads found.

Known swaps are planted among the pairs before the first step and treated as they are in every one. Even what never
trains on a pair is told of it, by the weights of other pairs which it helped to set; swaps that were not there score
noisier than noise that was, and the fewer the pairs and the more of them noisy, the more so. Noise that strikes single
pairs is met by swapped captions, noise that strikes whole images by swapped caption sets. With few pairs all of it is
done several times, each with another draw of swaps and folds.

Shapes: I = images; C = captions; N = given pairs; S = planted swaps; T = N + S, the swaps behind the pairs;
M = candidates; E = epochs; D = dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nc_audit.calibrate import NoiseRate, by_image, combine_held_out, share_by_image
from nc_audit.errors import DatasetError
from nc_audit.methods import known_swaps, self_paced
from nc_audit.methods.heads import Heads
from nc_audit.methods.known_swaps import Evidence, fused
from nc_audit.methods.matching import Asked, Matches, Pairs, match
from nc_audit.methods.uncertainty import chance_loss
from nc_audit.model import Model
from nc_audit.recipe import TrainSection
from nc_audit.train.first_look import MIN_WEIGHT, FirstLook, View, first_look, joined, views_of, zero_shot
from nc_audit.train.lockstep import Lockstep
from nc_audit.train.loop import (
    Inputs,
    Judgement,
    Plan,
    Progress,
    Trajectory,
    columns_of,
    new_heads,
    seeded,
    silent,
)

_SEEDS_APART = 10_000  # of two draws
_LITTLE, _SURELY = 0.2, 0.05  # a set may be clean whose rate is below one, its interval from below the other;
_LITTLE_IF_WEAK, _SURELY_IF_WEAK = 0.3, 0.1  # where the evidence is weak, below these
_PLAIN, _FAIR = 0.985, 0.9  # expected AUROCs: above one, a draw is enough; up to the other, evidence is poor
_DRAWS = ((4_000, 4), (30_000, 2))  # else up to so many pairs, so many draws


def assign_folds(group_N: Tensor, num_folds: int, generator: torch.Generator) -> Tensor:
    """A fold per pair, equal for pairs of one group, folds of nearly equal numbers of groups.

    Returns:
        Shape [N], 0..num_folds-1.
    """
    groups, inverse = group_N.unique(return_inverse=True)
    order = torch.randperm(len(groups), generator=generator)
    return (order % num_folds)[inverse]


# --- out-of-fold heads -------------------------------------------------------------------------------


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


def train_folds(
    inputs: Inputs,
    swaps: Pairs,
    prior_T: Tensor,
    fold_T: Tensor,
    settings: TrainSection,
    seed: int,
    progress: Progress = silent,
) -> Folds:
    """Train K pairs of heads in lockstep and score every pair and swap by the heads that left its fold out.

    Args:
        inputs: the given pairs, what heads take in, what pairs are scored against.
        swaps: the planted swaps, S of them, which are trained on and weighed as given pairs are.
        prior_T: weight of each given pair and of each swap behind them before any loss is known, shape [N + S], 0..1.
        fold_T: fold of each given pair and each swap, shape [N + S], 0..K-1.
        settings: the recipe's `train` section.
        seed: initialisation, batches, dropout.
        progress: told the epoch.

    Returns:
        Held-out results, averaged over the epochs from `first_counted_epoch`, and the trajectory of the given pairs.
    """
    num, candidates = len(inputs.pairs), inputs.candidates
    together = inputs.pairs.and_more(swaps)
    num_folds = int(fold_T.max()) + 1
    stray_S = inputs.pairs.carrier_of_captions()[swaps.caption_N]
    inside = [(fold_T == k).nonzero().squeeze(1) for k in range(num_folds)]
    # by fold, its given pairs and its swaps: their places, and what it takes to match them
    places = [(at[at < num], at[at >= num]) for at in inside]
    asked = [
        Asked.of(
            candidates,
            [(together.image_N[some], together.caption_N[some]) for some in (given, swapped)],
            stray_S[swapped - num],
        ).to(inputs.device)
        for given, swapped in places
    ]
    outside = [(fold_T != k).nonzero().squeeze(1) for k in range(num_folds)]
    plan = Plan.of(min(len(o) for o in outside), settings).in_long_steps()
    chance = chance_loss(len(candidates.caption_M))
    total = Matches.zeros(len(together))
    trajectory = Trajectory()
    weight_T = prior_T.clone()
    counted = 0
    with seeded(seed, inputs.device):
        trainer = Lockstep(
            [new_heads(inputs, settings) for _ in range(num_folds)],
            inputs,
            [together.select(some) for some in outside],
            plan,
            settings,
            settings.weight_decay,
            [seed + 1 + k for k in range(num_folds)],
        )
        for epoch in range(1, plan.epochs + 1):
            loss_T = torch.empty(len(together))
            is_scored = plan.is_scored(epoch, num)
            counts = is_scored and epoch >= settings.first_counted_epoch
            weights = [weight_T[some] for some in outside]
            trainer.run_epoch([some / some.mean().clamp_min(1e-9) for some in weights])
            for k in range(num_folds if is_scored else 0):
                vectors = trainer.embed(k, asked[k].image_at, asked[k].caption_at)
                found = asked[k].match(*vectors, trainer.scale(k))
                for some, one in zip(places[k], (one.to("cpu") for one in found), strict=True):
                    loss_T[some] = one.loss
                    if counts:
                        total.add_(some, one)
            progress("train", epoch, plan.epochs)
            if not is_scored:
                continue
            counted += counts
            relative = loss_T / chance
            division_N = self_paced.divide(relative[:num], settings.clean_at, settings.noisy_at)
            trajectory.record(loss_T[:num], weight_T[:num], division_N, epoch)
            weight_T = prior_T * pace(relative, epoch, settings)
    mean = total.divided(counted)
    return Folds(
        Evidence(mean.loss[:num], mean.loss[num:]),
        Evidence(-mean.similarity[:num], -mean.similarity[num:]),
        mean.first(num),
        trajectory,
        sum(map(trainer.scale, range(num_folds))) / num_folds,
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
    together = pairs.and_more(planted)
    weights = torch.cat([weight_N, planted_weight_P])
    weights = weights / weights.mean().clamp_min(1e-9)
    plan = Plan.of(len(together), settings).in_long_steps()
    loss, distance = torch.zeros(len(together)), torch.zeros(len(together))
    stray_P = pairs.carrier_of_captions()[planted.caption_N].to(inputs.device)
    asked = [(one.image_N, one.caption_N) for one in (pairs.to(inputs.device), planted.to(inputs.device))]
    candidates = inputs.candidates.to(inputs.device)
    counted = 0
    with seeded(seed, inputs.device):
        heads = new_heads(inputs, settings, settings.final_input_dropout)
        trainer = Lockstep(
            [heads], inputs, [together], plan, settings, settings.final_weight_decay, [seed + 1]
        )
        for epoch in range(1, plan.epochs + 1):
            trainer.run_epoch([weights])
            if epoch >= settings.first_counted_epoch and plan.is_scored(epoch, len(together)):
                vectors, scale = trainer.embed(0), trainer.scale(0)
                found = match(*vectors, scale, candidates, *asked, strays=stray_P)
                del vectors  # not kept while the next ones are made
                of_given, of_planted = (one.to("cpu") for one in found)
                loss += torch.cat([of_given.loss, of_planted.loss])
                distance -= torch.cat([of_given.similarity, of_planted.similarity])
                counted += 1
            progress("train on everything", epoch, plan.epochs)
    heads.cpu().eval()
    num = len(pairs)
    return Final(
        heads,
        Evidence(loss[:num] / counted, loss[num:] / counted),
        Evidence(distance[:num] / counted, distance[num:] / counted),
    )


# --- the whole -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Everything the method has learnt, per distinct pair and per known swap, and the final heads.

    `swaps` are the known swaps that sat in every step of the training. `by_image_share` of them, and of the noise by
    what the first look says, are of whole images. `rate` is the noise rate by held-out evidence.
    """

    first: FirstLook
    folds: Folds
    final: Final
    model: Model
    swaps: Pairs
    by_image_share: float
    rate: NoiseRate
    untrained: Evidence | None = None

    def judgement(self, num_candidates: int) -> Judgement:
        """What scoring goes on from: see `score.score_swapped` for the names."""
        first, folds, final = self.first, self.folds, self.final
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
            "final_loss": final.loss.swaps_S,
            "final_distance": final.distance.swaps_S,
        }
        if self.untrained is not None:
            given["zero_shot_loss"] = self.untrained.given_N
            swaps["zero_shot_loss"] = self.untrained.swaps_S
        facts = {
            "first_look_rate": round(first.rate, 6),
            "whole_images": self.by_image_share == 1,
            "by_image_share": round(self.by_image_share, 6),
            "logit_scale": round(folds.scale, 6),
            "num_candidates": num_candidates,
        }
        return Judgement(given, swaps, facts, folds.trajectory, self.model)


def train_robustly(
    inputs: Inputs,
    settings: TrainSection,
    progress: Progress = silent,
    *,
    draw: int = 0,
    by_image_share: float | None = None,
) -> Trained:
    """The three steps of the method on frozen embeddings.

    Args:
        inputs: frozen embeddings, pairs, candidates.
        settings: the recipe's `train` section.
        progress: told what is trained and how far.
        draw: each has known swaps, folds and heads of its own.
        by_image_share: share of the noise that strikes whole images, 0..1; found out where it is not given.

    Raises:
        DatasetError: an image carries nearly every caption, so that it cannot be mismatched.
        TrainingError: a loss is not finite.
    """
    pairs, seed = inputs.pairs, settings.seed + _SEEDS_APART * draw
    generator = torch.Generator().manual_seed(seed)
    look_fold_N = assign_folds(pairs.image_N, settings.first_look_folds, generator)
    views = views_of(inputs.image_ID, inputs.caption_CD, len(pairs), settings)

    def look(views: list[View], share: float) -> tuple[FirstLook, Evidence | None, Pairs, Tensor]:
        fold_N = assign_folds(
            pairs.image_N if share == 1 else torch.arange(len(pairs)), settings.folds, generator
        )
        swaps, place_S = _planted(pairs, look_fold_N, fold_N, settings, generator, share)
        untrained = zero_shot(inputs, swaps)
        look_fold_T = torch.cat([look_fold_N, look_fold_N[place_S]])
        first = first_look(views, pairs, swaps, look_fold_T, settings)
        return joined(first, untrained), untrained, swaps, torch.cat([fold_N, fold_N[place_S]])

    if by_image_share is None:
        first, untrained, swaps, fold_T = look(views, 0.0)
        by_image_share = share_by_image(first.posterior_N, first.rate, pairs.image_N)
        if by_image_share > 0:
            first, untrained, swaps, fold_T = look(views, by_image_share)
    else:
        first, untrained, swaps, fold_T = look(views, by_image_share)
    del views  # of many pairs, too much to keep while heads train
    whole_images = by_image_share == 1
    posterior = first.evidence.posterior(first.rate)
    prior_T = (1 - torch.cat([posterior.given_N, posterior.swaps_S])).clamp_min(MIN_WEIGHT)
    num = len(pairs)
    trusted_N = torch.zeros(num, dtype=torch.bool) if inputs.trusted_N is None else inputs.trusted_N
    prior_T[:num][trusted_N] = 1.0
    folds = train_folds(inputs, swaps, prior_T, fold_T, settings, seed, progress)
    held_out = combine_held_out(
        first.evidence,
        folds.loss,
        folds.distance,
        pairs.image_N,
        swaps.image_N,
        whole_images,
        seed,
        known_swaps.right_by_chance(
            swaps.image_N, swaps.caption_N, pairs.image_N, pairs.caption_N, pairs.num_captions
        ),
    )
    noise = held_out.posterior
    # Where little is noisy, what weights cost most is hard but right pairs, so that they are milder there. The captions
    # of a wrong image confirm each other, and would be learnt.
    power = 1.0 if whole_images else min(1.0, settings.final_power + held_out.rate.estimate)
    # Where hardly anything is found, and not for good evidence, other weights would be no better.
    once = may_be_clean(held_out.rate) and not held_out.rate.expected_auroc > _FAIR
    for again in range(1 if once else settings.final_rounds):
        final = train_final(
            inputs,
            swaps,
            torch.where(trusted_N, 1.0, (1 - noise.given_N).clamp_min(MIN_WEIGHT) ** power),
            (1 - noise.swaps_S).clamp_min(MIN_WEIGHT) ** power,
            settings,
            seed + 100 + again,
            progress,
        )
        evidence = fused(folds.loss, final.loss, final.loss)
        if whole_images:
            evidence = by_image(evidence, pairs.image_N, swaps.image_N)
        noise = evidence.posterior(evidence.rate())
    model = Model(final.heads, inputs.image_projection, inputs.caption_projection)
    return Trained(first, folds, final, model, swaps, by_image_share, held_out.rate, untrained)


def _planted(
    pairs: Pairs,
    look_fold_N: Tensor,
    fold_N: Tensor,
    settings: TrainSection,
    generator: torch.Generator,
    by_image_share: float,
) -> tuple[Pairs, Tensor]:
    """Known swaps of single pairs and of whole images, as the noise is of both, and the places they take, [S].

    Swapped images are planted whole, so that their captions stand or fall together as those of wrong images do. All
    stay within the folds they are scored in.
    """
    given = (pairs.image_N, pairs.caption_N, pairs.num_captions)
    num, images = len(pairs), pairs.image_N.unique()
    share = settings.planted_share
    is_whole = torch.zeros(num, dtype=torch.bool)
    image_N, caption_N = pairs.image_N.clone(), pairs.caption_N.clone()
    if by_image_share > 0:
        block_N = look_fold_N * settings.folds + fold_N if by_image_share == 1 else look_fold_N
        swapped_image_N, swapped_caption_N = known_swaps.draw_image_swaps(*given, generator, block_N)
        _check_swaps(swapped_image_N, swapped_caption_N)
        taken = torch.randperm(len(images), generator=generator)
        taken = images[taken[: max(1, round(share * by_image_share * len(images)))]]
        is_whole = torch.isin(swapped_image_N, taken)
        image_N = torch.where(is_whole, swapped_image_N, image_N)
        caption_N = torch.where(is_whole, swapped_caption_N, caption_N)
    place_S = is_whole.nonzero().squeeze(1)
    if by_image_share < 1:
        swapped_caption_N = known_swaps.draw_swaps(*given, generator, look_fold_N * settings.folds + fold_N)
        _check_swaps(pairs.image_N, swapped_caption_N)
        order = torch.randperm(num, generator=generator)
        single = order[~is_whole[order]][: max(1, round(share * num) - len(place_S))]
        caption_N[single] = swapped_caption_N[single]
        place_S = torch.cat([place_S, single]).sort().values
    return Pairs(image_N[place_S], caption_N[place_S], pairs.num_images, pairs.num_captions), place_S


def train_self_paced(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Train by this method, with one draw of known swaps or several; see `train_robustly` and `num_draws`.

    Which pairs are burdened by a swap, and which fold they fall into, is chance, and with few pairs it tells. Further
    draws follow the first in how much of the noise strikes whole images.
    """
    num_candidates = len(inputs.candidates.caption_M)
    first = train_robustly(inputs, settings, progress)
    num = num_draws(settings, len(inputs.pairs), first.rate)
    again = []
    for draw in range(1, num):

        def told(what: str, done: int, total: int, draw: int = draw) -> None:
            progress(f"{what}, draw {draw + 1} of {num}", done, total)

        further = train_robustly(inputs, settings, told, draw=draw, by_image_share=first.by_image_share)
        again.append(further.judgement(num_candidates))
    return replace(first.judgement(num_candidates), again=tuple(again))


def num_draws(settings: TrainSection, num_pairs: int, rate: NoiseRate) -> int:
    """How many draws of known swaps to train with, given the held-out rate of the first one.

    One where the set may be clean or noise is plain to see; else the more, the fewer pairs there are.
    """
    if not settings.draws and (may_be_clean(rate) or rate.expected_auroc > _PLAIN):
        return 1
    return most_draws(settings, num_pairs)


def most_draws(settings: TrainSection, num_pairs: int) -> int:
    """How many draws of known swaps there are at most; as many as the recipe says where it does."""
    return settings.draws or next((num for most, num in _DRAWS if num_pairs <= most), 1)


def may_be_clean(rate: NoiseRate) -> bool:
    """Whether there may be hardly any noise, or nothing can be told of it."""
    little, surely = (_LITTLE_IF_WEAK, _SURELY_IF_WEAK) if rate.is_weak else (_LITTLE, _SURELY)
    return rate.is_blind or (rate.estimate < little and rate.low < surely)


def _check_swaps(image_N: Tensor, caption_N: Tensor) -> None:
    num = len(image_N[caption_N < 0].unique())
    if num:
        who = "1 image carries" if num == 1 else f"{num:,} images carry"
        raise DatasetError(
            f"{who} nearly every caption of the set, so none can be mismatched",
            "audit a set in which images have captions of their own",
        )
