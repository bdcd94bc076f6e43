"""A small set of pairs with planted noise, and settings that train on it in a second or two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nc_audit.methods.matching import Pairs
from nc_audit.recipe import TrainSection
from nc_audit.train.loop import Inputs


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
    steps=150,
    epochs=6,
    first_counted_epoch=2,
    pace_from=2,
    width=48,
    hidden=48,
    batch=128,
    draws=1,
)  # type: ignore[call-arg]


def inputs_of(planted: Planted, settings: TrainSection, num_candidates: int) -> Inputs:
    """A planted set as training takes it."""
    return Inputs.prepare(planted.image_ID, planted.caption_CD, planted.pairs, settings, num_candidates)
