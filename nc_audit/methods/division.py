"""RRSITR's objective: divide a batch by loss, learn each part in its own way.

Clean and ambiguous pairs are learnt with self-paced weights, noisy ones with a triplet loss whose margin is soft.
Losses are relative to chance where they are divided and in nats where they are summed, so that the published
thresholds (5 and 18 of 4 ln 100) hold at any batch size, with or without the local part.

Shapes: B = pairs of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.methods import contrastive, self_paced


@dataclass(frozen=True)
class Divided:
    """One batch: the objective, and what it made of each pair.

    Attributes:
        objective: scalar with gradient.
        relative_loss_B: loss / chance, detached.
        weight_B: self-paced weight with the ambiguous factor, 0..1, 0 for noisy pairs.
        division_B: int8, 0 clean, 1 ambiguous, 2 noisy.
    """

    objective: Tensor
    relative_loss_B: Tensor
    weight_B: Tensor
    division_B: Tensor


def total_loss(cosine_BB: Tensor, local_BB: Tensor | None, counts_BB: Tensor, scale: float) -> Tensor:
    """Sum of the cross-entropies of every pair: two global ones, and two local ones where there are local scores.

    Args:
        cosine_BB: global cosines, image i against caption j, shape [B, B].
        local_BB: local similarities of the same, shape [B, B], or None.
        counts_BB: which candidates count (`contrastive.negatives_mask`).
        scale: fixed logit scale kappa, a factor, of both.

    Returns:
        Shape [B], nats, 0..; chance is 4 ln B with local scores, else 2 ln B.

    Source:
        RRSITR (arXiv 2603.28134), l_i; its code keeps kappa = e^2.996 = 20.0 fixed and does not learn it.
    """
    total = 2 * contrastive.in_batch_loss(scale * cosine_BB, counts_BB)
    if local_BB is not None:
        total = total + 2 * contrastive.in_batch_loss(scale * local_BB, counts_BB)
    return total


def divided_objective(
    cosine_BB: Tensor,
    local_BB: Tensor | None,
    counts_BB: Tensor,
    *,
    scale: float,
    clean_at: float,
    noisy_at: float,
    ambiguous_factor: float,
    triplet_factor: float,
    margin: float,
    is_paced: bool = True,
    has_ambiguous: bool = True,
    has_triplet: bool = True,
) -> Divided:
    """RRSITR's whole loss on one batch.

    Args:
        cosine_BB: global cosines, shape [B, B].
        local_BB: local similarities, shape [B, B], or None.
        counts_BB: which candidates count.
        scale: kappa, a factor.
        clean_at: gamma_1 as a fraction of chance.
        noisy_at: gamma_2 as a fraction of chance.
        ambiguous_factor: lambda_1.
        triplet_factor: lambda_2.
        margin: sigma, base margin of the triplet loss.
        is_paced: False leaves every weight at 1 (the ablation without self-pacing).
        has_ambiguous: False makes noisy all that is not clean (the ablation without an ambiguous class).
        has_triplet: False leaves noisy pairs out.

    Returns:
        The objective, mean over the batch, and the division.

    Source:
        RRSITR (arXiv 2603.28134): L_S1 + lambda_1 L_S2 + lambda_2 L_soft. The weight is detached, so the regulariser
        moves the printed value only. Chance counts the candidates that count, not the batch.
    """
    losses = total_loss(cosine_BB, local_BB, counts_BB, scale)
    num_terms = 2 if local_BB is None else 4
    candidates = (counts_BB.sum(1) + counts_BB.sum(0)).to(losses.dtype) / 2
    chance = num_terms * candidates.clamp_min(2).log()
    relative = (losses / chance).detach()
    division = self_paced.divide(relative, clean_at, noisy_at if has_ambiguous else clean_at)
    thresholds = losses.new_tensor([clean_at, noisy_at, noisy_at])[division.long()]
    share = (relative / thresholds).clamp(0.0, 1.0)
    weight = torch.cos(share * (torch.pi / 2)) if is_paced else torch.ones_like(share)
    regulariser = self_paced.pace_regulariser(weight, 1.0) * thresholds * chance if is_paced else 0.0
    factor = losses.new_tensor([1.0, ambiguous_factor, 0.0])[division.long()]
    objective = (factor * (weight * losses + regulariser)).sum()
    if has_triplet:
        is_noisy = (division == self_paced.NOISY).to(losses.dtype)
        triplet = contrastive.robust_triplet_loss(cosine_BB, counts_BB, margin)
        objective = objective + triplet_factor * (is_noisy * torch.nan_to_num(triplet)).sum()
    return Divided(objective / len(losses), relative, (factor * weight).detach(), division)
