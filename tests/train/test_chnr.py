from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import QUICK, Planted, inputs_of
from torch import Tensor

from nc_audit.errors import RecipeError
from nc_audit.methods.hashing import binary_codes, pair_weight
from nc_audit.methods.heads import Heads
from nc_audit.methods.matching import Pairs
from nc_audit.model import Model
from nc_audit.recipe import ChnrSection, TrainSection, build_recipe
from nc_audit.train import train
from nc_audit.train.chnr import (
    Phase,
    nearest_centres,
    standardised,
    train_chnr,
    train_discriminator,
    train_hash_heads,
)
from nc_audit.train.loop import Inputs, Judgement

SMALL = QUICK.model_copy(
    update={
        "method": "chnr",
        "epochs": 4,
        "steps": 48,
        "chnr": ChnrSection(
            bits=32, hidden=64, discriminator_hidden=64, discriminator_steps=70, discriminator_lr=3e-3
        ),
    }
)


def but(**changed: object) -> TrainSection:
    """The small settings with other `chnr` keys, and hardly trained."""
    own = SMALL.chnr.model_copy(update={"discriminator_steps": 8, **changed})
    return SMALL.model_copy(update={"chnr": own, "steps": 8})


def trusted(planted: Planted, share: float = 0.4) -> Tensor:
    clean = (~planted.is_noisy_N).nonzero().squeeze(1)
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(3))
    result = torch.zeros(len(planted.pairs), dtype=torch.bool)
    result[clean[order[: int(share * len(clean))]]] = True
    return result


def auroc(score: Tensor, is_noisy: Tensor) -> float:
    return (score[is_noisy][:, None] > score[~is_noisy][None, :]).double().mean().item()


@pytest.fixture(scope="module")
def inputs(planted: Planted) -> Inputs:
    return replace(inputs_of(planted, SMALL, 300), trusted_N=trusted(planted))


@pytest.fixture(scope="module")
def judgement(inputs: Inputs) -> Judgement:
    return train_chnr(inputs, SMALL)


def test_finds_planted_noise_among_pairs_it_never_saw(judgement: Judgement, inputs: Inputs, planted: Planted):
    assert inputs.trusted_N is not None
    asked, given = ~inputs.trusted_N, judgement.given
    noisy = planted.is_noisy_N[asked]
    assert auroc(given["noise_score"][asked], noisy) > 0.85
    weight = given["weight"][asked]
    assert weight[~noisy].mean() > 2 * weight[noisy].mean()


def test_the_judgement_is_complete(judgement: Judgement, inputs: Inputs):
    num, given = len(inputs.pairs), judgement.given
    for name in ("similarity", "loss", "relative_loss", "energy", "swapped_entropy", "weight", "noise_score"):
        assert given[name].shape == (num,), name
        assert given[name].dtype == torch.float32, name
        assert given[name].isfinite().all(), name
        assert not given[name].requires_grad, name
    c = given["trusted_probability"]
    assert ((c >= 0) & (c <= 1)).all()
    assert torch.equal(given["noise_probability"], 1 - c)
    torch.testing.assert_close((-given["noise_score"]).sigmoid(), c)
    assert torch.equal(given["weight"], pair_weight(c, "ew", judgement.facts["threshold"]))
    assert judgement.swaps == {}
    facts = judgement.facts
    assert facts["logit_scale"] == 1.0
    assert facts["num_candidates"] == len(inputs.candidates.caption_M)
    assert facts["bits"] == 32
    assert facts["trusted_pairs"] == int(inputs.trusted_N.sum())
    assert 0 < facts["threshold"] < 1


def test_the_trajectory_shows_both_phases_and_the_division_by_probability(
    judgement: Judgement, inputs: Inputs
):
    trajectory, given = judgement.trajectory, judgement.given
    assert len(trajectory.losses) == len(trajectory.weights) == len(trajectory.divisions) == SMALL.epochs
    for weight in trajectory.weights[:2]:
        assert torch.equal(weight.bool(), inputs.trusted_N)
    for weight in trajectory.weights[2:]:
        assert torch.equal(weight, given["weight"])
    assert torch.equal(trajectory.losses[-1], given["loss"])
    division, c, threshold = (
        trajectory.divisions[-1],
        given["trusted_probability"],
        judgement.facts["threshold"],
    )
    assert set(division.unique().tolist()) == {0, 1, 2}
    assert c[division == 0].min() >= threshold
    assert c[division == 2].max() < threshold
    assert c[division == 2].max() < c[division == 1].min() < c[division == 1].max() < c[division == 0].min()


def test_codes_of_a_match_are_nearer_than_others(judgement: Judgement, inputs: Inputs, planted: Planted):
    clean = planted.pairs.select((~planted.is_noisy_N).nonzero().squeeze(1))
    image, caption = (
        binary_codes(side).float() for side in judgement.model.embed(inputs.image_ID, inputs.caption_CD)
    )
    own = (image[clean.image_N] * caption[clean.caption_N]).sum(1)
    other = (image[clean.image_N] * caption[clean.caption_N.roll(50)]).sum(1)
    assert image.shape == (400, 32)
    assert own.mean() > other.mean() + 4


