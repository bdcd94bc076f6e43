"""SREM-style (reconstructed): clean pairs by loss and energy, complementary learning for what is left.

One network. It warms up on complementary learning alone, which needs no match to be right. From then on two mixtures
split the pairs after every epoch, by loss and by energy; a pair is clean where both agree. Clean pairs train on their
match, each direction weighted by the other direction's entropy; all pairs train on what they do not match; and the
energies of clean and other pairs are kept apart.

Shapes: N = pairs; B = batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nc_audit.methods.complementary import biased_complementary_loss, complement_transition
from nc_audit.methods.contrastive import negatives_mask
from nc_audit.methods.matching import Candidates, Matches
from nc_audit.methods.mixture import clean_posterior
from nc_audit.methods.uncertainty import (
    energy,
    energy_separation,
    match_entropy,
    relative_energy,
    swapped_entropy,
)
from nc_audit.recipe import SremSection, TrainSection
from nc_audit.train.hinge import judgement, network
from nc_audit.train.loop import Inputs, Judgement, Plan, Progress, Trainer, Trajectory, silent


@dataclass(frozen=True)
class Filtration:
    """The split of all pairs after an epoch, and the bounds that keep the two sides' energies apart.

    Attributes:
        by_loss_N: a, clean posterior by the loss, shape [N], 0..1.
        by_energy_N: b, clean posterior by the energy, shape [N], 0..1.
        bounds: m_c and m_n, relative energies, nats.
    """

    by_loss_N: Tensor
    by_energy_N: Tensor
    bounds: tuple[float, float]

    @classmethod
    def of(
        cls, matches: Matches, candidates: Candidates, bounds: tuple[float, float] | None, own: SremSection
    ) -> Filtration:
        """The split by scores against the candidates; the bounds are set once, by the first split."""
        if bounds is None:
            asked = torch.tensor(own.energy_quantiles)
            low, high = _relative(matches.energy, candidates).quantile(asked).tolist()
            bounds = (low, high)
        return cls(clean_posterior(matches.loss), clean_posterior(matches.energy, 0.0), bounds)

    def is_clean(self) -> Tensor:
        """Pairs that both call clean, bool, shape [N]."""
        return (self.by_loss_N > 0.5) & (self.by_energy_N > 0.5)

    def division(self) -> Tensor:
        """0 where both call a pair clean, 1 where one does, 2 where none does; shape [N]."""
        return 2 - (self.by_loss_N > 0.5).int() - (self.by_energy_N > 0.5).int()


def _relative(energy_N: Tensor, candidates: Candidates) -> Tensor:
    """Energy per candidate, mean of the two directions, so that the batch's energies compare."""
    sizes = torch.tensor([len(candidates.caption_M), len(candidates.image_M)])
    return relative_energy(energy_N, sizes.float().log().mean().exp()[None])


def train_srem(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Judge every pair by the loss of an SREM-style network, averaged over the passes of the last epochs.

    `noise_score` is that loss. `clean_posterior` is the mixture's by the loss, `energy_posterior` by the energy, and
    `noise_probability` one minus the first. `weight` is the share of the epochs after the warm-up in which the pair
    trained as clean.

    Raises:
        TrainingError: a loss is not finite.
    """
    own, num = settings.srem, len(inputs.pairs)
    plan = Plan.of(num, settings)
    trajectory = Trajectory()
    filtration: Filtration | None = None
    total, passes = Matches.zeros(num), 0
    with torch.random.fork_rng(devices=[]):
        trainer = network(inputs, settings, own.temperature, plan, settings.seed + 1)
        for epoch in range(1, plan.epochs + 1):
            trainer.run_epoch(partial(_objective, trainer, own, filtration))
            weight_N = torch.zeros(num) if filtration is None else filtration.is_clean().float()
            matches = trainer.matches()
            bounds = None if filtration is None else filtration.bounds
            split = Filtration.of(matches, inputs.candidates, bounds, own)
            trajectory.record(matches.loss, weight_N, split.division())
            if epoch >= own.warm_up_epochs:
                filtration = split
            if epoch > plan.epochs - own.passes:
                total.add_(torch.arange(num), matches)
                passes += 1
            progress("train", epoch, plan.epochs)
    matches = total.divided(passes)
    clean_N = clean_posterior(matches.loss)
    trained = trajectory.weights[own.warm_up_epochs :] or trajectory.weights
    return judgement(
        trainer,
        matches,
        trajectory,
        {
            "weight": torch.stack(trained).mean(0),
            "noise_score": matches.loss,
            "noise_probability": 1 - clean_N,
            "clean_posterior": clean_N,
            "energy_posterior": clean_posterior(matches.energy, 0.0),
        },
    )


def _objective(trainer: Trainer, own: SremSection, filtration: Filtration | None, at_B: Tensor) -> Tensor:
    """The loss of a batch, a scalar; without a filtration, complementary learning alone."""
    cosine_BB, image, caption = trainer.cosines(at_B)
    counts_BB = negatives_mask(image, caption)
    logits_BB = trainer.heads.scale() * cosine_BB
    by_image = _biased(logits_BB, cosine_BB.detach(), counts_BB, own.complementary_temperature)
    by_caption = _biased(logits_BB.T, cosine_BB.detach().T, counts_BB, own.complementary_temperature)
    complementary = (by_image + by_caption).mean()
    if filtration is None:
        return complementary
    is_clean_B = filtration.is_clean()[at_B]
    masked_BB = logits_BB.masked_fill(~counts_BB, float("-inf"))
    energies = energy(masked_BB), energy(masked_BB.T)
    with torch.no_grad():
        entropies = swapped_entropy(match_entropy(masked_BB), match_entropy(masked_BB.T))
        decided = own.entropy_weight == "decided"
        say = [1 - entropy_B if decided else entropy_B for entropy_B in entropies]
    match_B = -logits_BB.diagonal()
    positive_B = say[0] * (match_B - energies[0]) + say[1] * (match_B - energies[1])
    uncertainty_B = relative_energy((energies[0] + energies[1]) / 2, counts_BB.sum(1))
    separation_B = energy_separation(uncertainty_B, is_clean_B, *filtration.bounds)
    positive, clean = _mean_over(is_clean_B, positive_B), _mean_over(is_clean_B, separation_B)
    separation = clean + _mean_over(~is_clean_B, separation_B)
    return positive + own.complementary_factor * complementary + own.energy_factor * separation


def _biased(logits_BB: Tensor, cosine_BB: Tensor, counts_BB: Tensor, temperature: float) -> Tensor:
    """Biased complementary loss of one direction, [B]; hard negatives count more, the mean of all is 1."""
    transition_BB = complement_transition(cosine_BB, counts_BB, temperature)
    emphasis_BB = transition_BB * (counts_BB.sum(1, keepdim=True) - 1)
    return biased_complementary_loss(logits_BB, counts_BB, transition_BB, emphasis_BB)


def _mean_over(chosen_B: Tensor, values_B: Tensor) -> Tensor:
    """Mean over the chosen pairs, 0 where there are none."""
    return (values_B * chosen_B).sum() / chosen_B.sum().clamp_min(1)
