"""A class for each image, for noise within a class: from folder or file names, or else by clusters of embeddings.

Shapes: I = images; D = dimensions.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from nc_audit.dataset.rows import is_split_word

MIN_IMAGES_PER_CLASS = 3
MIN_COVERED = 0.8

_LETTERS = re.compile(r"[^\W\d_]+")


def classes_of_names(names: Sequence[str]) -> np.ndarray | None:
    """Class of each image by its folder, or else by its file name without digits and separators.

    Folders are classes when there are at least two, a third as many as images at most, and not all of them are splits
    or numbered shards. File names are asked next, under the same limits, and only when at least 80 % of the images
    share their class with another.

    Args:
        names: path of each image, I of them, slashes of either kind.

    Returns:
        Shape [I] int64, 0.. in the order of the class names, -1 for an image whose name says nothing; None when names
        tell no classes.

    Example:
        >>> classes_of_names(["airport_1.jpg", "park_1.jpg", "airport_22.jpg"] * 2).tolist()
        [0, 1, 0, 0, 1, 0]
        >>> classes_of_names(["train/1.jpg", "val/2.jpg"] * 3) is None
        True
    """
    paths = [PurePosixPath(name.replace("\\", "/")) for name in names]
    folders = [path.parent.name for path in paths]
    if any(_spelled(folder) for folder in set(folders)):
        found = _numbered(folders)
        if found is not None:
            return found
    return _numbered([_spelled(path.stem) for path in paths])


def cluster_classes(image_ID: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Class of each image by k-means, where names tell none.

    Args:
        image_ID: embeddings, shape [I, D], of any precision; distances are Euclidean, as they come.
        num: clusters; as many as images at most are made, and one at least.
        seed: of the starting centres.

    Returns:
        Shape [I] int64, 0..num - 1, -1 for an image whose embedding is not finite; the same arguments give the same
        result.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    classes = np.full(len(image_ID), -1, dtype=np.int64)
    is_finite = np.isfinite(image_ID).all(1)
    if is_finite.any():
        num = max(1, min(num, int(is_finite.sum())))
        means = MiniBatchKMeans(num, random_state=seed, n_init=3, batch_size=2048)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # fewer distinct images than clusters is no harm
            classes[is_finite] = means.fit_predict(image_ID[is_finite].astype(np.float32))
    return classes


def _spelled(name: str) -> str:
    """The letters of a name, words that name a split left out."""
    words = _LETTERS.findall(name.casefold())
    return "".join(word for word in words if not is_split_word(word))


def _numbered(names: Sequence[str]) -> np.ndarray | None:
    """Numbers for names that divide the images into classes; None when they do not."""
    counts = Counter(name for name in names if name)
    covered = sum(count for count in counts.values() if count > 1)
    if not 2 <= len(counts) <= len(names) / MIN_IMAGES_PER_CLASS or covered < MIN_COVERED * len(names):
        return None
    place = {name: number for number, name in enumerate(sorted(counts))}
    return np.array([place.get(name, -1) for name in names], dtype=np.int64)
