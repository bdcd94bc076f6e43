"""TSVC-style (reconstructed): three networks on different data, soft labels from mutual-information variation.

The Coordinator trains on the pairs it thinks clean and hands out the data: the clean part, the rest, and a core of
the surest pairs. How a pair would change the mutual information of that core tells how well it matches. The Assistant
trains on what is neither core nor hopeless, with that as soft label. The Master trains on the clean part with refined
labels and, in the second half, on the rest, with what mutual information and Assistant say of it. It is the Master
that is kept.

Shapes: I = images; C = captions; N = pairs; B = batch; D = dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nc_audit.methods import soft_margin
from nc_audit.methods.complementary import complementary_loss
from nc_audit.methods.mixture import clean_posterior
from nc_audit.methods.mutual_information import GaussianDependence, trimmed_dependence
from nc_audit.methods.projections import principal_projection
from nc_audit.recipe import TrainSection, TsvcSection
from nc_audit.train.hinge import Lesson, View, judgement, lesson_loss, network, warm_up_loss
from nc_audit.train.loop import Inputs, Judgement, Plan, Progress, Trainer, Trajectory, silent

COORDINATOR, MASTER, ASSISTANT = range(3)


@dataclass(frozen=True)
class Hand:
    """What the Coordinator hands out after an epoch, and what is made of it; each of shape [N].

    Attributes:
        clean_N: w, its clean posterior, 0..1.
        core_N: the surest of the clean pairs, bool.
        variation_N: mutual-information variation against the core, nats; higher = agree.
        variation_label_N: clean posterior by the variation, 0..1.
        label_N: y, the Master's soft label, 0..1; higher = matches better.
    """

    clean_N: Tensor
    core_N: Tensor
    variation_N: Tensor
    variation_label_N: Tensor
    label_N: Tensor

    @classmethod
    def of(cls, views: list[View], image_ND: Tensor, caption_ND: Tensor, own: TsvcSection) -> Hand:
        """From what the three networks say, with the pairs' vectors for the mutual information."""
        hinge_N = views[COORDINATOR].hinge_N
        clean_N = clean_posterior(hinge_N)
        core_N = surest(clean_N, hinge_N, own.core_share)
        dependence = GaussianDependence(image_ND, caption_ND, core_N.float(), own.shrinkage)
        variation_N = dependence.variation(image_ND, caption_ND)
        variation_label_N = clean_posterior(-variation_N)
        masters_N = soft_margin.margin_prediction(views[MASTER].hinge_N, own.margin)
        assistants_N = soft_margin.margin_prediction(views[ASSISTANT].hinge_N, own.margin)
        eta = own.variation_share
        label_N = torch.where(
            clean_N > 0.5,
            soft_margin.refine(clean_N, masters_N),
            eta * variation_label_N + (1 - eta) * assistants_N,
        )
        return cls(clean_N, core_N, variation_N, variation_label_N, label_N)

    def lessons(self, own: TsvcSection, *, noisy_too: bool) -> list[Lesson]:
        """What Coordinator, Master and Assistant train on next: three different streams."""
        is_clean_N = self.clean_N > 0.5
        hopeful_N = surest((~is_clean_N).float(), -self.variation_N, own.core_share)
        return [
            Lesson(torch.ones_like(self.clean_N), is_clean_N),
            Lesson(self.label_N, is_clean_N | noisy_too),
            Lesson(self.variation_label_N, (is_clean_N & ~self.core_N) | hopeful_N),
        ]


def surest(clean_N: Tensor, loss_N: Tensor, share: float) -> Tensor:
    """The surest share of the pairs called clean: by posterior, then by loss where posteriors are equal.

    Args:
        clean_N: clean posterior, shape [N], 0..1; clean is above .5.
        loss_N: higher = fits worse, shape [N].
        share: of the clean pairs, above 0..1.

    Returns:
        Bool, shape [N]; at least one pair, where any is clean.

    Example:
        >>> surest(torch.tensor([1.0, 1.0, 0.9, 0.2]), torch.tensor([2.0, 1.0, 0.0, 0.0]), 0.4)
        tensor([False,  True, False, False])
    """
    is_clean_N = clean_N > 0.5
    num_clean = int(is_clean_N.sum())
    num = min(num_clean, max(1, round(share * num_clean)))
    by_loss = loss_N.argsort(stable=True)
    best = by_loss[clean_N[by_loss].argsort(descending=True, stable=True)][:num]
    chosen_N = torch.zeros_like(is_clean_N)
    chosen_N[best] = True
    return chosen_N


