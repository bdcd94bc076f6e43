"""What holds for the judgement of every method that divides pairs by a mixture."""

from __future__ import annotations

import torch

from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs, Judgement

EVERY = {
    "similarity": (-1.0, 1.0),
    "loss": (0.0, float("inf")),
    "relative_loss": (0.0, float("inf")),
    "energy": (-float("inf"), float("inf")),
    "swapped_entropy": (0.0, 1.0),
    "weight": (0.0, 1.0),
    "noise_score": (-float("inf"), float("inf")),
    "noise_probability": (0.0, 1.0),
    "clean_posterior": (0.0, 1.0),
}


def check_judgement(
    judgement: Judgement, inputs: Inputs, settings: TrainSection, more: dict[str, tuple[float, float]]
) -> None:
    """Columns with their ranges, facts, trajectory and model."""
    num = len(inputs.pairs)
    for name, (low, high) in (EVERY | more).items():
        column = judgement.given[name]
        assert column.shape == (num,), name
        assert column.dtype == torch.float32, name
        assert column.isfinite().all(), name
        assert ((column >= low - 1e-6) & (column <= high + 1e-6)).all(), name
        assert not column.requires_grad, name
    assert judgement.swaps == {}
    assert judgement.facts["num_candidates"] == len(inputs.candidates.caption_M)
    trajectory = judgement.trajectory
    for recorded in (trajectory.losses, trajectory.weights, trajectory.divisions):
        assert len(recorded) == settings.epochs
        assert all(epoch.shape == (num,) for epoch in recorded)
    assert {int(tag) for tag in torch.stack(trajectory.divisions).unique()} <= {0, 1, 2}
    image, caption = judgement.model.embed(inputs.image_ID, inputs.caption_CD)
    assert image.shape == (len(inputs.image_ID), settings.width)
    assert caption.shape == (len(inputs.caption_CD), settings.width)


def auroc(score: torch.Tensor, is_noisy: torch.Tensor) -> float:
    """Share of noisy-clean pairs of pairs in which the noisy one scores higher; half for ties."""
    above = score[is_noisy][:, None] - score[~is_noisy][None, :]
    return ((above > 0).double() + 0.5 * (above == 0).double()).mean().item()


def equal(one: Judgement, other: Judgement) -> bool:
    """Whether two judgements are the same to the last bit."""
    return one.given.keys() == other.given.keys() and all(
        torch.equal(one.given[name], other.given[name]) for name in one.given
    )
