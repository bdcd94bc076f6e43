"""Confident learning: which given classes a classifier, asked out of sample, cannot believe; and classes for captions.

Shapes: N = pairs; K = classes; V = vectors; D = dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nc_audit.errors import ShapeError

# --- classes


def cluster(vectors_VD: Tensor, num: int, generator: torch.Generator, max_rounds: int = 50) -> Tensor:
    """Classes of vectors by k-means: far-apart starts, then rounds of assignment and means until nothing moves.

    Args:
        vectors_VD: shape [V, D].
        num: how many clusters at most; fewer where fewer vectors differ.
        generator: draws the starts.
        max_rounds: bound on the rounds.

    Returns:
        Shape [V], 0..; every number up to the largest occurs.

    Source:
        Lloyd's rounds from k-means++ starts, in single precision and one fixed order of summation, so that a seed
        settles the result.

    Example:
        >>> cluster(torch.tensor([[0.0], [9.0], [0.1], [9.1]]), 2, torch.Generator().manual_seed(0)).diff().abs()
        tensor([1, 1, 1])
    """
    size_V = vectors_VD.square().sum(1)
    start = int(torch.randint(len(vectors_VD), (1,), generator=generator))
    starts = [start]
    gap_V = _squared_gaps(vectors_VD, size_V, vectors_VD[starts]).squeeze(1)
    while len(starts) < num and bool((gap_V > _SAME * size_V.max()).any()):
        chances = gap_V.double().cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * chances[-1]
        starts.append(int(torch.searchsorted(chances, drawn, right=True).clamp_max(len(gap_V) - 1)))
        gap_V = torch.minimum(gap_V, _squared_gaps(vectors_VD, size_V, vectors_VD[starts[-1:]]).squeeze(1))
    centre_KD = vectors_VD[starts]
    class_V = torch.full((len(vectors_VD),), -1)
    for _ in range(max_rounds):
        moved_V = torch.cat(
            [
                _squared_gaps(part, size, centre_KD).argmin(1)
                for part, size in zip(vectors_VD.split(65_536), size_V.split(65_536), strict=True)
            ]
        )
        if torch.equal(moved_V, class_V):
            break
        class_V = moved_V
        count_K = torch.bincount(class_V, minlength=len(centre_KD))
        sum_KD = torch.zeros_like(centre_KD).index_add_(0, class_V, vectors_VD)
        centre_KD = torch.where(
            count_K[:, None] > 0, sum_KD / count_K.clamp_min(1)[:, None].to(sum_KD.dtype), centre_KD
        )
    return class_V.unique(return_inverse=True)[1]


_SAME = 1e-6  # of the largest squared length; what lies nearer is one vector up to rounding


def _squared_gaps(vectors_VD: Tensor, size_V: Tensor, centre_KD: Tensor) -> Tensor:
    cross_VK = vectors_VD @ centre_KD.T
    return (size_V[:, None] - 2 * cross_VK + centre_KD.square().sum(1)).clamp_min(0.0)


# --- classifier


def fit_softmax(
    vectors_VD: Tensor, counts_VK: Tensor, penalty: float = 1.0, max_rounds: int = 100
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression where a vector may have been seen with several classes.

    Minimises the cross-entropy summed over everything counted, plus half the penalty times the squared weights.

    Args:
        vectors_VD: shape [V, D].
        counts_VK: how often each vector was seen with each class, shape [V, K], 0..
        penalty: of the squared weights, 0..; the intercepts are free.
        max_rounds: bound on the rounds of L-BFGS.

    Returns:
        Weights of shape [D, K] and intercepts of shape [K].

    Raises:
        ShapeError: the counts are not those of the vectors.
    """
    if counts_VK.dim() != 2 or len(counts_VK) != len(vectors_VD):
        raise ShapeError("counts", f"{len(vectors_VD)}, K", counts_VK.shape)
    num_D, num_K = vectors_VD.shape[1], counts_VK.shape[1]
    total = counts_VK.sum().clamp_min(1.0)
    # Weights in units in which a heavy penalty curves no more than the rest: L-BFGS stops early where it does.
    unit = float(1 + penalty / total) ** -0.5
    scaled_DK = vectors_VD.new_zeros((num_D, num_K), requires_grad=True)
    intercept_K = vectors_VD.new_zeros(num_K, requires_grad=True)
    solver = torch.optim.LBFGS(
        [scaled_DK, intercept_K],
        max_iter=max_rounds,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        weight_DK = unit * scaled_DK
        log_share_VK = functional.log_softmax(vectors_VD @ weight_DK + intercept_K, dim=1)
        loss = -(counts_VK * log_share_VK).sum() + penalty / 2 * weight_DK.square().sum()
        loss = loss / total
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return unit * scaled_DK.detach(), intercept_K.detach()


# --- confident learning


def self_confidence(probability_NK: Tensor, class_N: Tensor) -> Tensor:
    """Out-of-sample probability of each pair's given class.

    Args:
        probability_NK: out-of-sample class probabilities, shape [N, K], 0..1.
        class_N: given class, shape [N], 0..K-1.

    Returns:
        Shape [N], 0..1; higher = cleaner.

    Raises:
        ShapeError: the classes are not those of the probabilities.

    Source:
        confident learning (Northcutt and others, 2021).
    """
    if probability_NK.dim() != 2 or class_N.shape != probability_NK.shape[:1]:
        raise ShapeError("probabilities", f"{len(class_N)}, K", probability_NK.shape)
    return probability_NK.gather(1, class_N[:, None]).squeeze(1)


def class_thresholds(probability_NK: Tensor, class_N: Tensor) -> Tensor:
    """What probability of a class counts as confident: the mean self-confidence of those given the class.

    Args:
        probability_NK: out-of-sample class probabilities, shape [N, K], 0..1.
        class_N: given class, shape [N], 0..K-1.

    Returns:
        Shape [K], 0..1; infinite for a class that nobody was given.

    Source:
        confident learning (Northcutt and others, 2021).

    Example:
        >>> class_thresholds(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]))
        tensor([0.5000,    inf])
    """
    own_N = self_confidence(probability_NK, class_N)
    num = probability_NK.shape[1]
    count_K = torch.bincount(class_N, minlength=num)
    total_K = own_N.new_zeros(num).index_add_(0, class_N, own_N)
    return torch.where(count_K > 0, total_K / count_K.clamp_min(1), torch.inf)


_ROUNDING = 1e-6


def confident_joint(probability_NK: Tensor, class_N: Tensor) -> Tensor:
    """How many pairs of each given class are confidently of each class.

    A pair counts where some class reaches its threshold: for that class, or with several for the most probable of
    all. Pairs without any are left out.

    Args:
        probability_NK: out-of-sample class probabilities, shape [N, K], 0..1.
        class_N: given class, shape [N], 0..K-1.

    Returns:
        Shape [K, K], whole numbers; rows = given, columns = believed. Every class keeps at least one pair that is
        rightly given.

    Source:
        confident learning (Northcutt and others, 2021), as its package `cleanlab` counts.

    Example:
        >>> confident_joint(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]), torch.tensor([0, 1, 1]))
        tensor([[1, 0],
                [0, 1]])
    """
    num = probability_NK.shape[1]
    reached_NK = probability_NK >= class_thresholds(probability_NK, class_N) - _ROUNDING
    how_many_N = reached_NK.sum(1)
    believed_N = torch.where(how_many_N > 1, probability_NK.argmax(1), reached_NK.int().argmax(1))
    counted = how_many_N > 0
    cells = class_N[counted] * num + believed_N[counted]
    joint_KK = torch.bincount(cells, minlength=num * num).view(num, num)
    joint_KK.diagonal().clamp_(min=1)
    return joint_KK


def calibrated_joint(joint_KK: Tensor, class_N: Tensor) -> Tensor:
    """A confident joint whose rows sum to how often each class was given, and which sums to the number of pairs.

    Args:
        joint_KK: the confident joint, shape [K, K], 0..; no row is empty.
        class_N: given class, shape [N], 0..K-1.

    Returns:
        Shape [K, K], whole numbers, rows = given; each row is rounded by largest remainders, so its sum stays.

    Source:
        confident learning (Northcutt and others, 2021), as its package `cleanlab` calibrates.

    Example:
        >>> calibrated_joint(torch.tensor([[3, 1], [0, 1]]), torch.tensor([0] * 8 + [1] * 2))
        tensor([[6, 2],
                [0, 2]])
    """
    if joint_KK.dim() != 2 or joint_KK.shape[0] != joint_KK.shape[1]:
        raise ShapeError("the confident joint", "K, K", joint_KK.shape)
    given_K = torch.bincount(class_N, minlength=len(joint_KK))
    exact_KK = joint_KK.double() / joint_KK.sum(1, keepdim=True) * given_K[:, None]
    whole_KK = (exact_KK + _ROUNDING).floor()
    missing_K = (given_K - whole_KK.sum(1)).long()
    order_KK = (whole_KK - exact_KK).argsort(dim=1, stable=True)
    place_KK = torch.empty_like(order_KK)
    place_KK.scatter_(1, order_KK, torch.arange(len(joint_KK)).expand_as(order_KK))
    return whole_KK.long() + (place_KK < missing_K[:, None])


def prune_by_noise_rate(probability_NK: Tensor, class_N: Tensor, joint_KK: Tensor) -> Tensor:
    """Which pairs to prune: of each given class as many as the joint says are of each other class.

    For every pair of classes the given ones with the largest lead of the other class over their own go; those whose
    lead equals the last one's go with it. A pair whose most probable class is the given one stays.

    Args:
        probability_NK: out-of-sample class probabilities, shape [N, K], 0..1.
        class_N: given class, shape [N], 0..K-1.
        joint_KK: calibrated joint, whole numbers, shape [K, K], rows = given.

    Returns:
        Shape [N], bool; True = noisy.

    Source:
        confident learning (Northcutt and others, 2021), as its package `cleanlab` prunes.
    """
    own_N = self_confidence(probability_NK, class_N)
    flag_N = torch.zeros(len(class_N), dtype=torch.bool)
    for given, believed in joint_KK.nonzero().tolist():
        if given == believed:
            continue
        at = (class_N == given).nonzero().squeeze(1)
        num = min(int(joint_KK[given, believed]), len(at))
        if num:
            lead = probability_NK[at, believed] - own_N[at]
            flag_N[at[lead >= lead.topk(num).values[-1]]] = True
    return flag_N & (probability_NK.argmax(1) != class_N)
