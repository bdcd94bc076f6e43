"""The baselines `similarity`, `lemon` and `confident`, on heads they train and on aligned encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from planted import QUICK, Planted, inputs_of, planted_set
from torch.nn.functional import normalize

from nc_audit.bench.metrics import auroc
from nc_audit.errors import ShapeError
from nc_audit.methods.lemon import lemon_score, neighbour_noise
from nc_audit.methods.matching import Pairs
from nc_audit.methods.mixture import clean_posterior
from nc_audit.methods.uncertainty import chance_loss
from nc_audit.recipe import ConfidentSection, LemonSection, TrainSection, build_recipe
from nc_audit.train import Inputs, Judgement
from nc_audit.train.confident import image_class_probabilities, train_confident
from nc_audit.train.lemon import train_lemon
from nc_audit.train.similarity import train_similarity

Method = Callable[[Inputs, TrainSection], Judgement]
METHODS: dict[str, Method] = {
    "similarity": train_similarity,
    "lemon": train_lemon,
    "confident": train_confident,
}
SETTINGS = QUICK.model_copy(update={"confident": ConfidentSection(clusters=12)})
SHORT = SETTINGS.model_copy(update={"steps": 12, "epochs": 2, "first_counted_epoch": 1})


@pytest.fixture(scope="module")
def inputs(planted: Planted) -> Inputs:
    return inputs_of(planted, SETTINGS, 300)


@pytest.fixture(scope="module")
def aligned() -> tuple[Inputs, torch.Tensor]:
    """A dual encoder's embeddings: captions near their images, a fifth of them moved elsewhere."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(200, 24, generator=generator)
    caption = 3 * (image + 0.5 * torch.randn(200, 24, generator=generator))
    truth = torch.arange(200)
    image_N = torch.cat([truth[:40].roll(7), truth[40:]])
    order = image_N.argsort()
    pairs = Pairs(image_N[order], truth[order], 200, 200)
    drawn = Planted(image, caption, pairs, (image_N != truth)[order])
    return replace(inputs_of(drawn, SETTINGS, 100), logit_scale=30.0), drawn.is_noisy_N


@pytest.fixture(scope="module")
def judgements(inputs: Inputs) -> dict[str, Judgement]:
    return {name: method(inputs, SETTINGS) for name, method in METHODS.items()}


# --- on heads of their own


@pytest.mark.parametrize(("name", "bar"), [("similarity", 0.93), ("lemon", 0.93), ("confident", 0.8)])
def test_planted_noise_scores_higher(judgements, planted, name, bar):
    assert auroc(planted.is_noisy_N.numpy(), judgements[name].given["noise_score"].numpy()) > bar


@pytest.mark.parametrize("name", METHODS)
def test_the_columns_are_there_and_in_range(judgements, inputs, name):
    judgement, num = judgements[name], len(inputs.pairs)
    given = judgement.given
    wanted = {
        *("similarity", "loss", "relative_loss", "energy", "swapped_entropy", "image_entropy"),
        *("caption_entropy", "weight", "noise_score", "noise_probability"),
    }
    own = {"similarity": set(), "lemon": {"image_noise", "caption_noise"}, "confident": {"confident_flag"}}
    assert set(given) == wanted | own[name]
    for column, value in given.items():
        assert value.shape == (num,), column
        assert value.dtype == (torch.bool if column == "confident_flag" else torch.float32), column
        assert torch.isfinite(value.double()).all(), column
    for column in ("weight", "noise_probability", "swapped_entropy"):
        assert ((given[column] >= 0) & (given[column] <= 1)).all(), column
    assert given["weight"].tolist() == [1.0] * num
    mixed = given["noise_score"]
    if name == "confident":
        mixed = -(1 - mixed).log()
    # The score is one minus a float32 number, so its complement is known to some 1e-7 only.
    torch.testing.assert_close(given["noise_probability"], 1 - clean_posterior(mixed), atol=1e-3, rtol=0)
    torch.testing.assert_close(given["relative_loss"], given["loss"] / chance_loss(300))
    assert judgement.swaps == {}
    assert judgement.facts["num_candidates"] == 300
    assert judgement.facts["logit_scale"] > 1


@pytest.mark.parametrize("name", METHODS)
def test_the_trajectory_and_the_model_are_those_of_the_last_epoch(judgements, inputs, planted, name):
    judgement = judgements[name]
    trajectory = judgement.trajectory
    assert len(trajectory.losses) == len(trajectory.weights) == len(trajectory.divisions) == SETTINGS.epochs
    assert torch.equal(trajectory.losses[-1], judgement.given["loss"])
    assert set(torch.stack(trajectory.divisions).unique().tolist()) <= {0, 1, 2}
    image, caption = judgement.model.embed(planted.image_ID, planted.caption_CD)
    cosine = (image[inputs.pairs.image_N] * caption[inputs.pairs.caption_N]).sum(1)
    torch.testing.assert_close(cosine, judgement.given["similarity"], atol=1e-5, rtol=0)
    assert judgement.model.heads is not None
    assert not judgement.model.heads.training


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_equal_whatever_was_drawn_before(inputs, name):
    one = METHODS[name](inputs, SHORT)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    other = METHODS[name](inputs, SHORT)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    for column, value in one.given.items():
        assert torch.equal(value, other.given[column]), column
    third = METHODS[name](inputs, SHORT.model_copy(update={"seed": 1}))
    assert not torch.equal(one.given["noise_score"], third.given["noise_score"])


def test_all_train_the_same_heads(judgements):
    for name in ("lemon", "confident"):
        for column in ("similarity", "loss", "energy"):
            assert torch.equal(judgements[name].given[column], judgements["similarity"].given[column])


