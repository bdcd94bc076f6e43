"""What networks that train on a hinge loss share: heads with a fixed scale, lessons, and what they see of all pairs.

Shapes: I = images; C = captions; N = pairs; B = batch; D = dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.methods import soft_margin
from nc_audit.methods.contrastive import negatives_mask
from nc_audit.methods.matching import Matches, Pairs, match
from nc_audit.model import Model
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs, Judgement, Plan, Trainer, Trajectory, columns_of, new_heads


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
