from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted import QUICK, Planted, inputs_of, planted_set

from nc_audit.methods.known_swaps import swaps_auroc
from nc_audit.recipe import RrsitrSection
from nc_audit.train import Judgement, train
from nc_audit.train.loop import Inputs

SETTINGS = QUICK.model_copy(update={"method": "rrsitr"})


def with_tokens(planted: Planted) -> Inputs:
    """Tokens that are noisy copies of the embeddings, captions padded to six."""
    generator = torch.Generator().manual_seed(5)

    def spread(vectors: torch.Tensor, num: int) -> torch.Tensor:
        noise = torch.randn(len(vectors), num, vectors.shape[1], generator=generator)
        return vectors[:, None] + vectors.std() * noise

    caption = spread(planted.caption_CD, 6)
    caption[:, 4:] = 0
    inputs = inputs_of(planted, SETTINGS, 200)
    return replace(inputs, image_tokens=spread(planted.image_ID, 5), caption_tokens=caption)


@pytest.fixture(scope="module")
def small() -> Planted:
    return planted_set(250, 3, 0.3)


@pytest.fixture(scope="module")
def judged(small: Planted) -> Judgement:
    return train(inputs_of(small, SETTINGS, 200), SETTINGS)


def auroc(score: torch.Tensor, planted: Planted) -> float:
    return swaps_auroc(score[~planted.is_noisy_N], score[planted.is_noisy_N])


def test_planted_noise_is_found(judged, small):
    assert auroc(judged.given["noise_score"], small) > 0.85
    assert auroc(-judged.given["weight"], small) > 0.8


def test_the_local_part_joins_in(small):
    inputs = with_tokens(small)
    found = train(inputs, SETTINGS)
    assert found.facts["local"] is True
    assert auroc(found.given["noise_score"], small) > 0.85
    off = SETTINGS.model_copy(update={"rrsitr": RrsitrSection(local=False)})
    alone = train(inputs, off)
    assert alone.facts["local"] is False
    assert not torch.equal(found.given["loss"], alone.given["loss"])
    assert torch.equal(alone.given["fused_similarity"], alone.given["similarity"])
    assert not torch.equal(found.given["fused_similarity"], found.given["similarity"])


def test_ranges_shapes_and_the_trajectory(judged, small):
    num, given = len(small.pairs), judged.given
    assert all(values.shape == (num,) for values in given.values())
    assert all(torch.isfinite(values).all() for values in given.values())
    for name in ("weight", "noise_probability", "swapped_entropy"):
        assert ((given[name] >= 0) & (given[name] <= 1)).all()
    assert judged.swaps == {}
    assert len(judged.trajectory.losses) == SETTINGS.epochs
    assert judged.trajectory.weights[0].tolist() == [1.0] * num
    assert judged.facts["logit_scale"] == 20.0
    assert judged.model.heads.scale().item() == pytest.approx(20.0)


def test_the_same_seed_gives_the_same_and_another_another(judged, small):
    torch.manual_seed(99)
    again = train(inputs_of(small, SETTINGS, 200), SETTINGS)
    assert torch.equal(again.given["noise_score"], judged.given["noise_score"])
    other = SETTINGS.model_copy(update={"seed": 1})
    assert not torch.equal(
        train(inputs_of(small, other, 200), other).given["noise_score"], judged.given["noise_score"]
    )