def test_progress_is_told_to_the_end(inputs):
    told: list[tuple[str, int, int]] = []
    train_confident(inputs, SHORT, lambda *args: told.append(args))
    assert told == [("train plainly", e, 2) for e in (1, 2)] + [
        ("classify images", f, 5) for f in range(1, 6)
    ]


# --- similarity and lemon


def test_lemon_adds_up(judgements):
    given = judgements["lemon"].given
    distance = (1 - given["similarity"]).clamp_min(0)
    expected = lemon_score(distance, given["image_noise"], given["caption_noise"])
    torch.testing.assert_close(given["noise_score"], expected)
    assert (given["image_noise"] > 0).any()


def test_lemon_asks_nearby_images_of_captions_and_nearby_captions_of_images(aligned):
    inputs, _ = aligned
    given, pairs = train_lemon(inputs, SETTINGS).given, inputs.pairs
    image, caption = normalize(inputs.image_ID, dim=1), normalize(inputs.caption_CD, dim=1)
    distance, every = 1 - given["similarity"], torch.arange(len(pairs))
    by_image = neighbour_noise(image, caption, pairs.image_N, pairs.caption_N, distance, every)
    by_caption = neighbour_noise(caption, image, pairs.caption_N, pairs.image_N, distance, every)
    torch.testing.assert_close(given["image_noise"], by_image)
    torch.testing.assert_close(given["caption_noise"], by_caption)


def test_lemon_without_factors_is_similarity(inputs):
    settings = SHORT.model_copy(update={"lemon": LemonSection(image_factor=0, caption_factor=0)})
    score = train_lemon(inputs, settings).given["noise_score"]
    torch.testing.assert_close(score, train_similarity(inputs, SHORT).given["noise_score"])


def test_fewer_references_than_pairs_are_drawn_by_the_seed(inputs):
    settings = SHORT.model_copy(update={"lemon": LemonSection(references=50, neighbours=3)})
    few = train_lemon(inputs, settings).given
    assert torch.equal(few["image_noise"], train_lemon(inputs, settings).given["image_noise"])
    every = SHORT.model_copy(update={"lemon": LemonSection(neighbours=3)})
    assert not torch.equal(few["image_noise"], train_lemon(inputs, every).given["image_noise"])


# --- aligned encoders


def test_zero_shot_similarity_is_the_cosine_of_the_encoder(aligned):
    inputs, is_noisy = aligned
    judgement = train_similarity(inputs, SETTINGS)
    image, caption = normalize(inputs.image_ID, dim=1), normalize(inputs.caption_CD, dim=1)
    cosine = (image[inputs.pairs.image_N] * caption[inputs.pairs.caption_N]).sum(1)
    torch.testing.assert_close(judgement.given["similarity"], cosine)
    torch.testing.assert_close(judgement.given["noise_score"], 1 - cosine)
    assert auroc(is_noisy.numpy(), judgement.given["noise_score"].numpy()) > 0.99
    assert judgement.facts == {"logit_scale": 30.0, "num_candidates": 100}
    assert judgement.trajectory.losses == [], "nothing was trained"
    assert judgement.model.heads is None
    embedded = judgement.model.embed(inputs.image_ID, inputs.caption_CD)
    for found, expected in zip(embedded, (image, caption), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["lemon", "confident"])
def test_other_baselines_use_aligned_embeddings_as_they_are(aligned, name):
    inputs, is_noisy = aligned
    judgement = METHODS[name](inputs, SETTINGS)
    assert judgement.model.heads is None
    assert torch.equal(judgement.given["similarity"], train_similarity(inputs, SETTINGS).given["similarity"])
    bar = {"lemon": 0.99, "confident": 0.6}[name]
    assert auroc(is_noisy.numpy(), judgement.given["noise_score"].numpy()) > bar


def test_encoders_called_aligned_must_have_one_space(aligned):
    inputs = replace(aligned[0], caption_CD=aligned[0].caption_CD[:, :20])
    with pytest.raises(ShapeError) as caught:
        train_similarity(inputs, SETTINGS)
    assert str(caught.value) == (
        "caption embeddings of aligned encoders must have shape [C, 24], got [200, 20]"
    )


# --- confident


def test_flags_follow_the_noise(judgements, planted):
    flag, noisy = judgements["confident"].given["confident_flag"], planted.is_noisy_N
    assert flag[noisy].double().mean() > flag[~noisy].double().mean() + 0.4


def test_no_classifier_saw_the_image_it_is_asked_about():
    # Classes mean nothing to images, so a classifier that had seen its images would know them, and only then.
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(60, 64, generator=generator)
    image_N = torch.arange(60).repeat_interleave(3)
    class_N = torch.randint(0, 2, (60,), generator=generator).repeat_interleave(3)
    found = image_class_probabilities(image, image_N, class_N, 2, 4, 0.01, generator)
    torch.testing.assert_close(found.sum(1), torch.ones(60))
    own = found[image_N].gather(1, class_N[:, None]).squeeze(1)
    assert 0.3 < own.mean().item() < 0.7


def test_small_sets_have_fewer_clusters():
    small = planted_set(30, 2, 0.2)
    judgement = train_confident(inputs_of(small, SHORT, 30), SHORT.model_copy(update={"folds": 3}))
    assert torch.isfinite(judgement.given["noise_score"]).all()


# --- recipes


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_names_its_method_and_changes_nothing_else(name):
    recipe = build_recipe([name])
    assert recipe.train == TrainSection(method=name)  # type: ignore[call-arg]
