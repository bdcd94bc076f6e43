"""Complementary losses: learn from what a pair does not match, which holds for noisy pairs as well.

Shapes: B = pairs of a batch (and their candidates); i, j, k run over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nc_audit.errors import ShapeError

SMALLEST = 1e-12
"""Probabilities below count as this: a gradient beyond would overflow."""


def _negatives(counts_BB: Tensor) -> Tensor:
    return counts_BB & ~torch.eye(len(counts_BB), dtype=torch.bool, device=counts_BB.device)


def _match_probability(logits_BB: Tensor, counts_BB: Tensor) -> Tensor:
    if logits_BB.dim() != 2 or logits_BB.shape[0] != logits_BB.shape[1]:
        raise ShapeError("logits", "B, B", logits_BB.shape)
    return logits_BB.masked_fill(~counts_BB, float("-inf")).softmax(1)


def complementary_loss(logits_BB: Tensor, counts_BB: Tensor) -> Tensor:
    """Complementary log loss of one direction, per pair: -sum over the negatives j of log(1 - p_ij).

    Args:
        logits_BB: logits of pair i's image against caption j (or transposed, of captions against images), shape
            [B, B].
        counts_BB: which candidates count (`contrastive.negatives_mask`), shape [B, B].

    Returns:
        Shape [B], nats, 0..; higher = some negative competes. A pair's own match enters only through p.

    Raises:
        ShapeError: if the logits are not square.

    Source:
        RCL (TPAMI 2023), the log form; the masking is ours.

    Example:
        >>> complementary_loss(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
        tensor([0.6931, 0.6931])
    """
    p_BB = _match_probability(logits_BB, counts_BB)
    rest = (1 - p_BB).clamp_min(torch.finfo(p_BB.dtype).eps)
    return -(rest.log() * _negatives(counts_BB)).sum(1)


def complement_transition(similarity_BB: Tensor, counts_BB: Tensor, temperature: float) -> Tensor:
    """Probability that j is drawn as "not the match" of k: a softmax of their similarity, without k itself.

    Args:
        similarity_BB: cosines of image k against caption j (or transposed), shape [B, B]; pass them detached
            where the choice of negatives must not be learnt.
        counts_BB: which candidates count, shape [B, B].
        temperature: above 0; infinity draws every negative alike, towards 0 only the hardest is left.

    Returns:
        Shape [B, B], 0..1, rows sum to 1, zero where j is no negative of k; a row without negatives is zero.

    Source:
        the bias of SREM's complementary learning (AAAI 2024), reconstructed; biased complementary labels are
        those of Yu et al. (ECCV 2018).

    Example:
        >>> complement_transition(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool), 0.1)
        tensor([[0.0000, 0.5000, 0.5000],
                [0.5000, 0.0000, 0.5000],
                [0.5000, 0.5000, 0.0000]])
    """
    off = _negatives(counts_BB)
    shares = (similarity_BB / temperature).masked_fill(~off, float("-inf")).softmax(1)
    return torch.where(off.any(1, keepdim=True), shares, torch.zeros_like(shares))


def biased_complementary_loss(
    logits_BB: Tensor, counts_BB: Tensor, transition_BB: Tensor, emphasis_BB: Tensor
) -> Tensor:
    """Biased complementary loss of one direction, per pair: -sum over the negatives j of e_ij log q_ij.

    q_ij = sum_k p_ik Pi_kj is the predicted probability that j is drawn as "not the match" of i. With the uniform
    transition and all e = 1 it equals `complementary_loss` + (B - 1) ln(B - 1).

    Args:
        logits_BB: logits of pair i's image against caption j (or transposed), shape [B, B].
        counts_BB: which candidates count, shape [B, B].
        transition_BB: Pi (`complement_transition`) of the same direction, shape [B, B].
        emphasis_BB: e, weight of each negative, shape [B, B], 0...

    Returns:
        Shape [B], nats, 0..

    Raises:
        ShapeError: if the logits are not square.

    Source:
        SREM (AAAI 2024), cross-modal biased complementary learning, reconstructed from the abstract.

    Example:
        >>> ones = torch.ones(3, 3, dtype=torch.bool)
        >>> biased_complementary_loss(
        ...     torch.zeros(3, 3), ones, complement_transition(torch.zeros(3, 3), ones, 1.0), ones
        ... )
        tensor([2.1972, 2.1972, 2.1972])
    """
    q_BB = (_match_probability(logits_BB, counts_BB) @ transition_BB).clamp_min(SMALLEST)
    return -(q_BB.log() * emphasis_BB * _negatives(counts_BB)).sum(1)
