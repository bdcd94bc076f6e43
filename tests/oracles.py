"""Slow float64 references for everything in `nc_audit.methods`: plain loops written from the formulas.

They share no code with the package and take numpy arrays or nested lists; speed is of no concern here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def log_sum_exp(values: Iterable[float]) -> float:
    kept = [float(v) for v in values if v != -math.inf]
    if not kept:
        return -math.inf
    top = max(kept)
    return top + math.log(sum(math.exp(v - top) for v in kept))


# --- contrastive


def negatives_mask(image: Sequence[int], caption: Sequence[int]) -> np.ndarray:
    num = len(image)
    mask = np.zeros((num, num), bool)
    for i in range(num):
        for j in range(num):
            mask[i, j] = i == j or (image[i] != image[j] and caption[i] != caption[j])
    return mask


def in_batch_loss(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    num = len(logits)
    loss = np.zeros(num)
    for i in range(num):
        over_captions = log_sum_exp(logits[i, j] for j in range(num) if counts[i, j])
        over_images = log_sum_exp(logits[j, i] for j in range(num) if counts[j, i])
        loss[i] = ((over_captions - logits[i, i]) + (over_images - logits[i, i])) / 2
    return loss


def candidate_logsumexp(own: np.ndarray, logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.array(
        [
            log_sum_exp([own[i], *(logits[i, j] for j in range(logits.shape[1]) if counts[i, j])])
            for i in range(len(own))
        ]
    )


def hardest_negative_gap(similarity: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num = len(similarity)
    image, caption = np.full(num, -np.inf), np.full(num, -np.inf)
    for i in range(num):
        for j in range(num):
            if j == i:
                continue
            if counts[i, j]:
                image[i] = max(image[i], similarity[i, j] - similarity[i, i])
            if counts[j, i]:
                caption[i] = max(caption[i], similarity[j, i] - similarity[i, i])
    return image, caption


def robust_triplet_loss(similarity: np.ndarray, counts: np.ndarray, sigma: float) -> np.ndarray:
    total = np.zeros(len(similarity))
    for gaps in hardest_negative_gap(similarity, counts):
        for i, gap in enumerate(gaps):
            soft_margin = sigma * (1 + max(0.0, gap))
            total[i] += max(0.0, soft_margin + gap)
    return total


# --- uncertainty


def energy(logits: np.ndarray) -> np.ndarray:
    return np.array([-log_sum_exp(row) for row in logits])


def match_entropy(logits: np.ndarray) -> np.ndarray:
    result = []
    for row in logits:
        kept = [v for v in row if v != -math.inf]
        result.append(entropy_nats(kept) / math.log(max(2, len(kept))))
    return np.array(result)


def entropy_nats(logits: Sequence[float]) -> float:
    top = log_sum_exp(logits)
    return -sum(math.exp(v - top) * (v - top) for v in logits)


# --- self-paced


def pace_regulariser(weight: float, threshold: float) -> float:
    return -(2 * threshold / math.pi) * (weight * math.acos(weight) - math.sqrt(1 - weight**2))


def pace_weight_on_grid(loss: float, threshold: float, points: int = 20_001) -> float:
    """Argmin of w l + R(w) over an even grid on [0, 1]."""
    grid = np.linspace(0.0, 1.0, points)
    objective = grid * loss - (2 * threshold / math.pi) * (grid * np.arccos(grid) - np.sqrt(1 - grid**2))
    return float(grid[objective.argmin()])


def divided_weight(loss: float, clean_at: float, noisy_at: float, factor: float) -> float:
    if loss < clean_at:
        return math.cos(math.pi * loss / (2 * clean_at))
    if loss < noisy_at:
        return factor * math.cos(math.pi * loss / (2 * noisy_at))
    return 0.0


# --- mutual information


def shrunk(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    size = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / size * np.eye(size)


def weighted_covariance(vectors: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = weight / weight.sum()
    mean = sum((s * v for s, v in zip(share, vectors, strict=True)), np.zeros(vectors.shape[1]))
    covariance = np.zeros((vectors.shape[1],) * 2)
    for s, v in zip(share, vectors, strict=True):
        covariance += s * np.outer(v - mean, v - mean)
    return mean, covariance


def mi_variation(
    image: np.ndarray,
    caption: np.ndarray,
    weight: np.ndarray,
    shrinkage: float,
    new_image: np.ndarray,
    new_caption: np.ndarray,
) -> np.ndarray:
    """First-order change of the Gaussian mutual information: (q_v + q_t - q_z) / 2."""
    result = np.zeros(len(new_image))
    parts = [
        (image, new_image, 1.0),
        (caption, new_caption, 1.0),
        (np.hstack([image, caption]), np.hstack([new_image, new_caption]), -1.0),
    ]
    for known, new, sign in parts:
        mean, covariance = weighted_covariance(known, weight)
        inverse = np.linalg.inv(shrunk(covariance, shrinkage))
        for i, vector in enumerate(new):
            result[i] += sign * (vector - mean) @ inverse @ (vector - mean) / 2
    return result


def mutual_information(image: np.ndarray, caption: np.ndarray) -> float:
    """Gaussian mutual information of paired rows: half the log of det Sv det St / det S, nats."""

    def log_det(vectors: np.ndarray) -> float:
        return float(np.linalg.slogdet(np.cov(vectors.T, bias=True))[1])

    return (log_det(image) + log_det(caption) - log_det(np.hstack([image, caption]))) / 2


# --- neighbours


def neighbour_distance(
    query: np.ndarray,
    other: np.ndarray,
    reference_query: np.ndarray,
    reference_other: np.ndarray,
    trust: np.ndarray,
    excluded: np.ndarray,
    num_neighbours: int,
    sharpness: float,
) -> np.ndarray:
    result = []
    for i in range(len(query)):
        allowed = [r for r in range(len(trust)) if not excluded[i, r]]
        allowed.sort(key=lambda r: -float(query[i] @ reference_query[r]))
        above = below = 0.0
        for r in allowed[:num_neighbours]:
            vote = math.exp(sharpness * float(query[i] @ reference_query[r])) * trust[r]
            above += vote * (1 - float(other[i] @ reference_other[r]))
            below += vote
        result.append(above / below if below > 0 else 1.0)
    return np.array(result)


# --- known swaps


def noise_rate(score: Sequence[float], swaps: Sequence[float]) -> float:
    """Mean over the tails .25 to .50 of P(s > t) / P(s0 > t), t the nearest-rank quantile of the swaps."""
    ordered = sorted(swaps)
    ratios = []
    for q in (0.25, 0.30, 0.35, 0.40, 0.45, 0.50):
        t = ordered[round((1 - q) * (len(ordered) - 1))]
        given_share = sum(s > t for s in score) / len(score)
        swap_share = sum(s > t for s in swaps) / len(swaps)
        ratios.append(given_share / max(swap_share, 1 / len(swaps)))
    return min(1.0, sum(ratios) / len(ratios))


def swaps_auroc(score: Sequence[float], swaps: Sequence[float]) -> float:
    wins = sum((s0 > s) + 0.5 * (s0 == s) for s0 in swaps for s in score)
    return wins / (len(score) * len(swaps))


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The max-min formula: at k, the largest over a <= k of the smallest over b >= k mean of a..b."""

    def mean(a: int, b: int) -> float:
        w = weights[a : b + 1]
        return sum(v * x for v, x in zip(values[a : b + 1], w, strict=True)) / sum(w)

    num = len(values)
    return [max(min(mean(a, b) for b in range(k, num)) for a in range(k + 1)) for k in range(num)]


