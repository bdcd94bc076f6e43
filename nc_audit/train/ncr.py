"""NCR: two networks teach each other which pairs are clean, by a two-component mixture on their hinge losses.

After every epoch each network's loss of every pair is split by the mixture; network A then trains on the split that
B's losses gave, and B on A's. Pairs called clean train with a margin that follows their refined correspondence; the
others join in the second half, with what both networks predict of them.

Three things differ from the published code. The predictions that refine the correspondence are refreshed with the
losses, once per epoch, not at every step. A batch holds pairs of both kinds, each counting the same, where the code
takes batches of either in turn; those that do not train yet are negatives. And the last epoch counts, where the paper
picks one on clean pairs held back, which an audit does not have.

Shapes: I = images; C = captions; N = pairs; B = batch; D = dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nc_audit.methods import soft_margin
from nc_audit.methods.contrastive import negatives_mask
from nc_audit.methods.matching import Matches, Pairs, match
from nc_audit.methods.mixture import clean_posterior
from nc_audit.model import Model
from nc_audit.recipe import NcrSection, TrainSection
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

TIE_BREAK = 1e-3
"""What the whole range of the losses adds to the score: posteriors saturate, and their ties must be broken."""


def train_ncr(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Judge every pair by NCR as it stands after the last epoch.

    `clean_posterior` is the mean of both networks' posteriors, `noise_probability` one minus it, `noise_score` the
    same with ties broken by the mean hinge loss. Similarity, loss, energy and entropies are means of both networks;
    the model is the first network alone.

    Raises:
        TrainingError: a loss is not finite.
    """
    own, num = settings.ncr, len(inputs.pairs)
    plan = Plan.of(num, settings)
    generator = torch.Generator().manual_seed(settings.seed + 20)
    trajectory = Trajectory()
    with torch.random.fork_rng(devices=[]):
        trainers = [network(inputs, settings, own.temperature, plan, settings.seed + 1 + k) for k in range(2)]
        lessons = [Lesson.everything(num)] * 2
        for epoch in range(1, plan.epochs + 1):
            for trainer, lesson in zip(trainers, lessons, strict=True):
                warm = epoch <= own.warm_up_epochs
                trainer.run_epoch(
                    partial(warm_up_loss, trainer, own.margin)
                    if warm
                    else partial(lesson_loss, trainer, lesson, own.margin, own.power)
                )
            views = [View.of(trainer, own.margin, generator) for trainer in trainers]
            clean = [clean_posterior(view.hinge_N) for view in views]
            trajectory.record(
                (views[0].matches.loss + views[1].matches.loss) / 2,
                (lessons[0].weight() + lessons[1].weight()) / 2,
                torch.where(clean[0] + clean[1] > 1, 0, 2),
            )
            if epoch >= own.warm_up_epochs:
                lessons = co_teach(clean, views, own, noisy_too=epoch >= own.noisy_from * plan.epochs)
            progress("train two networks", epoch, plan.epochs)
    clean_N = (clean[0] + clean[1]) / 2
    hinge_N = (views[0].hinge_N + views[1].hinge_N) / 2
    matches = Matches.zeros(num)
    for view in views:
        matches.add_(torch.arange(num), view.matches)
    return judgement(
        trainers[0],
        matches.divided(2),
        trajectory,
        {
            "noise_score": 1 - clean_N + TIE_BREAK * hinge_N / hinge_N.max().clamp_min(1e-9),
            "noise_probability": 1 - clean_N,
            "clean_posterior": clean_N,
        },
    )


# --- what networks on a hinge loss share ------------------------------------------------------------------


def network(inputs: Inputs, settings: TrainSection, temperature: float, plan: Plan, seed: int) -> Trainer:
    """Heads with a fixed logit scale, in training on all pairs; `seed` draws initial values and batches.

    It seeds torch: call it inside `torch.random.fork_rng`.
    """
    torch.manual_seed(seed)
    fixed = settings.model_copy(update={"log_scale": -math.log(temperature), "max_scale": 1 / temperature})
    heads = new_heads(inputs, fixed, settings.final_input_dropout)
    heads.log_scale.requires_grad_(False)
    return Trainer(heads, inputs, inputs.pairs, plan, settings, settings.final_weight_decay, seed + 100)


@dataclass(frozen=True)
class Lesson:
    """What a network trains on in one epoch.

    Attributes:
        correspondence_N: y, how well each pair is believed to match, shape [N], 0..1; it sets the margin.
        trains_N: pairs that train, bool, shape [N]; the others are negatives only.
    """

    correspondence_N: Tensor
    trains_N: Tensor

    @classmethod
    def everything(cls, num_pairs: int) -> Lesson:
        """All pairs as matches."""
        return cls(torch.ones(num_pairs), torch.ones(num_pairs, dtype=torch.bool))

    def weight(self) -> Tensor:
        """The correspondence of pairs that train, 0 of the others: shape [N], 0..1."""
        return self.correspondence_N * self.trains_N


