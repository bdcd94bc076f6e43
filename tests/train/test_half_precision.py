"""Embeddings stay in half precision, as the store gives them; methods see the very numbers that they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from judgement_checks import equal
from planted import QUICK, Planted, planted_set

from nc_audit.recipe import ChnrSection, ConfidentSection, RrsitrSection, TrainSection
from nc_audit.train import Inputs, train

SHORT = QUICK.model_copy(update={"steps": 24, "epochs": 3})
HASTY = {"hidden": 16, "discriminator_hidden": 16, "discriminator_steps": 8}
METHODS = {
    "self_paced": {},
    "srem": {},
    "tsvc": {},
    "ncr": {},
    "lemon": {},
    "similarity": {},
    "confident": {"confident": ConfidentSection(clusters=6)},
    "chnr": {"chnr": ChnrSection(bits=0, **HASTY)},
    "chnr, hash codes": {"chnr": ChnrSection(bits=16, **HASTY)},
    "rrsitr": {"rrsitr": RrsitrSection(local=True)},
}


@pytest.fixture(scope="module")
def small() -> Planted:
    drawn = planted_set(120)
    return replace(drawn, image_ID=drawn.image_ID[:, :40].half(), caption_CD=drawn.caption_CD.half())


def _given(small: Planted, settings: TrainSection, logit_scale: float | None, *, half: bool) -> Inputs:
    sides = (small.image_ID, small.caption_CD)
    image, caption = sides if half else (side.float() for side in sides)
    more = {"image_tokens": image.view(-1, 5, 8), "caption_tokens": caption.view(-1, 4, 10)}
    trusted_N = ~small.is_noisy_N & (torch.arange(len(small.pairs)) % 3 == 0)
    return Inputs.prepare(
        image, caption, small.pairs, settings, 60, trusted_N=trusted_N, logit_scale=logit_scale, **more
    )


@pytest.mark.parametrize(
    ("name", "logit_scale"),
    [*((name, None) for name in METHODS), *((name, 20.0) for name in ("self_paced", "similarity", "lemon"))],
)
def test_every_method_gives_the_same_from_half_precision(
    name: str, logit_scale: float | None, small: Planted
):
    settings = SHORT.model_copy(update={"method": name.partition(",")[0], **METHODS[name]})
    half, full = (train(_given(small, settings, logit_scale, half=half), settings) for half in (True, False))
    assert equal(half, full)
    assert all(torch.equal(half.swaps[one], full.swaps[one]) for one in full.swaps)
    vectors = (
        judgement.model.embed(*sides)
        for judgement, sides in (
            (half, (small.image_ID, small.caption_CD)),
            (full, (small.image_ID.float(), small.caption_CD.float())),
        )
    )
    for one, other in zip(*vectors, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
