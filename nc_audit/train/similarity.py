"""The plainest method: the cosine of a pair. Zero-shot with aligned encoders, else of plainly trained heads.

This is the reference every other method must beat; `plain_space` also is the space that the baselines `lemon` and
`confident` work in.

Shapes: I = images; C = captions; N = pairs; B = batch; D = dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.errors import ShapeError
from nc_audit.methods import contrastive
from nc_audit.methods.matching import Matches, match
from nc_audit.methods.mixture import clean_posterior
from nc_audit.methods.projections import Projection
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


@dataclass(frozen=True)
class Space:
    """A common space of images and captions that nothing was done for to keep noise out.

    Attributes:
        model: leads from embeddings to the space.
        image_ID: unit vectors of all images, shape [I, D].
        caption_CD: unit vectors of all captions, shape [C, D].
        scale: logit scale, a factor.
        matches: every pair against the fixed candidates.
        trajectory: per epoch; empty where nothing was trained.
    """

    model: Model
    image_ID: Tensor
    caption_CD: Tensor
    scale: float
    matches: Matches
    trajectory: Trajectory

    def judgement(
        self, inputs: Inputs, noise_score_N: Tensor, mixed_N: Tensor | None = None, **columns: Tensor
    ) -> Judgement:
        """What a baseline hands on: its score, a probability from a mixture on it, and its own columns.

        Two normal components fitted to a score tell what share lies in the worse one; nothing calibrates that.

        Args:
            inputs: what the space was made of.
            noise_score_N: higher = noisier, shape [N].
            mixed_N: what the mixture is fitted to where that is not the score itself; higher = noisier, shape [N].
            columns: more of the method's own, each of shape [N].
        """
        num_candidates = len(inputs.candidates.caption_M)
        given = columns_of(self.matches, num_candidates) | {
            "weight": torch.ones(len(inputs.pairs)),
            "noise_score": noise_score_N,
            "noise_probability": 1 - clean_posterior(noise_score_N if mixed_N is None else mixed_N),
        }
        facts = {"logit_scale": round(self.scale, 6), "num_candidates": num_candidates}
        return Judgement(given | columns, {}, facts, self.trajectory, self.model)


def plain_space(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Space:
    """The space of aligned encoders as it is; with others, of heads trained with equal weights on all pairs.

    Args:
        inputs: frozen embeddings, pairs, candidates.
        settings: the recipe's `train` section.
        progress: told the epoch.

    Raises:
        ShapeError: encoders that are called aligned differ in dimensions.
        TrainingError: a loss is not finite.
    """
    if inputs.logit_scale is None:
        return _trained_space(inputs, settings, progress)
    dims = inputs.image_ID.shape[1]
    if inputs.caption_CD.shape[1] != dims:
        raise ShapeError("caption embeddings of aligned encoders", f"C, {dims}", inputs.caption_CD.shape)
    model = Model(None, Projection.identity(dims), Projection.identity(dims))
    image_ID, caption_CD = model.embed(inputs.image_ID, inputs.caption_CD)
    asked = (inputs.pairs.image_N, inputs.pairs.caption_N)
    matches = match(image_ID, caption_CD, inputs.logit_scale, inputs.candidates, asked)[0]
    return Space(model, image_ID, caption_CD, inputs.logit_scale, matches, Trajectory())


def _trained_space(inputs: Inputs, settings: TrainSection, progress: Progress) -> Space:
    pairs, seed = inputs.pairs, settings.seed
    plan = Plan.of(len(pairs), settings)
    trajectory = Trajectory()
    equal_N = torch.ones(len(pairs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = new_heads(inputs, settings, settings.final_input_dropout)
        trainer = Trainer(heads, inputs, pairs, plan, settings, settings.final_weight_decay, seed + 1)

        def loss(at_B: Tensor) -> Tensor:
            cosine_BB, image_B, caption_B = trainer.cosines(at_B)
            others = contrastive.left_out(image_B, caption_B)
            return contrastive.in_batch_loss(heads.scale() * cosine_BB, others).mean()

        for epoch in range(1, plan.epochs + 1):
            trainer.run_epoch(loss)
            matches = trainer.matches()
            trajectory.record_paced(matches.loss, equal_N, len(inputs.candidates.caption_M), settings)
            progress("train plainly", epoch, plan.epochs)
    heads.eval()
    model = Model(heads, inputs.image_projection, inputs.caption_projection)
    return Space(model, *trainer.embed(), heads.scale().item(), matches, trajectory)


def train_similarity(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Judge every pair by its cosine alone: `noise_score` is one minus it, 0..2.

    `noise_probability` is the posterior of the worse of two normal components on that score, not calibrated.

    Raises:
        TrainingError: a loss is not finite.
    """
    space = plain_space(inputs, settings, progress)
    return space.judgement(inputs, 1 - space.matches.similarity)
