"""Slow float64 references for LEMoN and confident learning: loops from the formulas, no code of the package."""

from __future__ import annotations

import math

import numpy as np


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return 1.0 - sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def neighbour_noise(
    query: np.ndarray,
    other: np.ndarray,
    query_of: list[int],
    other_of: list[int],
    own_distance: list[float],
    references: list[int],
    k: int,
    tau1: float,
    tau2: float,
) -> np.ndarray:
    result = np.zeros(len(query_of))
    for i in range(len(query_of)):
        far = sorted(
            (distance(query[query_of[i]], query[query_of[j]]), place, j)
            for place, j in enumerate(references)
            if j != i
        )[:k]
        terms = [
            distance(other[other_of[i]], other[other_of[j]])
            * math.exp(-tau1 * d)
            * math.exp(-tau2 * own_distance[j])
            for d, _, j in far
        ]
        result[i] = sum(terms) / len(terms) if terms else 0.0
    return result


def thresholds(probability: np.ndarray, given: list[int]) -> list[float]:
    result = []
    for k in range(probability.shape[1]):
        own = [float(probability[i, k]) for i in range(len(given)) if given[i] == k]
        result.append(sum(own) / len(own) if own else math.inf)
    return result


def confident_joint(probability: np.ndarray, given: list[int]) -> np.ndarray:
    num = probability.shape[1]
    limit = thresholds(probability, given)
    joint = np.zeros((num, num), int)
    for i, k in enumerate(given):
        bins = [j for j in range(num) if probability[i, j] >= limit[j] - 1e-6]
        if len(bins) == 1:
            joint[k, bins[0]] += 1
        elif bins:
            joint[k, max(range(num), key=lambda j: (probability[i, j], -j))] += 1
    for k in range(num):
        joint[k, k] = max(1, joint[k, k])
    return joint


def prune_by_noise_rate(probability: np.ndarray, given: list[int], joint: np.ndarray) -> list[bool]:
    num = probability.shape[1]
    flagged = [False] * len(given)
    for k in range(num):
        members = [i for i in range(len(given)) if given[i] == k]
        for j in range(num):
            count = min(int(joint[k, j]), len(members))
            if j == k or count == 0:
                continue
            leads = sorted((float(probability[i, j] - probability[i, k]) for i in members), reverse=True)
            for i in members:
                if probability[i, j] - probability[i, k] >= leads[count - 1]:
                    flagged[i] = True
    for i, k in enumerate(given):
        if max(range(num), key=lambda j: (probability[i, j], -j)) == k:
            flagged[i] = False
    return flagged


def softmax_objective(
    weight: np.ndarray, intercept: np.ndarray, vectors: np.ndarray, counts: np.ndarray, penalty: float
) -> float:
    total = penalty / 2 * float((weight**2).sum())
    for v in range(len(vectors)):
        logits = [float(vectors[v] @ weight[:, k] + intercept[k]) for k in range(weight.shape[1])]
        top = max(logits)
        normaliser = top + math.log(sum(math.exp(x - top) for x in logits))
        total += sum(float(counts[v, k]) * (normaliser - logits[k]) for k in range(len(logits)))
    return total


def within(vectors: np.ndarray, classes: list[int]) -> float:
    """Sum of squared distances from the mean of the class."""
    total = 0.0
    for k in set(classes):
        members = np.array([vectors[i] for i in range(len(classes)) if classes[i] == k], np.float64)
        total += float(((members - members.mean(0)) ** 2).sum())
    return total