def noise_posterior(
    score: Sequence[float], swaps: Sequence[float], rate: float, num_bins: int, swaps_right: float = 0.0
) -> tuple[list[float], list[float]]:
    """rate * (density of swaps / density of given pairs), by isotonic regression over bins of equal count.

    Where some swaps are right, the densities w of wrong swaps and c of clean pairs, both over that of the given pairs,
    solve w (1 - e) + c e = ratio and w r + c (1 - r) = 1.
    """
    pooled = [*score, *swaps]
    num = len(pooled)
    num_bins = max(1, min(num_bins, num // 4))
    ranked = sorted(range(num), key=lambda i: pooled[i])
    bin_of: dict[int, int] = {}
    bin_of_value: dict[float, int] = {}
    for position, i in enumerate(ranked):
        bin_of[i] = bin_of_value.setdefault(pooled[i], position * num_bins // num)
    used = sorted(set(bin_of.values()))
    size = {b: sum(x == b for x in bin_of.values()) for b in used}
    is_swap = {b: sum(bin_of[i] == b for i in range(len(score), num)) for b in used}
    fitted = dict(
        zip(used, isotonic([is_swap[b] / size[b] for b in used], [size[b] for b in used]), strict=True)
    )
    result = []
    for i in range(num):
        h = min(fitted[bin_of[i]], 1 - 1e-9)
        ratio = h / (1 - h) * len(score) / len(swaps)
        e = min(swaps_right, (1 - rate) / 2)
        determinant = (1 - e) * (1 - rate) - e * rate
        wrong = ratio if e == 0 else (ratio * (1 - rate) - e) / determinant
        result.append(min(1.0, max(0.0, rate * wrong)))
    return result[: len(score)], result[len(score) :]


def intra_image_correlation(value: Sequence[float], image: Sequence[int]) -> float:
    """ICC(1) of a one-way analysis of variance over the images that have two pairs or more."""
    groups: dict[int, list[float]] = {}
    for v, i in zip(value, image, strict=True):
        groups.setdefault(i, []).append(float(v))
    kept = [g for g in groups.values() if len(g) > 1]
    count, num = sum(len(g) for g in kept), len(kept)
    if num < 2 or count == num:
        return 0.0
    grand = sum(sum(g) for g in kept) / count
    between = sum(len(g) * (sum(g) / len(g) - grand) ** 2 for g in kept) / (num - 1)
    within = sum((v - sum(g) / len(g)) ** 2 for g in kept for v in g) / (count - num)
    typical = (count - sum(len(g) ** 2 for g in kept) / count) / (num - 1)
    below = between + (typical - 1) * within
    return (between - within) / below if below > 0 else 0.0


# --- matching


def match(
    image: np.ndarray,
    caption: np.ndarray,
    scale: float,
    given: set[tuple[int, int]],
    candidate_captions: Sequence[int],
    candidate_images: Sequence[int],
    asked: Sequence[tuple[int, int]],
) -> dict[str, np.ndarray]:
    """Every asked (image, caption) against the candidates, one set of logits per pair and direction.

    A candidate counts when it is the own match or no given match of the query; the own match is added when it is
    no candidate.
    """
    columns: dict[str, list[Any]] = {k: [] for k in ("similarity", "loss", "energy", "image", "caption")}
    for i, c in asked:
        own = float(image[i] @ caption[c])
        over_captions = [
            scale * float(image[i] @ caption[k]) for k in candidate_captions if k != c and (i, k) not in given
        ]
        over_images = [
            scale * float(image[k] @ caption[c]) for k in candidate_images if k != i and (k, c) not in given
        ]
        over_captions.append(scale * own)
        over_images.append(scale * own)
        normaliser = (log_sum_exp(over_captions) + log_sum_exp(over_images)) / 2
        columns["similarity"].append(own)
        columns["loss"].append(normaliser - scale * own)
        columns["energy"].append(-normaliser)
        columns["image"].append(
            min(1.0, entropy_nats(over_captions) / math.log(max(2, len(candidate_captions))))
        )
        columns["caption"].append(
            min(1.0, entropy_nats(over_images) / math.log(max(2, len(candidate_images))))
        )
    return {name: np.array(values) for name, values in columns.items()}


# --- projections


def principal_components(vectors: np.ndarray, num: int, whitening: float) -> np.ndarray:
    """Scores on the leading axes by singular values of the centred rows, largest entry of each axis positive."""
    centred = vectors - vectors.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    deviation = singular / math.sqrt(len(vectors))
    columns = []
    for k in range(num):
        axis = axes[k] * np.sign(axes[k][np.abs(axes[k]).argmax()])
        wanted = (deviation[k] / deviation[0]) ** (1 - whitening)
        columns.append(centred @ axis * wanted / deviation[k])
    return np.stack(columns, 1)
