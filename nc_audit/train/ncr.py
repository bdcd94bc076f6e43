"""NCR: two networks teach each other which pairs are clean, by a two-component mixture on their hinge losses.

After every epoch each network's loss of every pair is split by the mixture; network A then trains on the split that
B's losses gave, and B on A's. Pairs called clean train with a margin that follows their refined correspondence; the
others join in the second half, with what both networks predict of them.

Three things differ from the published code. The predictions that refine the correspondence are refreshed with the
losses, once per epoch, not at every step. A batch holds pairs of both kinds, each counting the same, where the code
takes batches of either in turn; those that do not train yet are negatives. And the last epoch counts, where the paper
picks one on clean pairs held back, which an audit does not have.

Shapes: N = pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nc_audit.methods import soft_margin
from nc_audit.methods.matching import Matches
from nc_audit.methods.mixture import clean_posterior
from nc_audit.recipe import NcrSection, TrainSection
from nc_audit.train.hinge import Lesson, View, judgement, lesson_loss, network, warm_up_loss
from nc_audit.train.loop import Inputs, Judgement, Plan, Progress, Trajectory, silent

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