@dataclass(frozen=True)
class View:
    """What one network says of all pairs: its hinge loss in random batches, and `Matches` against candidates."""

    hinge_N: Tensor
    matches: Matches

    @classmethod
    def of(cls, trainer: Trainer, margin: float, generator: torch.Generator) -> View:
        """The network as it stands; the generator draws the batches."""
        image, caption = trainer.embed()
        pairs, inputs = trainer.pairs, trainer.inputs
        asked = (pairs.image_N, pairs.caption_N)
        found = match(image, caption, trainer.heads.scale().item(), inputs.candidates, asked)[0]
        return cls(batched_hinge(image, caption, pairs, trainer.plan.batch, margin, generator), found)


def batched_hinge(
    image_ID: Tensor,
    caption_CD: Tensor,
    pairs: Pairs,
    batch: int,
    margin: float,
    generator: torch.Generator,
) -> Tensor:
    """Hinge loss of every pair over the negatives of a random batch, shape [N].

    Args:
        image_ID: unit vectors of all images, shape [I, D].
        caption_CD: unit vectors of all captions, shape [C, D].
        pairs: the pairs.
        batch: pairs per batch, about; batches are of nearly equal size.
        margin: alpha.
        generator: draws the batches.
    """
    order = torch.randperm(len(pairs), generator=generator)
    hinge_N = torch.empty(len(pairs))
    for at_B in order.tensor_split(max(1, round(len(pairs) / batch))):
        image, caption = pairs.image_N[at_B], pairs.caption_N[at_B]
        cosine_BB = image_ID[image] @ caption_CD[caption].T
        hinge_N[at_B] = soft_margin.hinge_loss(cosine_BB, negatives_mask(image, caption), margin)
    return hinge_N


def warm_up_loss(trainer: Trainer, margin: float, at_B: Tensor) -> Tensor:
    """Hinge loss of a batch over all its negatives, a scalar."""
    cosine_BB, image, caption = trainer.cosines(at_B)
    return soft_margin.hinge_loss(cosine_BB, negatives_mask(image, caption), margin).mean()


def lesson_loss(
    trainer: Trainer,
    lesson: Lesson,
    margin: float,
    power: float,
    at_B: Tensor,
    more: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Soft-margin loss of a batch's pairs that train, their mean, a scalar.

    Args:
        trainer: the network.
        lesson: what it trains on.
        margin: alpha.
        power: m.
        at_B: the batch.
        more: further loss per pair from cosines [B, B], mask [B, B] and correspondence [B], added before the mean.
    """
    cosine_BB, image, caption = trainer.cosines(at_B)
    counts_BB = negatives_mask(image, caption)
    correspondence_B, trains_B = lesson.correspondence_N[at_B], lesson.trains_N[at_B]
    margin_B = soft_margin.soft_margin(correspondence_B, margin, power)
    loss_B = soft_margin.soft_margin_loss(cosine_BB, counts_BB, margin_B)
    if more is not None:
        loss_B = loss_B + more(cosine_BB, counts_BB, correspondence_B)
    return (loss_B * trains_B).sum() / trains_B.sum().clamp_min(1)


def judgement(
    trainer: Trainer, matches: Matches, trajectory: Trajectory, own_columns: dict[str, Tensor]
) -> Judgement:
    """What a method of these networks hands on; the trainer's heads are its model."""
    inputs, heads = trainer.inputs, trainer.heads.eval()
    num_candidates = len(inputs.candidates.caption_M)
    given = columns_of(matches, num_candidates) | {"weight": torch.stack(trajectory.weights).mean(0)}
    facts = {"logit_scale": round(heads.scale().item(), 6), "num_candidates": num_candidates}
    model = Model(heads, inputs.image_projection, inputs.caption_projection)
    return Judgement(given | own_columns, {}, facts, trajectory, model)


# --- co-teaching ------------------------------------------------------------------------------------------


def co_teach(
    clean: Sequence[Tensor], views: Sequence[View], own: NcrSection, *, noisy_too: bool
) -> list[Lesson]:
    """The next lesson of each of two networks: the split of the other, refined by its own predictions.

    Args:
        clean: clean posterior by each network's losses, each of shape [N].
        views: what each network says.
        own: `margin`, `top_share`.
        noisy_too: pairs that are not clean train as well.
    """
    predicted = [soft_margin.margin_prediction(view.hinge_N, own.margin, own.top_share) for view in views]
    both_N = (predicted[0] + predicted[1]) / 2
    lessons = []
    for mine, theirs in ((0, 1), (1, 0)):
        is_clean_N = clean[theirs] > 0.5
        correspondence_N = torch.where(is_clean_N, soft_margin.refine(clean[theirs], predicted[mine]), both_N)
        lessons.append(Lesson(correspondence_N, is_clean_N | noisy_too))
    return lessons