def train_tsvc(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Judge every pair by its mutual-information variation against a core that three networks found.

    `noise_score` is minus `mi_variation`; `soft_label` is the Master's y after the last epoch, `noise_probability`
    one minus it, `clean_posterior` the Coordinator's. Everything else is the Master's. `image_novelty` and
    `caption_novelty` (nats, higher = more unusual) tell an odd image or caption from a mismatch.

    Raises:
        TrainingError: a loss is not finite.
    """
    own, num = settings.tsvc, len(inputs.pairs)
    plan = Plan.of(num, settings)
    generator = torch.Generator().manual_seed(settings.seed + 20)
    image_ND, caption_ND = vectors(inputs, own.dims)
    trajectory = Trajectory()
    with torch.random.fork_rng(devices=[]):
        trainers = [network(inputs, settings, own.temperature, plan, settings.seed + 1 + k) for k in range(3)]
        lessons = [Lesson.everything(num)] * 3
        for epoch in range(1, plan.epochs + 1):
            for trainer, lesson in zip(trainers, lessons, strict=True):
                warm = epoch <= own.warm_up_epochs
                trainer.run_epoch(
                    partial(warm_up_loss, trainer, own.margin)
                    if warm
                    else partial(_lesson_loss, trainer, lesson, own)
                )
            views = [View.of(trainer, own.margin, generator) for trainer in trainers]
            hand = Hand.of(views, image_ND, caption_ND, own)
            trajectory.record(
                views[MASTER].matches.loss, lessons[MASTER].weight(), torch.where(hand.clean_N > 0.5, 0, 2)
            )
            if epoch >= own.warm_up_epochs:
                lessons = hand.lessons(own, noisy_too=epoch >= own.noisy_from * plan.epochs)
            progress("train three networks", epoch, plan.epochs)
    keep = float(hand.clean_N.mean())
    dependence, _ = trimmed_dependence(image_ND, caption_ND, hand.core_N, keep, own.rounds, own.shrinkage)
    variation_N = dependence.variation(image_ND, caption_ND)
    image_novelty_N, caption_novelty_N = dependence.novelty(image_ND, caption_ND)
    return judgement(
        trainers[MASTER],
        views[MASTER].matches,
        trajectory,
        {
            "noise_score": -variation_N,
            "noise_probability": 1 - hand.label_N,
            "mi_variation": variation_N,
            "clean_posterior": hand.clean_N,
            "soft_label": hand.label_N,
            "image_novelty": image_novelty_N,
            "caption_novelty": caption_novelty_N,
        },
    )


def vectors(inputs: Inputs, num: int) -> tuple[Tensor, Tensor]:
    """Whitened principal components of the pairs' frozen embeddings, shapes [N, D] and [N, D'].

    No more than a sixteenth of the pairs in dimensions, so that a core of them still tells covariances.
    """
    num = max(2, min(num, len(inputs.pairs) // 16))
    image_ID = principal_projection(inputs.image_ID, num)(inputs.image_ID)
    caption_CD = principal_projection(inputs.caption_CD, num)(inputs.caption_CD)
    return image_ID[inputs.pairs.image_N], caption_CD[inputs.pairs.caption_N]


def _lesson_loss(trainer: Trainer, lesson: Lesson, own: TsvcSection, at_B: Tensor) -> Tensor:
    """Soft-margin loss, plus a complementary loss that counts the more the less a pair is believed to match."""

    def complementary(cosine_BB: Tensor, counts_BB: Tensor, correspondence_B: Tensor) -> Tensor:
        logits_BB = trainer.heads.scale() * cosine_BB
        both_B = complementary_loss(logits_BB, counts_BB) + complementary_loss(logits_BB.T, counts_BB)
        return own.complementary_factor * (1 - correspondence_B) * both_B

    return lesson_loss(trainer, lesson, own.margin, own.power, at_B, complementary)
