"""Stage 3, train: short robust training of small heads over frozen embeddings, on the audited pairs themselves.

No clean labels are needed. What keeps noise from being learnt:

1. A first posterior from the embeddings alone (`first_look`): the mutual-information variation of each pair,
   fitted on other images and reweighted a few times, with a probability calibrated on known swaps.
2. Heads that never score what they trained on (`train_folds`): K pairs of heads in lockstep, each leaving out
   one fold. After every epoch the held-out loss of each pair sets its self-paced weight for the next.
3. Final heads (`train_final`) on all pairs, with known swaps planted among them: swaps that sat in training
   like any noise score like noise that did, and so calibrate in-sample scores.

Shapes: I = images; C = captions; N = pairs; S = swaps; M = candidates; B = batch; D = dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.calibrate import combine_held_out, strikes_whole_images
from nc_audit.errors import DatasetError, TrainingError
from nc_audit.methods import contrastive, known_swaps, self_paced
from nc_audit.methods.heads import Heads
from nc_audit.methods.known_swaps import Evidence
from nc_audit.methods.matching import Candidates, Matches, Pairs, match
from nc_audit.methods.mutual_information import GaussianDependence
from nc_audit.methods.projections import Projection, principal_projection
from nc_audit.model import Model
from nc_audit.recipe import TrainSection

MIN_PAIRS = 40
MIN_DISTINCT = 10
MIN_WEIGHT = 0.001
MAX_CAPTION_INPUTS = 512


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
    swap_caption_S: Tensor,
    settings: TrainSection,
    seed: int,
) -> FirstLook:
    """Mutual-information variation of each pair, out of fold by image, reweighted towards the clean pairs.

    Args:
        image_ID: image embeddings, shape [I, D].
        caption_CD: caption embeddings, shape [C, D'].
        pairs: the given pairs.
        swap_caption_S: caption of the known swap of each pair's image, shape [N].
        settings: `first_look_dims`, `first_look_folds`, `first_look_rounds`, `shrinkage`.
        seed: draws the folds.

    Returns:
        Evidence (higher = noisier), the raw variation (nats, higher = agree), the rate and the posterior.
    """
    generator = torch.Generator().manual_seed(seed)
    fold_N = assign_folds(pairs.image_N, settings.first_look_folds, generator)
    total: Evidence | None = None
    variation_N = torch.zeros(len(pairs))
    cap = max(2, len(pairs) // 12)
    dims = sorted({min(d, cap) for d in settings.first_look_dims})
    for num in dims:
        image = principal_projection(image_ID, num)(image_ID)
        caption = principal_projection(caption_CD, num)(caption_CD)
        one, raw = _variation_rounds(image, caption, pairs, swap_caption_S, fold_N, settings)
        total = one.standardised() if total is None else total + one.standardised()
        variation_N = variation_N + raw / len(dims)
    assert total is not None
    rate = total.rate()
    return FirstLook(total, variation_N, rate, total.posterior(rate).given_N)


def _variation_rounds(
    image_IK: Tensor,
    caption_CK: Tensor,
    pairs: Pairs,
    swap_caption_S: Tensor,
    fold_N: Tensor,
    settings: TrainSection,
) -> tuple[Evidence, Tensor]:
    weight_N = torch.ones(len(pairs))
    evidence = Evidence(torch.zeros(len(pairs)), torch.zeros(len(pairs)))
    for _ in range(settings.first_look_rounds):
        given, swaps = torch.empty(len(pairs)), torch.empty(len(pairs))
        for fold in range(settings.first_look_folds):
            inside, outside = (fold_N == fold).nonzero().squeeze(1), (fold_N != fold).nonzero().squeeze(1)
            fit = outside[:: max(1, math.ceil(len(outside) / 200_000))]
            dependence = GaussianDependence(
                image_IK[pairs.image_N[fit]],
                caption_CK[pairs.caption_N[fit]],
                weight_N[fit],
                settings.shrinkage,
            )
            for part in inside.split(65_536):
                image = image_IK[pairs.image_N[part]]
                given[part] = dependence.variation(image, caption_CK[pairs.caption_N[part]])
                swaps[part] = dependence.variation(image, caption_CK[swap_caption_S[part]])
        evidence = Evidence(-given, -swaps)
        weight_N = (1 - evidence.posterior(evidence.rate()).given_N).clamp_min(MIN_WEIGHT)
    return evidence, -evidence.given_N


# --- 2. heads ---------------------------------------------------------------------------------------------


def _new_heads(image_ID: Tensor, caption_CD: Tensor, settings: TrainSection, input_dropout: float) -> Heads:
    return Heads(
        image_ID.shape[1],
        caption_CD.shape[1],
        settings.width,
        settings.hidden,
        input_dropout,
        settings.dropout,
        settings.log_scale,
        settings.max_scale,
    )


class _Trainer:
    """One pair of heads in training: its pairs, its optimiser, its place in the schedule."""

    def __init__(
        self,
        heads: Heads,
        pairs: Pairs,
        image_ID: Tensor,
        caption_CD: Tensor,
        plan: Plan,
        weight_decay: float,
        seed: int,
        settings: TrainSection,
    ) -> None:
        self.heads, self.pairs, self.plan = heads, pairs, plan
        self.image_ID, self.caption_CD = image_ID, caption_CD
        self.generator = torch.Generator().manual_seed(seed)
        matrices = [p for p in heads.parameters() if p.dim() > 1]
        others = [p for p in heads.parameters() if p.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.lr,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, max_lr=settings.lr, total_steps=plan.steps + 1, pct_start=settings.warm_up
        )
        self.batches = self._batches()

    def _batches(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.pairs), generator=self.generator)
            for start in range(0, len(order) - self.plan.batch + 1, self.plan.batch):
                yield order[start : start + self.plan.batch]

    def run_epoch(self, weight_N: Tensor) -> None:
        self.heads.train()
        for step in range(self.plan.steps_per_epoch):
            at = next(self.batches)
            image, caption = self.pairs.image_N[at], self.pairs.caption_N[at]
            logits = (
                self.heads.scale()
                * self.heads.image(self.image_ID[image])
                @ self.heads.caption(self.caption_CD[caption]).T
            )
            losses = contrastive.in_batch_loss(logits, contrastive.negatives_mask(image, caption))
            loss = (weight_N[at] * losses).mean()
            if not torch.isfinite(loss):
                lr = self.schedule.get_last_lr()[0]
                raise TrainingError(f"loss is {loss.item()} at step {step} (lr {lr:.2g})", "lower train.lr")
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()


@dataclass(frozen=True)
class Plan:
    """How long one pair of heads trains."""

    batch: int
    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.epochs * self.steps_per_epoch

    @classmethod
    def of(cls, num_pairs: int, settings: TrainSection) -> Plan:
        """A plan of `settings.steps` steps, whatever the number of pairs."""
        batch = settings.batch or (512 if num_pairs < 10_000 else 1024)
        batch = max(8, min(batch, num_pairs // 4))
        epochs = settings.epochs
        return cls(batch, epochs, max(1, round(settings.steps / epochs)))


# --- 3. the whole -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folds:
    """Out-of-fold results: what heads say of pairs they never trained on.

    `loss` and `distance` are evidence averaged over the later epochs; `matches` holds every quantity of the given
    pairs, averaged likewise. Per epoch, shape [E, N]: the held-out loss after it, the weight used in it, and the
    division its losses give.
    """

    loss: Evidence
    distance: Evidence
    matches: Matches
    loss_EN: Tensor
    weight_EN: Tensor
    division_EN: Tensor
    scale: float


Progress = Callable[[str, int, int], None]


def silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""


def train_folds(
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    swap_caption_S: Tensor,
    prior_N: Tensor,
    group_N: Tensor,
    candidates: Candidates,
    settings: TrainSection,
    seed: int,
    progress: Progress = silent,
) -> Folds:
    """Train K pairs of heads in lockstep and score every pair by the heads that left its fold out.

    Args:
        image_ID: head inputs of all images, shape [I, D].
        caption_CD: head inputs of all captions, shape [C, D'].
        pairs: the given pairs.
        swap_caption_S: caption of each pair's known swap, shape [N].
        prior_N: weight of each pair before any loss is known, shape [N], 0..1.
        group_N: pairs of one group share a fold, shape [N].
        candidates: what every pair is scored against.
        settings: the recipe's `train` section.
        seed: initialisation, folds, batches, dropout.
        progress: told the epoch.

    Returns:
        Held-out results, averaged over the epochs from `first_counted_epoch`, and the trajectory.
    """
    generator = torch.Generator().manual_seed(seed)
    fold_N = assign_folds(group_N, settings.folds, generator)
    inside = [(fold_N == k).nonzero().squeeze(1) for k in range(settings.folds)]
    outside = [(fold_N != k).nonzero().squeeze(1) for k in range(settings.folds)]
    plan = Plan.of(min(len(o) for o in outside), settings)
    chance = math.log(len(candidates.caption_M))
    given_sum = Matches.zeros(len(pairs))
    swap_sum = Matches.zeros(len(pairs))
    trajectory, weights, divisions = [], [], []
    weight_N = prior_N.clone()
    counted = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainers = [
            _Trainer(
                _new_heads(image_ID, caption_CD, settings, settings.input_dropout),
                pairs.select(outside[k]),
                image_ID,
                caption_CD,
                plan,
                settings.weight_decay,
                seed + 1 + k,
                settings,
            )
            for k in range(settings.folds)
        ]
        for epoch in range(1, plan.epochs + 1):
            loss_N = torch.empty(len(pairs))
            counts = epoch >= settings.first_counted_epoch
            for k, trainer in enumerate(trainers):
                train_weight = weight_N[outside[k]]
                trainer.run_epoch(train_weight / train_weight.mean().clamp_min(1e-9))
                image, caption = trainer.heads.embed(image_ID, caption_CD)
                scale = trainer.heads.scale().item()
                at = inside[k]
                asked = [(pairs.image_N[at], pairs.caption_N[at]), (pairs.image_N[at], swap_caption_S[at])]
                found = match(image, caption, scale, candidates, *asked[: 1 + counts])
                loss_N[at] = found[0].loss
                if counts:
                    given_sum.add_(at, found[0])
                    swap_sum.add_(at, found[1])
            counted += counts
            relative = loss_N / chance
            trajectory.append(loss_N)
            weights.append(weight_N)
            divisions.append(self_paced.divide(relative, settings.clean_at, settings.noisy_at))
            weight_N = prior_N * pace(relative, epoch, settings)
            progress("train", epoch, plan.epochs)
    given, swaps = given_sum.divided(counted), swap_sum.divided(counted)
    return Folds(
        Evidence(given.loss, swaps.loss),
        Evidence(-given.similarity, -swaps.similarity),
        given,
        torch.stack(trajectory),
        torch.stack(weights),
        torch.stack(divisions),
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
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    planted: Pairs,
    weight_N: Tensor,
    planted_weight_P: Tensor,
    candidates: Candidates,
    settings: TrainSection,
    seed: int,
    progress: Progress = silent,
) -> Final:
    """Train one pair of heads on all given pairs and on planted swaps, and score both in sample.

    Args:
        image_ID: head inputs of all images, shape [I, D].
        caption_CD: head inputs of all captions, shape [C, D'].
        pairs: the given pairs.
        planted: known swaps that sit in training as noise does.
        weight_N: weight of each given pair, shape [N], 0..1.
        planted_weight_P: weight of each planted swap, by the same rule, shape [P], 0..1.
        candidates: what every pair is scored against.
        settings: the recipe's `train` section.
        seed: initialisation, batches, dropout.
        progress: told the epoch.

    Returns:
        The heads; loss and cosine distance, averaged over the later epochs.
    """
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
    counted = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = _new_heads(image_ID, caption_CD, settings, settings.final_input_dropout)
        trainer = _Trainer(
            heads, together, image_ID, caption_CD, plan, settings.final_weight_decay, seed + 1, settings
        )
        for epoch in range(1, plan.epochs + 1):
            trainer.run_epoch(weights)
            if epoch >= settings.first_counted_epoch:
                image, caption = heads.embed(image_ID, caption_CD)
                (found,) = match(
                    image, caption, heads.scale().item(), candidates, (together.image_N, together.caption_N)
                )
                loss += found.loss
                distance -= found.similarity
                counted += 1
            progress("train on everything", epoch, plan.epochs)
    heads.eval()
    num = len(pairs)
    return Final(
        heads,
        Evidence(loss[:num] / counted, loss[num:] / counted),
        Evidence(distance[:num] / counted, distance[num:] / counted),
    )


# --- 4. the whole stage -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Everything the later stages need, per distinct pair, per known swap, and the final heads.

    `swap_caption_N` is the caption each pair's image is swapped to; `planted` indexes the swaps that sat in the
    final training, whose evidence stands behind that of the given pairs in `final`.
    """

    first: FirstLook
    folds: Folds
    final: Final
    model: Model
    swap_caption_N: Tensor
    planted: Tensor
    whole_images: bool
    candidates: Candidates


def train(
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    settings: TrainSection,
    num_candidates: int,
    progress: Progress = silent,
) -> Trained:
    """The whole training stage on frozen embeddings.

    Args:
        image_ID: image embeddings as the encoder gives them, shape [I, D].
        caption_CD: caption embeddings, shape [C, D'].
        pairs: the given pairs, distinct, in canonical order.
        settings: the recipe's `train` section.
        num_candidates: captions and images every pair is scored against.
        progress: told what is trained and how far.

    Raises:
        DatasetError: there are too few pairs, images or captions to tell anything.
        TrainingError: a loss is not finite.
    """
    check_enough(pairs)
    seed = settings.seed
    generator = torch.Generator().manual_seed(seed)
    swap_N = known_swaps.draw_swaps(pairs.image_N, pairs.caption_N, pairs.num_captions, generator)
    _check_swaps(swap_N, pairs)
    first = first_look(image_ID, caption_CD, pairs, swap_N, settings, seed)
    whole_images = strikes_whole_images(first.posterior_N, first.rate, pairs.image_N)
    if whole_images:
        swap_N = known_swaps.draw_image_swaps(pairs.image_N, pairs.caption_N, pairs.num_captions, generator)
        _check_swaps(swap_N, pairs)
        first = first_look(image_ID, caption_CD, pairs, swap_N, settings, seed)
    image_projection = principal_projection(image_ID, settings.components, whitening=0.5)
    caption_projection = (
        Projection.identity(caption_CD.shape[1])
        if caption_CD.shape[1] <= MAX_CAPTION_INPUTS
        else principal_projection(caption_CD, MAX_CAPTION_INPUTS, whitening=0.5)
    )
    image_inputs, caption_inputs = image_projection(image_ID), caption_projection(caption_CD)
    candidates = Candidates.draw(pairs, num_candidates, generator)
    group_N = pairs.image_N if whole_images else torch.arange(len(pairs))
    folds = train_folds(
        image_inputs,
        caption_inputs,
        pairs,
        swap_N,
        (1 - first.posterior_N).clamp_min(MIN_WEIGHT),
        group_N,
        candidates,
        settings,
        seed,
        progress,
    )
    held_out = combine_held_out(
        first.evidence, folds.loss, folds.distance, pairs, pairs.image_N, whole_images, seed
    )
    num_planted = max(1, round(settings.planted_share * len(pairs)))
    planted = torch.randperm(len(pairs), generator=generator)[:num_planted].sort().values
    final = train_final(
        image_inputs,
        caption_inputs,
        pairs,
        Pairs(pairs.image_N[planted], swap_N[planted], pairs.num_images, pairs.num_captions),
        (1 - held_out.posterior.given_N).clamp_min(MIN_WEIGHT),
        (1 - held_out.posterior.swaps_S[planted]).clamp_min(MIN_WEIGHT),
        candidates,
        settings,
        seed + 100,
        progress,
    )
    model = Model(final.heads, image_projection, caption_projection)
    return Trained(first, folds, final, model, swap_N, planted, whole_images, candidates)


def check_enough(pairs: Pairs) -> None:
    """Refuse sets that are too small to learn anything from.

    Raises:
        DatasetError: with the counts.
    """
    images, captions = len(pairs.image_N.unique()), len(pairs.caption_N.unique())
    if len(pairs) < MIN_PAIRS or images < MIN_DISTINCT or captions < MIN_DISTINCT:
        raise DatasetError(
            f"{len(pairs):,} distinct pairs of {images:,} images and {captions:,} captions are too few to audit",
            f"give at least {MIN_PAIRS} pairs with {MIN_DISTINCT} different images and captions",
        )


def _check_swaps(swap_N: Tensor, pairs: Pairs) -> None:
    num = len(pairs.image_N[swap_N < 0].unique())
    if num:
        who = "1 image carries" if num == 1 else f"{num:,} images carry"
        raise DatasetError(
            f"{who} nearly every caption of the set, so none can be mismatched",
            "audit a set in which images have captions of their own",
        )
