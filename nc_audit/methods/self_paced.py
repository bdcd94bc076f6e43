"""Self-paced weights: easy pairs first, each pair's weight moving with its loss.

Losses are relative: loss / ln M, so that 1 is chance and thresholds hold at any number of candidates. RRSITR's
constants at batch 100 with four cross-entropies (chance 4 ln 100 = 18.42) are 5 and 18: fractions .271 and .977.

Shapes: B = pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLEAN, AMBIGUOUS, NOISY = 0, 1, 2


def pace_weight(relative_loss_B: Tensor, threshold: float) -> Tensor:
    """Weight that minimises w * l + R(w) for RRSITR's regulariser: cos(pi l / 2 g) below g, 0 from there.

    Args:
        relative_loss_B: loss / chance, shape [B], 0..
        threshold: g, in the same unit, above 0.

    Returns:
        Shape [B], 0..1, non-increasing in the loss.

    Source:
        RRSITR (arXiv 2603.28134), multi-modal self-paced weight.

    Example:
        >>> pace_weight(torch.tensor([0.0, 0.5, 1.0, 2.0]), 1.0)
        tensor([1.0000, 0.7071, 0.0000, 0.0000])
    """
    share = (relative_loss_B / threshold).clamp(0.0, 1.0)
    return torch.where(share < 1.0, torch.cos(share * (math.pi / 2)), torch.zeros_like(share))


def pace_regulariser(weight_B: Tensor, threshold: float) -> Tensor:
    """The regulariser whose optimum `pace_weight` is: -(2 g / pi) (w arccos w - sqrt(1 - w^2)).

    Args:
        weight_B: shape [B], 0..1.
        threshold: g, above 0.

    Returns:
        Shape [B]; at the optimum w * l + R = (2 g / pi) sin(pi l / 2 g).

    Source:
        RRSITR (arXiv 2603.28134).
    """
    w = weight_B.clamp(0.0, 1.0)
    return -(2 * threshold / math.pi) * (w * torch.arccos(w) - torch.sqrt(1 - w * w))


def divide(relative_loss_B: Tensor, clean_at: float, noisy_at: float) -> Tensor:
    """The three-way division by loss: clean below `clean_at`, noisy from `noisy_at`, ambiguous between.

    Args:
        relative_loss_B: loss / chance, shape [B].
        clean_at: gamma_1 as a fraction of chance.
        noisy_at: gamma_2 as a fraction of chance, above `clean_at`.

    Returns:
        Shape [B], int8: 0 clean, 1 ambiguous, 2 noisy.

    Example:
        >>> divide(torch.tensor([0.1, 0.5, 1.0]), 0.27, 0.98)
        tensor([0, 1, 2], dtype=torch.int8)
    """
    return ((relative_loss_B >= clean_at).to(torch.int8) + (relative_loss_B >= noisy_at).to(torch.int8)).to(
        torch.int8
    )


def divided_weight(
    relative_loss_B: Tensor, clean_at: float, noisy_at: float, ambiguous_factor: float = 0.8
) -> Tensor:
    """RRSITR's weight over the whole axis: each region has its own cosine, the ambiguous one times a factor.

    It is not monotone: it falls to 0 below `clean_at` and restarts near `ambiguous_factor` x .9 above it. That
    is the published behaviour, pinned by a test; `pace_weight` with `noisy_at` is the monotone alternative.

    Args:
        relative_loss_B: loss / chance, shape [B].
        clean_at: gamma_1 as a fraction of chance.
        noisy_at: gamma_2 as a fraction of chance.
        ambiguous_factor: lambda_1, 0..1.

    Returns:
        Shape [B], 0..1.

    Source:
        RRSITR (arXiv 2603.28134), the authors' published form.
    """
    division = divide(relative_loss_B, clean_at, noisy_at)
    clean = pace_weight(relative_loss_B, clean_at)
    ambiguous = ambiguous_factor * pace_weight(relative_loss_B, noisy_at)
    return torch.where(division == CLEAN, clean, torch.where(division == AMBIGUOUS, ambiguous, 0.0))
