"""Contrastive losses per pair, with candidates that are no negatives masked out.

Shapes: B = pairs of a batch (and their candidates); M = candidates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nc_audit.errors import ShapeError

_NO_OVERFLOW = 70.0  # e^70 times a million candidates is a float32, and so is e^-70


def negatives_mask(image_B: Tensor, caption_B: Tensor) -> Tensor:
    """Which in-batch candidates may serve as negatives or as the own match.

    Candidate j of pair i is left out when it shows the same image or carries the same caption: both match.

    Args:
        image_B: index of each pair's image, shape [..., B].
        caption_B: index of each pair's caption, shape [..., B].

    Returns:
        Shape [..., B, B], True where the candidate counts; the diagonal (the own match) is always True. Symmetric.

    Example:
        >>> negatives_mask(torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5])).int()
        tensor([[1, 0, 0],
                [0, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    differ = (image_B[..., :, None] != image_B[..., None, :]) & (
        caption_B[..., :, None] != caption_B[..., None, :]
    )
    differ.diagonal(dim1=-2, dim2=-1).fill_(True)
    return differ


def left_out(image_B: Tensor, caption_B: Tensor) -> tuple[Tensor, ...]:
    """Where `negatives_mask` is False, as an index; a few places of many, found without a look at all of them.

    Args:
        image_B: index of each pair's image, shape [..., B].
        caption_B: index of each pair's caption, shape [..., B].

    Returns:
        A tensor of positions for each dimension of [..., B, B]; a place may be named twice, in any order.

    Example:
        >>> [one.tolist() for one in left_out(torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5]))]
        [[0, 1, 0, 2], [1, 0, 2, 0]]
    """
    shape, found = image_B.shape, []
    batch_N = torch.arange(image_B.numel(), device=image_B.device) // shape[-1]
    for index_B in (image_B, caption_B):
        index_N = index_B.reshape(-1)
        ordered_N, order_N = (index_N + batch_N * (index_N.max() + 1)).sort()
        _, group_N, num_G = ordered_N.unique_consecutive(return_inverse=True, return_counts=True)
        first_N, num_N = (num_G.cumsum(0) - num_G)[group_N], num_G[group_N]  # of all that are equal
        one_P = torch.repeat_interleave(num_N)
        other_P = torch.arange(len(one_P), device=one_P.device) + (first_N + num_N - num_N.cumsum(0))[one_P]
        is_other = one_P != other_P
        found.append(torch.stack([order_N[one_P[is_other]], order_N[other_P[is_other]]]))
    one_P, other_P = torch.cat(found, 1)
    # Not by unravel_index, whose first call imports sympy.
    steps = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    return (
        *(one_P // step % size for step, size in zip(steps, shape, strict=True)),
        other_P % shape[-1],
    )


def in_batch_loss(logits_BB: Tensor, counts_BB: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Contrastive loss of every pair of a batch, mean of the two directions.

    Args:
        logits_BB: similarity of image i and caption j times the logit scale, shape [..., B, B].
        counts_BB: which candidates count (`negatives_mask`), shape [..., B, B]; or where they do not (`left_out`).

    Returns:
        Shape [..., B], nats, 0..; chance is ln of the number of candidates that count.

    Source:
        symmetric InfoNCE of CLIP, unreduced; the masking is ours.

    Example:
        >>> in_batch_loss(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
        tensor([0.6931, 0.6931])
    """
    if logits_BB.dim() < 2 or logits_BB.shape[-1] != logits_BB.shape[-2]:
        raise ShapeError("logits", "B, B", logits_BB.shape)
    low, high = torch.aminmax(logits_BB)
    if max(-low, high) <= _NO_OVERFLOW:
        return _BoundedLoss.apply(logits_BB, counts_BB)
    logits_BB = logits_BB.to(torch.promote_types(logits_BB.dtype, torch.float32))
    masked = _filled_(logits_BB.clone(), counts_BB, float("-inf"))
    normaliser = (masked.logsumexp(-1) + masked.logsumexp(-2)) / 2
    return normaliser - logits_BB.diagonal(dim1=-2, dim2=-1)


def _filled_(values_BB: Tensor, counts_BB: Tensor | tuple[Tensor, ...], value: float) -> Tensor:
    """The values with those replaced, in place, that do not count."""
    if isinstance(counts_BB, Tensor):
        return values_BB.masked_fill_(~counts_BB, value)
    values_BB[counts_BB] = value
    return values_BB


class _BoundedLoss(torch.autograd.Function):
    """`in_batch_loss` of logits whose exponentials and their sums can neither overflow nor vanish.

    They are taken once for both directions and for the gradient, and kept in the precision of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_BB: Tensor, counts_BB: Tensor | tuple[Tensor, ...]) -> Tensor:
        full = torch.promote_types(logits_BB.dtype, torch.float32)
        grown = _filled_(logits_BB.exp(), counts_BB, 0.0)
        over_captions, over_images = (grown.sum(dim).to(full) for dim in (-1, -2))
        ctx.save_for_backward(grown, over_captions, over_images)
        own = logits_BB.diagonal(dim1=-2, dim2=-1).to(full)
        return ((over_captions.log() + over_images.log()) / 2 - own).clamp_min_(0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, None]:
        grown, over_captions, over_images = ctx.saved_tensors
        captions, images = gradient_B / 2 / over_captions, gradient_B / 2 / over_images
        own = grown.diagonal(dim1=-2, dim2=-1) * (captions + images) - gradient_B
        of_logits = captions.to(grown.dtype)[..., :, None] + images.to(grown.dtype)[..., None, :]
        of_logits.mul_(grown).diagonal(dim1=-2, dim2=-1).copy_(own)
        return of_logits, None


def candidate_logsumexp(own_B: Tensor, logits_BM: Tensor, counts_BM: Tensor) -> Tensor:
    """Log-sum-exp of the own logit and of the candidates that count.

    Args:
        own_B: logit of the own match, shape [B].
        logits_BM: logits of the candidates, shape [B, M].
        counts_BM: which of them count, shape [B, M]; the own match, where it is among them, must not.

    Returns:
        Shape [B], nats.
    """
    return torch.logaddexp(own_B, logits_BM.masked_fill(~counts_BM, float("-inf")).logsumexp(1))


def hardest_negative_gap(similarity_BB: Tensor, counts_BB: Tensor) -> tuple[Tensor, Tensor]:
    """How far the hardest negative lies above the own match, per direction.

    Args:
        similarity_BB: cosines, image i against caption j, shape [B, B].
        counts_BB: which candidates count, shape [B, B]; the diagonal is ignored.

    Returns:
        Two tensors of shape [B], -2..2 (-inf without any negative): for each image the gap over captions,
        for each caption the gap over images.

    Source:
        d1, d2 of RRSITR (arXiv 2603.28134), with the mask added.
    """
    off = counts_BB & ~torch.eye(len(similarity_BB), dtype=torch.bool, device=similarity_BB.device)
    masked = similarity_BB.masked_fill(~off, float("-inf"))
    own = similarity_BB.diagonal()
    return masked.amax(1) - own, masked.amax(0) - own


def robust_triplet_loss(similarity_BB: Tensor, counts_BB: Tensor, margin: float = 0.6) -> Tensor:
    """Triplet loss on the hardest negatives with a margin that grows with the gap.

    Args:
        similarity_BB: cosines, shape [B, B].
        counts_BB: which candidates count, shape [B, B].
        margin: base margin (sigma), 0..

    Returns:
        Shape [B], 0..; slope in each gap 0 below -margin, 1 up to 0, 1 + margin above.

    Source:
        dynamic soft margin of RRSITR (arXiv 2603.28134).
    """
    gaps = hardest_negative_gap(similarity_BB, counts_BB)
    image, caption = (torch.relu(margin * (1 + torch.relu(gap)) + gap) for gap in gaps)
    return image + caption
