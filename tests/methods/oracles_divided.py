"""Slow float64 references for the mixture, the hinge losses and the complementary losses: loops from the formulas."""

from __future__ import annotations

import math

import numpy as np


def _best_split(values: np.ndarray) -> list[int]:
    """0 or 1 per value: the split of the ordered values with the least squared distance to two means."""
    ordered = sorted(range(len(values)), key=lambda i: values[i])
    best, members = math.inf, [0] * len(values)
    for cut in range(1, len(values)):
        low, high = [values[i] for i in ordered[:cut]], [values[i] for i in ordered[cut:]]
        spread = sum((v - np.mean(low)) ** 2 for v in low) + sum((v - np.mean(high)) ** 2 for v in high)
        if spread < best - 1e-12:
            best, members = spread, [int(ordered.index(i) >= cut) for i in range(len(values))]
    return members


def low_posterior(values: np.ndarray, rounds: int = 10, tolerance: float = 1e-2) -> np.ndarray:
    """Posterior of the lower-mean component of two normals by expectation maximisation."""
    x = [(v - min(values)) / (max(values) - min(values)) for v in map(float, values)]
    num = len(x)
    share = [[1.0 - m, float(m)] for m in _best_split(np.array(x))]

    def maximise() -> list[tuple[float, float, float]]:
        parts = []
        for k in range(2):
            size = sum(s[k] for s in share)
            mean = sum(s[k] * v for s, v in zip(share, x, strict=True)) / size
            variance = sum(s[k] * (v - mean) ** 2 for s, v in zip(share, x, strict=True)) / size + 5e-4
            parts.append((mean, variance, size / num))
        return parts

    def density(v: float, part: tuple[float, float, float]) -> float:
        mean, variance, weight = part
        return weight * math.exp(-((v - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    parts, bound = maximise(), -math.inf
    for _ in range(rounds):
        joint = [[density(v, part) for part in parts] for v in x]
        share = [[j / sum(js) for j in js] for js in joint]
        parts, before = maximise(), bound
        bound = sum(math.log(sum(js)) for js in joint) / num
        if abs(bound - before) < tolerance:
            break
    low = 0 if parts[0][0] <= parts[1][0] else 1
    joint = [[density(v, part) for part in parts] for v in x]
    return np.array([js[low] / sum(js) for js in joint])


def hinge_loss(similarity: np.ndarray, counts: np.ndarray, margin: float) -> np.ndarray:
    num = len(similarity)
    loss = np.zeros(num)
    for i in range(num):
        for j in range(num):
            if j != i and counts[i, j]:
                loss[i] += max(0.0, margin + similarity[i, j] - similarity[i, i]) / num
                loss[i] += max(0.0, margin + similarity[j, i] - similarity[i, i]) / num
    return loss


def margin_prediction(loss: np.ndarray, margin: float, top_share: float) -> np.ndarray:
    left = [min(max(margin - value / 2, 0.0), margin) for value in loss]
    top = np.mean(sorted(left, reverse=True)[: max(1, int(top_share * len(left)))])
    return np.array([min(1.0, value / top) if top > 0 else 0.0 for value in left])


def soft_margin_loss(similarity: np.ndarray, counts: np.ndarray, margin: np.ndarray) -> np.ndarray:
    num = len(similarity)
    loss = np.zeros(num)
    for i in range(num):
        rivals = [j for j in range(num) if j != i and counts[i, j]]
        if rivals:
            own = margin[i] - similarity[i, i]
            loss[i] += max(0.0, own + max(similarity[i, j] for j in rivals))
            loss[i] += max(0.0, own + max(similarity[j, i] for j in rivals))
    return loss


def _probability(logits: np.ndarray, counts: np.ndarray, i: int) -> list[float]:
    weights = [math.exp(logits[i, j]) if counts[i, j] else 0.0 for j in range(len(logits))]
    return [weight / sum(weights) for weight in weights]


def complementary_loss(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    num = len(logits)
    loss = np.zeros(num)
    for i in range(num):
        p = _probability(logits, counts, i)
        for j in range(num):
            if j != i and counts[i, j]:
                loss[i] -= math.log(sum(p[k] for k in range(num) if k != j))
    return loss


def complement_transition(similarity: np.ndarray, counts: np.ndarray, temperature: float) -> np.ndarray:
    num = len(similarity)
    transition = np.zeros((num, num))
    for k in range(num):
        rivals = [j for j in range(num) if j != k and counts[k, j]]
        total = sum(math.exp(similarity[k, j] / temperature) for j in rivals)
        for j in rivals:
            transition[k, j] = math.exp(similarity[k, j] / temperature) / total
    return transition


def biased_complementary_loss(
    logits: np.ndarray, counts: np.ndarray, transition: np.ndarray, emphasis: np.ndarray
) -> np.ndarray:
    num = len(logits)
    loss = np.zeros(num)
    for i in range(num):
        p = _probability(logits, counts, i)
        for j in range(num):
            if j != i and counts[i, j]:
                q = sum(p[k] * transition[k, j] for k in range(num))
                loss[i] -= emphasis[i, j] * math.log(max(q, 1e-12))
    return loss
