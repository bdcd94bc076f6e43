"""The least value of a smooth function of a few numbers.

torch's own optimisers bring in its compiler with their first step, which takes longer to import than such a function
to minimise.

Source:
    BFGS with a line search by bisection for the weak Wolfe conditions: Lewis and Overton (Mathematical Programming
    2013), from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_FALLS = 1e-4  # of the slope at the start of a line, that the mean slope of a step has at least
_FLATTER = 0.9  # of it, that the slope at its end has at most
_HALVINGS = 50


def minimum(
    cost: Callable[[Tensor], Tensor], start_P: Tensor, *, flat: float = 1e-5, rounds: int = 500
) -> tuple[Tensor, float]:
    """A local minimum by BFGS.

    Args:
        cost: from numbers, shape [P], to a scalar with gradient; not a number or infinite where it must not go.
        start_P: where to begin, float64, shape [P].
        flat: ends where no entry of the gradient is larger, or no step falls any more.
        rounds: at most.

    Returns:
        Where it is, shape [P], and the cost there.

    Example:
        >>> at_P, least = minimum(lambda x: (x - 3).square().sum(), torch.zeros(2, dtype=torch.float64))
        >>> at_P.round(decimals=4).tolist(), least < 1e-8
        ([3.0, 3.0], True)
    """
    at_P = start_P.detach().clone()
    value, gradient_P = _valued(cost, at_P)
    inverse_PP: Tensor | None = None
    for _ in range(rounds):
        if not gradient_P.abs().max() > flat:
            break
        way_P = -gradient_P / gradient_P.norm() if inverse_PP is None else -inverse_PP @ gradient_P
        found = _step(cost, at_P, value, gradient_P, way_P)
        if found is None:
            if inverse_PP is None:
                break
            inverse_PP = None  # rounding has spoilt it
            continue
        step_P, value, new_gradient_P = found
        change_P = new_gradient_P - gradient_P
        at_P, gradient_P = at_P + step_P, new_gradient_P
        along = float(step_P @ change_P)
        if along <= 0:
            continue
        if inverse_PP is None:
            inverse_PP = torch.eye(len(at_P), dtype=at_P.dtype) * (along / float(change_P @ change_P))
        turned_P = inverse_PP @ change_P
        both_PP = torch.outer(step_P, turned_P)
        factor = (1 + float(change_P @ turned_P) / along) / along
        inverse_PP = inverse_PP + factor * torch.outer(step_P, step_P) - (both_PP + both_PP.T) / along
    return at_P, value


def _step(
    cost: Callable[[Tensor], Tensor], at_P: Tensor, value: float, gradient_P: Tensor, way_P: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """A step along a way that falls enough and ends flatter, with cost and gradient at its end; None if none falls."""
    slope = float(gradient_P @ way_P)
    if not slope < 0:
        return None
    short, long, length, best = 0.0, math.inf, 1.0, None
    for _ in range(_HALVINGS):
        step_P = length * way_P
        there, gradient_there_P = _valued(cost, at_P + step_P)
        if not there < value + _FALLS * length * slope:
            long = length
        else:
            best = step_P, there, gradient_there_P
            if float(gradient_there_P @ way_P) >= _FLATTER * slope:
                break
            short = length
        length = (short + long) / 2 if long < math.inf else 2 * short
    return best


def _valued(cost: Callable[[Tensor], Tensor], at_P: Tensor) -> tuple[float, Tensor]:
    here_P = at_P.detach().requires_grad_()
    value = cost(here_P)
    (gradient_P,) = torch.autograd.grad(value, here_P)
    return value.item(), gradient_P
