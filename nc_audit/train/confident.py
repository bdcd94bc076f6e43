"""Confident learning over caption clusters: a caption whose cluster the image does not suggest is suspect.

Confident learning needs classes. Here a pair's class is the cluster of its caption (k-means over the distinct
captions), predicted from its image by multinomial logistic regression that never saw the image.

Shapes: I = images; C = captions; N = pairs; K = clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nc_audit.methods import confident
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs, Judgement, Progress, silent
from nc_audit.train.similarity import plain_space

PAIRS_PER_CLUSTER = 10
LEAST_CONFIDENCE = 1e-12


def image_class_probabilities(
    image_IK: Tensor,
    image_N: Tensor,
    class_N: Tensor,
    num_classes: int,
    num_folds: int,
    penalty: float,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Tensor:
    """Out-of-fold probability of every class for every image.

    Args:
        image_IK: what classifiers take in, shape [I, K'].
        image_N: index of each pair's image, shape [N].
        class_N: class of each pair, shape [N], 0..num_classes-1.
        num_classes: K.
        num_folds: folds over the images; each is predicted by a classifier of the others.
        penalty: of the classifiers' squared weights, 0..
        generator: draws the folds.
        progress: told the fold.

    Returns:
        Shape [I, K], rows sum to 1.
    """
    num_images = len(image_IK)
    counts = torch.bincount(image_N * num_classes + class_N, minlength=num_images * num_classes)
    counts_IK = counts.view(num_images, num_classes).to(image_IK.dtype)
    fold_I = torch.randperm(num_images, generator=generator) % num_folds
    probability_IK = torch.empty_like(counts_IK)
    for fold in range(num_folds):
        inside = fold_I == fold
        weight, intercept = confident.fit_softmax(image_IK[~inside], counts_IK[~inside], penalty)
        probability_IK[inside] = (image_IK[inside] @ weight + intercept).softmax(1)
        progress("classify images", fold + 1, num_folds)
    return probability_IK


def train_confident(inputs: Inputs, settings: TrainSection, progress: Progress = silent) -> Judgement:
    """Judge every pair by what a classifier of images thinks of its caption's cluster.

    `noise_score` is one minus the self-confidence, 0..1; it has no more values than there are images times
    clusters, and says nothing of captions swapped within a cluster. One minus the self-confidence is no probability
    of noise, so `noise_probability` is the posterior of the worse of two normal components, fitted to its logarithm
    (in itself the self-confidence crowds at its ends); it is not calibrated and overstates noise where clusters
    overlap. Adds `confident_flag`: pruned by noise rate, with the calibrated confident joint.

    The model, the ranks and all columns of matching are those of `plain_space`.

    Raises:
        TrainingError: a loss is not finite.
    """
    chosen, pairs = settings.confident, inputs.pairs
    space = plain_space(inputs, settings, progress)
    generator = torch.Generator().manual_seed(settings.seed + 30)
    num_classes = max(2, min(chosen.clusters, len(pairs) // PAIRS_PER_CLUSTER))
    class_C = confident.cluster(inputs.caption_head_CD.float(), num_classes, generator)
    class_N = class_C[pairs.caption_N]
    probability_IK = image_class_probabilities(
        inputs.image_head_ID,
        pairs.image_N,
        class_N,
        int(class_C.max()) + 1,
        chosen.folds,
        chosen.penalty,
        generator,
        progress,
    )
    probability_NK = probability_IK[pairs.image_N]
    joint_KK = confident.calibrated_joint(confident.confident_joint(probability_NK, class_N), class_N)
    confidence_N = confident.self_confidence(probability_NK, class_N)
    return space.judgement(
        inputs,
        1 - confidence_N,
        -confidence_N.clamp_min(LEAST_CONFIDENCE).log(),
        confident_flag=confident.prune_by_noise_rate(probability_NK, class_N, joint_KK),
    )
