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


def relative_energy(energy_B: Tensor, num_candidates_B: Tensor) -> Tensor:
    """Energy that does not depend on how many candidates there were: minus the log of their mean weight.

    Args:
        energy_B: `energy`, shape [B].
        num_candidates_B: candidates that counted, shape [B] or [1], 1..

    Returns:
        Shape [B], nats, unbounded; higher = less certain. Repeating every candidate changes nothing.

    Example:
        >>> relative_energy(energy(torch.zeros(1, 4)), torch.tensor([4]))
        tensor([0.])
    """
    return energy_B + num_candidates_B.to(energy_B.dtype).log()


def energy_separation(energy_B: Tensor, is_clean_B: Tensor, clean_below: float, noisy_above: float) -> Tensor:
    """Squared hinge that pulls the energy of clean pairs below one bound and lifts that of others above another.

    Args:
        energy_B: energy uncertainty, shape [B].
        is_clean_B: which pairs are thought clean, bool, shape [B].
        clean_below: m_c, the bound for clean pairs, nats.
        noisy_above: m_n, the bound for the others, above m_c.

    Returns:
        Shape [B], nats squared, 0..; [U - m_c]_+^2 for clean pairs, [m_n - U]_+^2 for the others.

    Source:
        the standard form for energies (Liu et al. 2020), as SREM (AAAI 2024) is remembered to use it.

    Example:
        >>> energy_separation(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.5, 3.0)
        tensor([0.2500, 4.0000])
    """
    excess_B = torch.where(is_clean_B, energy_B - clean_below, noisy_above - energy_B)
    return torch.relu(excess_B).square()


def chance_loss(num_candidates: int) -> float:
    """Loss of a uniform guess over M candidates: ln M, nats.

    Example:
        >>> round(chance_loss(100), 3)
        4.605
    """
    return math.log(num_candidates)
