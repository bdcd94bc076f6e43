"""Stage 3, train: short robust training of small heads over frozen embeddings, on the audited pairs themselves.

Every method of the recipes is a module here with one function, from `Inputs` to a `Judgement`: what it says of each
pair. The maths lies in `nc_audit.methods`; what methods share lies in `loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from nc_audit.errors import DatasetError
from nc_audit.methods.matching import Pairs
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs, Judgement, Progress, Trajectory, silent

__all__ = ["Inputs", "Judgement", "Progress", "Trajectory", "check_enough", "silent", "train"]

MIN_PAIRS = 40
MIN_DISTINCT = 10


def train(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """The whole training stage by the recipe's method.

    Args:
        inputs: frozen embeddings, pairs, candidates.
        settings: the recipe's `train` section.
        progress: told what is trained and how far.

    Raises:
        DatasetError: there are too few pairs, images or captions to tell anything.
        RecipeError: the method needs what is not there.
        TrainingError: a loss is not finite.
    """
    check_enough(inputs.pairs)
    method = settings.method
    function: Callable[..., Judgement] = getattr(import_module(f"nc_audit.train.{method}"), f"train_{method}")
    return function(inputs, settings, progress)


def check_enough(pairs: Pairs) -> None:
    """Refuse sets that are too small to learn anything from.

    Raises:
        DatasetError: with the counts.
    """
    images, captions = len(pairs.image_N.unique()), len(pairs.caption_N.unique())
    if len(pairs) < MIN_PAIRS or images < MIN_DISTINCT or captions < MIN_DISTINCT:
        raise DatasetError(
            f"{len(pairs):,} distinct pairs of {images:,} images and {captions:,} captions are too few to audit",
            f"give at least {MIN_PAIRS} pairs with {MIN_DISTINCT} different images and captions",
        )
