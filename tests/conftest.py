"""Fixtures for all tests: fixed seeds, a small set of pairs with planted noise, and its training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from nc_audit.methods.matching import Pairs
from nc_audit.recipe import TrainSection
from nc_audit.train import Trained, train

# Derandomised: a failure is a failure for everybody, at every run.
settings.register_profile(
    "nc_audit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nc_audit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@dataclass(frozen=True)
class Planted:
    """Linear-Gaussian embeddings of images and captions, with swapped captions and the truth about them."""

    image_ID: Tensor
    caption_CD: Tensor
    pairs: Pairs
    is_noisy_N: Tensor


def planted_set(
    num_images: int = 400,
    captions_per_image: int = 3,
    rate: float = 0.3,
    seed: int = 0,
    *,
    whole_images: bool = False,
    related: bool = True,
) -> Planted:
    """Images and captions that share 16 latent directions, with a share of the captions moved elsewhere.

    Args:
        num_images: distinct images.
        captions_per_image: captions of each, all different.
        rate: share of caption rows (or of images) in the permutation.
        seed: of everything drawn.
        whole_images: permute images instead of caption rows.
        related: False draws captions that have nothing to do with any image.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latent = normal(num_images, 16)
    true_image_C = torch.arange(num_images).repeat_interleave(captions_per_image)
    image_ID = latent @ normal(16, 48) + normal(num_images, 48)
    of_caption = latent[true_image_C] if related else normal(len(true_image_C), 16)
    caption_CD = of_caption @ normal(16, 40) + normal(len(true_image_C), 40)
    units = num_images if whole_images else len(true_image_C)
    chosen = torch.randperm(units, generator=generator)[: int(rate * units)].sort().values
    moved = torch.arange(units)
    moved[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
    image_N = moved[true_image_C] if whole_images else true_image_C[moved]
    caption_N = torch.arange(len(true_image_C))
    order = (image_N * len(caption_N) + caption_N).argsort()
    pairs = Pairs(image_N[order], caption_N[order], num_images, len(caption_N))
    return Planted(image_ID, caption_CD, pairs, (image_N != true_image_C)[order])


QUICK = TrainSection(
    first_look_dims=(16,),
    first_look_rounds=3,
    components=32,
    steps=72,
    epochs=6,
    first_counted_epoch=2,
    pace_from=2,
    width=48,
    hidden=48,
    batch=128,
)  # type: ignore[call-arg]


@pytest.fixture(scope="session")
def planted() -> Planted:
    return planted_set()


@pytest.fixture(scope="session")
def trained(planted: Planted) -> Trained:
    return train(planted.image_ID, planted.caption_CD, planted.pairs, QUICK, 300)


@pytest.fixture(scope="session")
def planted_without_noise() -> Planted:
    return planted_set(rate=0.0)
