"""How certain a pair's match is: energy and entropies of its logits over the candidates.

Shapes: B = pairs; M = candidates, own match included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nc_audit.errors import ShapeError


def energy(logits_BM: Tensor) -> Tensor:
    """Energy uncertainty of one direction, per pair: -logsumexp of its logits.

    Args:
        logits_BM: similarity times logit scale, shape [B, M]; -inf leaves a candidate out.

    Returns:
        Shape [B], nats, unbounded; higher = less certain. Adding c to all logits lowers it by c; repeating
        every candidate lowers it by ln 2.

    Source:
        free energy (Liu et al. 2020), as in SREM (AAAI 2024); the form is remembered, not read.

    Example:
        >>> energy(torch.zeros(1, 4))
        tensor([-1.3863])
    """
    if logits_BM.dim() != 2:
        raise ShapeError("logits", "B, M", logits_BM.shape)
    return -logits_BM.logsumexp(1)


def match_entropy(logits_BM: Tensor) -> Tensor:
    """Normalised entropy of one direction of matching, per pair.

    With p the softmax of a pair's logits over its M candidates, returns H(p) / ln M.

    Args:
        logits_BM: logits of each pair's image against candidate captions (or caption against images), shape
            [B, M]; -inf leaves a candidate out, and M then counts the rest.

    Returns:
        Shape [B], 0..1: 0 = one candidate takes all, 1 = a uniform guess.

    Raises:
        ShapeError: if the input is not two-dimensional or M < 2.

    Source:
        classification entropy of SREM (AAAI 2024, reconstructed); the swap is in `swapped_entropy`.

    Example:
        >>> match_entropy(torch.zeros(2, 4))
        tensor([1., 1.])
    """
    if logits_BM.dim() != 2 or logits_BM.shape[1] < 2:
        raise ShapeError("logits", "B, M >= 2", logits_BM.shape)
    counts_BM = torch.isfinite(logits_BM)
    log_p = logits_BM.log_softmax(1).masked_fill(~counts_BM, 0.0)
    entropy = -(log_p.exp() * log_p * counts_BM).sum(1)
    return (entropy / counts_BM.sum(1).clamp_min(2).log()).clamp(0.0, 1.0)


def swapped_entropy(image_entropy_B: Tensor, caption_entropy_B: Tensor) -> tuple[Tensor, Tensor]:
    """Per direction, the other direction's entropy: a witness that does not overfit along with it.

    Args:
        image_entropy_B: `match_entropy` of images over captions, shape [B].
        caption_entropy_B: `match_entropy` of captions over images, shape [B].

    Returns:
        Two tensors of shape [B], 0..1: for the image direction the captions' entropy, and the reverse.

    Source:
        SREM (AAAI 2024), reconstructed from the abstract.
    """
    return caption_entropy_B, image_entropy_B


def chance_loss(num_candidates: int) -> float:
    """Loss of a uniform guess over M candidates: ln M, nats.

    Example:
        >>> round(chance_loss(100), 3)
        4.605
    """
    return math.log(num_candidates)
