"""Hinge losses whose margin follows how well a pair is believed to match.

Shapes: B = pairs of a batch (and their candidates); N = pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nc_audit.errors import ShapeError
from nc_audit.methods.contrastive import hardest_negative_gap


def hinge_loss(similarity_BB: Tensor, counts_BB: Tensor, margin: float) -> Tensor:
    """Hinge loss of every pair over all its negatives, both directions added.

    With S the cosines, (1/B) sum_j [margin + S_ij - S_ii]_+ + (1/B) sum_j [margin + S_ji - S_ii]_+ over the
    negatives j of i; B counts the whole batch.

    Args:
        similarity_BB: cosines, image i against caption j, shape [B, B].
        counts_BB: which candidates count (`contrastive.negatives_mask`), shape [B, B]; the diagonal is ignored.
        margin: alpha, above 0.

    Returns:
        Shape [B], 0..2 (2 + margin); 2 margin (B - 1) / B where all cosines are equal; higher = fits worse.

    Raises:
        ShapeError: if the cosines are not square.

    Source:
        NCR (NeurIPS 2021), its loss of the warm-up and of the division; the masking is ours.

    Example:
        >>> hinge_loss(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), 0.2)
        tensor([0.2000, 0.2000])
    """
    if similarity_BB.dim() != 2 or similarity_BB.shape[0] != similarity_BB.shape[1]:
        raise ShapeError("similarity", "B, B", similarity_BB.shape)
    size = len(similarity_BB)
    off = counts_BB & ~torch.eye(size, dtype=torch.bool, device=similarity_BB.device)
    own_B = similarity_BB.diagonal()
    image = torch.relu(margin + similarity_BB - own_B[:, None]) * off
    caption = torch.relu(margin + similarity_BB - own_B[None, :]) * off
    return (image.sum(1) + caption.sum(0)) / size


def margin_prediction(hinge_loss_N: Tensor, margin: float, top_share: float = 0.1) -> Tensor:
    """How well a pair is predicted to match, from how much of the margin its hinge loss leaves.

    P = clip(margin - loss / 2, 0, margin), divided by the mean of the highest `top_share` of P, clipped to 1.

    Args:
        hinge_loss_N: `hinge_loss` of the pairs, shape [N].
        margin: alpha of that loss.
        top_share: share of the pairs that stand for a perfect match, above 0..1.

    Returns:
        Shape [N], 0..1; higher = matches better; all 0 where no pair keeps any margin.

    Source:
        NCR (NeurIPS 2021), co-rectifying prediction.

    Example:
        >>> margin_prediction(torch.tensor([0.0, 0.2, 0.5]), 0.2)
        tensor([1.0000, 0.5000, 0.0000])
    """
    left_N = (margin - hinge_loss_N / 2).clamp(0.0, margin)
    num = max(1, int(top_share * len(left_N)))
    top = left_N.topk(num).values.mean()
    return (left_N / top).clamp(0.0, 1.0) if top > 0 else torch.zeros_like(left_N)


def refine(clean_posterior_N: Tensor, prediction_N: Tensor) -> Tensor:
    """The soft correspondence of pairs thought clean: w + (1 - w) P.

    Args:
        clean_posterior_N: w, shape [N], 0..1.
        prediction_N: P, shape [N], 0..1.

    Returns:
        Shape [N], 0..1; higher = matches better.

    Source:
        NCR (NeurIPS 2021).

    Example:
        >>> refine(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]))
        tensor([1.0000, 0.7500])
    """
    return clean_posterior_N + (1 - clean_posterior_N) * prediction_N


def soft_margin(correspondence_B: Tensor, margin: float, power: float = 10.0) -> Tensor:
    """The margin of each pair: margin (m^y - 1) / (m - 1).

    Args:
        correspondence_B: y, shape [B], 0..1.
        margin: alpha, the margin of a certain match.
        power: m, above 1; the higher, the less margin a doubtful pair has.

    Returns:
        Shape [B], 0..margin, increasing in y.

    Source:
        NCR (NeurIPS 2021), with m = 10.

    Example:
        >>> soft_margin(torch.tensor([0.0, 0.5, 1.0]), 0.2)
        tensor([0.0000, 0.0481, 0.2000])
    """
    return margin * (power**correspondence_B - 1) / (power - 1)


def soft_margin_loss(similarity_BB: Tensor, counts_BB: Tensor, margin_B: Tensor) -> Tensor:
    """Hinge loss on the hardest negative of either direction, with a margin per pair.

    Args:
        similarity_BB: cosines, image i against caption j, shape [B, B].
        counts_BB: which candidates count, shape [B, B]; the diagonal is ignored.
        margin_B: margin of each pair, shape [B], used in both directions.

    Returns:
        Shape [B], 0..; 0 for a pair without negatives.

    Source:
        NCR (NeurIPS 2021), the formula; its code takes the margin of the negative's row in the caption
        direction instead of the pair's own.

    Example:
        >>> soft_margin_loss(torch.eye(2), torch.ones(2, 2, dtype=torch.bool), torch.tensor([0.2, 1.5]))
        tensor([0., 1.])
    """
    over_captions, over_images = hardest_negative_gap(similarity_BB, counts_BB)
    return torch.relu(margin_B + over_captions) + torch.relu(margin_B + over_images)
