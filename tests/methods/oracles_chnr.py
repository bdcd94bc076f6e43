"""CHNR's formulas as slow float64 loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def fakes_mask(
    image: Sequence[int], caption: Sequence[int], group: Sequence[int], given: set[tuple[int, int]]
) -> np.ndarray:
    num = len(image)
    mask = np.zeros((num, num), bool)
    for i in range(num):
        for j in range(num):
            mask[i, j] = (
                image[i] != image[j]
                and caption[i] != caption[j]
                and group[i] != group[j]
                and (image[i], caption[j]) not in given
            )
    return mask


def slope(logit: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> float:
    """Length of the gradient by central differences."""
    squares = 0.0
    for k in range(len(at)):
        above, below = at.copy(), at.copy()
        above[k] += step
        below[k] -= step
        squares += ((logit(above) - logit(below)) / (2 * step)) ** 2
    return math.sqrt(squares)


def discriminator_loss(
    logit: Callable[[np.ndarray], float],
    images: Sequence[np.ndarray],
    captions: Sequence[np.ndarray],
    fakes: Sequence[tuple[int, int]],
    shares: Sequence[np.ndarray],
    factor: float,
) -> float:
    """`shares` holds one array [fakes, features] per combination of views, in their order."""
    total = 0.0
    combinations = [(image, caption) for image in images for caption in captions]
    for (image, caption), share in zip(combinations, shares, strict=True):
        real = [np.concatenate([v, t]) for v, t in zip(image, caption, strict=True)]
        for z in real:
            total += math.log(1 + math.exp(-logit(z))) / len(real)
        for u, (i, j) in zip(share, fakes, strict=True):
            fake = np.concatenate([image[i], caption[j]])
            total += math.log(1 + math.exp(logit(fake))) / len(fakes)
            between = u * real[i] + (1 - u) * fake
            total += factor * (slope(logit, between) - 1) ** 2 / len(fakes)
    return total


def hash_contrastive_loss(
    image: np.ndarray,
    caption: np.ndarray,
    weight: Sequence[float],
    counts: np.ndarray,
    temperature: float,
) -> np.ndarray:
    num = len(image)
    anchors = [*image, *caption]

    def kernel(a: int, b: int) -> float:
        x, y = anchors[a], anchors[b]
        return math.exp(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) / temperature)

    result = np.zeros(num)
    for a in range(2 * num):
        pair, other = a % num, (a + num) % (2 * num)
        everything = sum(kernel(a, b) for b in range(2 * num) if b != a and counts[pair, b % num])
        result[pair] += -weight[pair] * math.log(kernel(a, other) / everything)
    return result


def quantisation_loss(target: np.ndarray, views: Sequence[np.ndarray]) -> np.ndarray:
    result = np.zeros(len(target))
    for view in views:
        for i, row in enumerate(view):
            for k, value in enumerate(row):
                result[i] += (target[i, k] - value) ** 2
    return result
