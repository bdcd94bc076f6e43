"""Optimiser steps: AdamW on a one-cycle schedule.

torch's own objects for this bring in its compiler, which takes longer to import than small sets to train on; its
function for a step does not. The numbers are those of `torch.optim.AdamW` under `OneCycleLR`.

Source:
    Loshchilov and Hutter, Decoupled Weight Decay Regularization (ICLR 2019); Smith and Topin, Super-Convergence (2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nc_audit.errors import TrainingError

START = 1 / 25  # of the peak learning rate
END = START / 1e4
BETA = 0.95  # of the first moment at the start and the end,
BETA_AT_PEAK = 0.85  # and at the peak
BETA_SQUARE = 0.999
EPS = 1e-8


def one_cycle(step: int, total: int, warm_up: float, peak: float) -> tuple[float, float]:
    """Learning rate and the first moment's beta at a step: up to the peak by half a cosine, then down by another.

    Args:
        step: 0..total - 1.
        total: number of steps, at least 2.
        warm_up: share of them on the way up, 0..1.
        peak: learning rate there.
    """
    top, last = warm_up * total - 1, total - 1
    if top > 0 and step <= top:
        lr, beta, share = (START * peak, peak), (BETA, BETA_AT_PEAK), step / top
    else:
        lr, beta, share = (peak, END * peak), (BETA_AT_PEAK, BETA), (step - top) / (last - top)
    return _eased(*lr, share), _eased(*beta, share)


def _eased(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


class Steps:
    """Steps of AdamW on a one-cycle schedule.

    Args:
        matrices: parameters whose weights decay.
        others: parameters whose weights do not.
        total: how many steps.
        lr: learning rate at the peak.
        warm_up: share of the steps on the way there, 0..1.
        weight_decay: of the matrices.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        total: int,
        lr: float,
        warm_up: float,
        weight_decay: float,
    ) -> None:
        self.groups = [
            (_Moments(matrices), weight_decay),
            (_Moments(others), 0.0),
        ]
        self.total, self.peak, self.warm_up = total, lr, warm_up
        self.taken = 0

    def take(self, loss: Tensor) -> None:
        """One step down a loss, a scalar with gradient.

        Raises:
            TrainingError: it is not finite.
        """
        lr, beta = one_cycle(self.taken, self.total + 1, self.warm_up, self.peak)
        if not torch.isfinite(loss):
            raise TrainingError(f"loss is {loss.item()} at step {self.taken} (lr {lr:.2g})", "lower train.lr")
        for moments, _ in self.groups:
            for parameter in moments.parameters:
                parameter.grad = None
        loss.backward()
        for moments, weight_decay in self.groups:
            moments.follow(lr, beta, weight_decay)
        self.taken += 1


class _Moments:
    """Parameters, and the running moments of their gradients."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.first = [torch.zeros_like(one) for one in self.parameters]
        self.second = [torch.zeros_like(one) for one in self.parameters]
        self.taken = [torch.zeros((), device=one.device) for one in self.parameters]

    @torch.no_grad()
    def follow(self, lr: float, beta: float, weight_decay: float) -> None:
        """Move the parameters that have a gradient."""
        moved = [
            (parameter, parameter.grad, *of_it)
            for parameter, *of_it in zip(self.parameters, self.first, self.second, self.taken, strict=True)
            if parameter.grad is not None
        ]
        if not moved:
            return
        parameters, gradients, first, second, taken = map(list, zip(*moved, strict=True))
        adamw(
            parameters,
            gradients,
            first,
            second,
            [],
            taken,
            fused=True,
            amsgrad=False,
            beta1=beta,
            beta2=BETA_SQUARE,
            lr=lr,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
        )