def test_a_hashing_model_comes_back_exactly(judgement: Judgement, inputs: Inputs, tmp_path):
    judgement.model.save(tmp_path / "m.safetensors")
    again = Model.load(tmp_path / "m.safetensors")
    assert again.heads is not None
    assert judgement.model.heads is not None
    assert again.heads.sizes == judgement.model.heads.sizes
    assert not again.heads.training
    state = again.heads.state_dict()
    for name, value in judgement.model.heads.state_dict().items():
        assert torch.equal(state[name], value), name
    for one, other in zip(
        again.embed(inputs.image_ID, inputs.caption_CD),
        judgement.model.embed(inputs.image_ID, inputs.caption_CD),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_without_bits_ordinary_heads_train_by_the_same_weights(inputs: Inputs, planted: Planted):
    own = SMALL.chnr.model_copy(update={"bits": 0, "discriminator_steps": 50})
    found = train_chnr(inputs, SMALL.model_copy(update={"chnr": own}))
    assert isinstance(found.model.heads, Heads)
    assert not found.model.heads.training
    assert "bits" not in found.facts
    assert len(found.trajectory.losses) == SMALL.epochs
    assert auroc(found.given["loss"], planted.is_noisy_N) > 0.75
    assert torch.equal(found.trajectory.weights[0].bool(), inputs.trusted_N)


def test_equal_seeds_give_equal_bits_and_others_do_not(inputs: Inputs):
    torch.manual_seed(5)
    first = train(inputs, but())
    torch.manual_seed(6)
    state = torch.get_rng_state()
    second = train_chnr(inputs, but())
    assert torch.equal(torch.get_rng_state(), state)
    for name, column in first.given.items():
        assert torch.equal(column, second.given[name]), name
    other = train_chnr(inputs, but().model_copy(update={"seed": 1}))
    assert not torch.equal(other.given["noise_score"], second.given["noise_score"])


@pytest.mark.parametrize(
    ("column", "changed"),
    [
        ("weight", {"weighting": "dw"}),
        ("similarity", {"weighting": "ones"}),
        ("similarity", {"meta_share": 0.0}),
        ("noise_score", {"clusters": 5}),
        ("noise_score", {"view_dropout": 0.0}),
        ("noise_score", {"discriminator_steps": 9}),
        ("noise_score", {"discriminator_batch": 20}),
        ("noise_score", {"discriminator_lr": 1e-4}),
        ("noise_score", {"discriminator_decay": 0.5}),
        ("noise_score", {"discriminator_hidden": 0}),
        ("noise_score", {"discriminator_dropout": 0.5}),
        ("noise_score", {"penalty": 0.0}),
        ("similarity", {"hidden": 32}),
        ("similarity", {"lr": 1e-4}),
        ("similarity", {"weight_decay": 0.5}),
        ("similarity", {"temperature": 0.5}),
        ("similarity", {"quantisation": 1.0}),
    ],
)
def test_every_key_matters(inputs: Inputs, column: str, changed: dict[str, object]):
    base, found = train_chnr(inputs, but()).given[column], train_chnr(inputs, but(**changed)).given[column]
    assert not torch.equal(base, found)
    assert found.isfinite().all()


@pytest.mark.parametrize(("num", "told"), [(None, "0"), (19, "19")])
def test_too_few_trusted_pairs_are_refused(inputs: Inputs, num: int | None, told: str):
    known = None if num is None else torch.arange(len(inputs.pairs)) < num
    with pytest.raises(RecipeError) as caught:
        train_chnr(replace(inputs, trusted_N=known), SMALL)
    assert caught.value.message == (
        f"method chnr learns from pairs known to be right: {told} of 1,200 are, it takes 20"
    )
    assert caught.value.hint == "name more with --trusted FILE, or keep some in a review"


def test_trusted_pairs_of_one_cluster_are_refused(inputs: Inputs):
    with pytest.raises(RecipeError) as caught:
        train_chnr(inputs, but(clusters=1))
    assert caught.value.message == (
        f"the {int(inputs.trusted_N.sum()):,} trusted pairs are too alike: no caption of one makes a wrong caption"
        " of another"
    )
    assert caught.value.hint == "trust pairs of more images, or lower train.chnr.clusters"


def test_no_given_pair_is_ever_a_fake(planted: Planted):
    # Every other combination of two trusted pairs is a given pair too: nothing is left to make a fake of.
    image, caption = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    pairs = Pairs(image.flatten(), caption.flatten(), 5, 5)
    settings = SMALL.chnr.model_copy(update={"discriminator_steps": 1})
    with pytest.raises(RecipeError):
        train_discriminator(
            torch.randn(5, 3), torch.randn(5, 3), pairs, torch.arange(0, 25, 6), torch.arange(5), settings, 0
        )


def test_phases_train_only_on_what_has_weight():
    generator = torch.Generator().manual_seed(0)
    image, caption = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)
    pairs = Pairs(torch.arange(64), torch.arange(64), 64, 64)
    settings = ChnrSection(bits=16, hidden=64, quantisation=0.0, lr=1e-2)

    half = (torch.arange(64) < 32).float()
    heads = train_hash_heads(image, caption, [Phase(pairs, half, 40, 1, 64)], settings, 0)
    cosine = torch.linalg.vecdot(*heads.embed(image, caption))
    assert cosine[:32].mean() > cosine[32:].mean() + 0.3


def test_clusters_are_those_of_k_means():
    generator = torch.Generator().manual_seed(0)
    centre = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    truth = torch.arange(90) % 3
    found = nearest_centres(centre[truth] + torch.randn(90, 2, generator=generator), 3, seed=1)
    assert len({tuple(pair) for pair in zip(found.tolist(), truth.tolist(), strict=True)}) == 3


def test_standardised_vectors_have_one_mean_and_one_deviation():
    found = standardised(torch.tensor([[1.0, 5.0], [3.0, 7.0]]))
    np.testing.assert_allclose(found.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(), 1, atol=1e-6)
    assert standardised(torch.ones(2, 2)).isfinite().all()


def test_the_recipe_selects_the_method():
    recipe = build_recipe(["chnr"])
    assert recipe.train.method == "chnr"
    assert recipe.train.chnr == ChnrSection()
