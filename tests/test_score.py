from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
import strategies
import torch
from planted import QUICK, Planted, inputs_of, planted_set

from nc_audit.calibrate import HeldOut, NoiseRate, combine_held_out
from nc_audit.errors import ShapeError
from nc_audit.methods.known_swaps import swaps_auroc
from nc_audit.methods.matching import Pairs
from nc_audit.recipe import ScoreSection
from nc_audit.rivals import look_around, reach
from nc_audit.score import Draw, ask_neighbours, judge
from nc_audit.train import train
from nc_audit.train.loop import Judgement
from nc_audit.train.self_paced import Trained, train_robustly
from nc_audit.unlikely_words import WordMaps


def unit_vectors(num: int, dims: int, seed: int) -> torch.Tensor:
    """Random unit vectors in float32, as heads give them."""
    return strategies.unit_vectors(num, dims, seed, torch.float32)


SETTINGS = ScoreSection(candidates=300, references=500, neighbours=10)  # type: ignore[call-arg]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- neighbours


def test_neighbours_equal_the_oracle_without_the_own_image():
    image, caption = unit_vectors(20, 5, 0), unit_vectors(60, 5, 1)
    pairs = Pairs(torch.arange(60) // 3, torch.arange(60), 20, 60)
    swaps = Pairs(torch.arange(60) // 3, torch.arange(60).roll(7), 20, 60)
    trust = torch.rand(60, dtype=torch.float64, generator=generator())
    # Six voters are two images with all their captions: a border within an image would be a tie.
    settings = ScoreSection(neighbours=6, min_trust=0.0, sharpness=5.0)  # type: ignore[call-arg]
    found = ask_neighbours(image, caption, pairs, swaps, trust, settings, generator())
    sides = image[pairs.image_N].double().numpy(), caption[pairs.caption_N].double().numpy()
    for asked, by_image, by_caption in (
        (pairs, found.by_image.given_N, found.by_caption.given_N),
        (swaps, found.by_image.swaps_S, found.by_caption.swaps_S),
    ):
        query = image[asked.image_N].double().numpy(), caption[asked.caption_N].double().numpy()
        own = (asked.image_N[:, None] == pairs.image_N[None, :]).numpy()
        for ours, this, other in ((by_image, 0, 1), (by_caption, 1, 0)):
            expected = oracles.neighbour_distance(
                query[this], query[other], sides[this], sides[other], trust.numpy(), own, 6, 5.0
            )
            np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_where_noise_strikes_pairs_an_images_other_captions_are_heard():
    # Three captions per image: two at the image, one far away. The nearest image is the pair's own.
    image = unit_vectors(20, 8, 0)
    caption = image.repeat_interleave(3, 0)
    caption[2::3] = -caption[2::3]
    pairs = Pairs(torch.arange(60) // 3, torch.arange(60), 20, 60)
    settings = ScoreSection(neighbours=2, min_trust=0.0)  # type: ignore[call-arg]
    trust = torch.ones(60)
    heard = ask_neighbours(
        image, caption, pairs, pairs, trust, settings, generator(), own_captions_vote=True
    ).by_image.given_N
    # One of the two voters agrees wholly, the other not at all; the far caption has both against it.
    torch.testing.assert_close(heard[:3], torch.tensor([1.0, 1.0, 2.0]))
    alone = ask_neighbours(image, caption, pairs, pairs, trust, settings, generator()).by_image.given_N
    assert not torch.allclose(alone, heard)


def test_pairs_below_the_least_trust_are_not_heard():
    image, caption = unit_vectors(30, 5, 0), unit_vectors(30, 5, 1)
    pairs = Pairs(torch.arange(30), torch.arange(30), 30, 30)
    trust = torch.where(torch.arange(30) < 15, 0.29, 0.9)
    settings = ScoreSection(neighbours=30, min_trust=0.3)  # type: ignore[call-arg]
    heard = ask_neighbours(image, caption, pairs, pairs, trust, settings, generator()).by_image.given_N
    silent = torch.where(torch.arange(30) < 15, 0.0, 0.9)
    expected = ask_neighbours(image, caption, pairs, pairs, silent, settings, generator()).by_image.given_N
    assert torch.equal(heard, expected)
    loud = settings.model_copy(update={"min_trust": 0.0})
    assert not torch.isclose(
        heard, ask_neighbours(image, caption, pairs, pairs, trust, loud, generator()).by_image.given_N
    ).all()


def test_without_one_trusted_pair_neighbours_say_nothing():
    pairs = Pairs(torch.arange(20), torch.arange(20), 20, 20)
    side = unit_vectors(20, 4, 0)
    found = ask_neighbours(
        side, side, pairs, pairs.select(torch.arange(5)), torch.zeros(20), SETTINGS, generator()
    )
    assert found.by_image.given_N.tolist() == [0.0] * 20
    assert found.by_caption.swaps_S.tolist() == [0.0] * 5


# --- the whole


def test_vectors_of_other_pairs_are_refused(trained, planted):
    judgement = trained.judgement(300)
    image, caption = unit_vectors(399, 8, 0), unit_vectors(1200, 8, 1)
    with pytest.raises(ShapeError) as caught:
        judge([Draw(judgement.given, judgement.swaps, image, caption)], planted.pairs, SETTINGS, 0)
    assert str(caught.value) == "image and caption vectors must have shape [400, D; 1200, D], got [399, 8]"


def held_out_of(trained: Trained, planted: Planted, whole_images: bool) -> HeldOut:
    return combine_held_out(
        trained.first.evidence,
        trained.folds.loss,
        trained.folds.distance,
        planted.pairs.image_N,
        trained.swaps.image_N,
        whole_images,
        0,
    )


def scored(
    judgement: Judgement, planted: Planted, *, whole_images: bool = False, seed: int = 0
) -> tuple[NoiseRate, dict[str, torch.Tensor]]:
    with torch.inference_mode():
        vectors = judgement.model.embed(planted.image_ID, planted.caption_CD)
        draw = Draw(judgement.given, judgement.swaps, *vectors)
        rate, columns = judge([draw], planted.pairs, SETTINGS, seed, whole_images=whole_images)
        far = reach(planted.pairs.num_images, planted.pairs.num_captions, SETTINGS)
        return rate, columns | look_around(*vectors, planted.pairs, far, seed)


@pytest.fixture(scope="module")
def found(trained: Trained, planted: Planted) -> tuple[NoiseRate, dict[str, torch.Tensor]]:
    """Rate and scores of the planted set."""
    return scored(trained.judgement(300), planted)


@pytest.fixture(scope="module")
def columns(found: tuple[NoiseRate, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Scores of the planted set."""
    return found[1]


def test_the_rate_is_near_the_truth(found, planted):
    rate, truth = found[0], planted.is_noisy_N.double().mean().item()
    assert rate.estimate == pytest.approx(truth, abs=0.05)
    assert not rate.is_weak


def test_scores_and_probabilities_find_planted_noise(columns, planted):
    noisy = planted.is_noisy_N
    assert swaps_auroc(columns["noise_score"][~noisy], columns["noise_score"][noisy]) > 0.95
    probability = columns["noise_probability"]
    assert ((probability >= 0) & (probability <= 1)).all()
    assert probability[noisy].mean() > 0.8
    assert probability[~noisy].mean() < 0.2
    assert probability.mean().item() == pytest.approx(noisy.double().mean().item(), abs=0.08)
    order = columns["noise_score"].argsort()
    assert (probability[order].diff() >= -1e-6).all(), "probability rises with the score"


def test_ranks_best_matches_and_margins_are_in_range(columns, planted):
    pairs = planted.pairs
    assert columns["caption_rank"].min() == columns["image_rank"].min() == 1
    assert columns["caption_rank"].max() <= pairs.num_captions
    assert columns["image_rank"].max() <= pairs.num_images
    clean = ~planted.is_noisy_N
    assert (
        columns["caption_rank"][clean].double().median() < columns["caption_rank"][~clean].double().median()
    )
    known = set(zip(pairs.image_N.tolist(), pairs.caption_N.tolist(), strict=True))
    for i, best in zip(pairs.image_N.tolist(), columns["best_caption"].tolist(), strict=True):
        assert (i, best) not in known
    assert torch.equal(columns["best_caption_margin"] > 0, columns["caption_rank"] > 1)
    assert all(len(values) == len(pairs) for values in columns.values())


def test_a_better_image_is_often_the_true_one(columns, planted):
    # Captions stand three by three behind their true image.
    noisy = planted.is_noisy_N
    found = columns["best_image"][noisy] == planted.pairs.caption_N[noisy] // 3
    assert found.double().mean() > 0.5


def test_the_same_seed_scores_alike(columns, trained, planted):
    for name, values in scored(trained.judgement(300), planted)[1].items():
        assert torch.equal(values, columns[name]), name


def test_under_whole_image_noise_every_pair_speaks_for_its_image():
    struck = planted_set(200, 3, 0.4, whole_images=True)
    found = train_robustly(inputs_of(struck, QUICK, 300), QUICK)
    rate, columns = scored(found.judgement(300), struck, whole_images=True)
    for name in ("noise_score", "noise_probability"):
        per_image = columns[name].view(200, 3)
        torch.testing.assert_close(per_image, per_image[:, :1].expand(-1, 3))
    score, noisy = columns["noise_score"], struck.is_noisy_N
    held_out = held_out_of(found, struck, True).evidence.given_N
    assert swaps_auroc(score[~noisy], score[noisy]) >= swaps_auroc(held_out[~noisy], held_out[noisy]) - 0.01
    assert rate.low <= noisy.double().mean() <= rate.high


def test_the_rate_is_the_mean_of_two_looks_and_its_interval_knows_how_they_differ(found, trained, planted):
    rate, held_out = found[0], held_out_of(trained, planted, False)
    other = 2 * rate.estimate - held_out.rate.estimate
    assert rate.low < min(rate.estimate, (rate.estimate + other) / 2)
    assert rate.high - rate.low >= abs(other - held_out.rate.estimate)


def test_several_draws_find_more_than_one(planted):
    settings = QUICK.model_copy(update={"steps": 60, "final_rounds": 1, "draws": 3})
    judgement = train(inputs_of(planted, settings, 300), settings)
    with torch.inference_mode():
        draws = [
            Draw(one.given, one.swaps, *one.model.embed(planted.image_ID, planted.caption_CD))
            for one in judgement.draws
        ]
        found = [judge(some, planted.pairs, SETTINGS, 0) for some in ([one] for one in draws)]
        rate, columns = judge(draws, planted.pairs, SETTINGS, 0)
    noisy = planted.is_noisy_N

    def auroc(columns: dict[str, torch.Tensor]) -> float:
        return swaps_auroc(columns["noise_score"][~noisy], columns["noise_score"][noisy])

    assert auroc(columns) > sum(auroc(one) for _, one in found) / 3
    assert columns["noise_probability"].mean().item() == pytest.approx(rate.estimate, abs=0.01)
    assert rate.low < noisy.double().mean() < rate.high
    assert rate.estimate == pytest.approx(noisy.double().mean().item(), abs=0.05)


@pytest.mark.parametrize(("blur", "gain"), [(0.5, 0.0), (2.0, -0.003), (None, -0.003)])
def test_aligned_encoders_own_cosine_helps_or_does_no_harm(blur, gain):
    # One space for both sides: good, poor, or of nothing but chance (None).
    generator = torch.Generator().manual_seed(4)
    base = planted_set(300, 3, 0.4)
    own = torch.randn(300, 40, generator=generator)
    caption = own.repeat_interleave(3, 0) + (blur or 0) * torch.randn(900, 40, generator=generator)
    if blur is None:
        own, caption = base.image_ID[:, :40], base.caption_CD
    aligned = replace(base, image_ID=own, caption_CD=caption)
    noisy, found = base.is_noisy_N, []
    for scale in (None, 20.0):
        inputs = replace(inputs_of(aligned, QUICK, 300), logit_scale=scale)
        judgement = train_robustly(inputs, QUICK).judgement(300)
        assert ("zero_shot_loss" in judgement.given) is (scale is not None)
        score = scored(judgement, aligned)[1]["noise_score"]
        found.append(swaps_auroc(score[~noisy], score[noisy]))
    assert found[1] >= found[0] + gain


@pytest.mark.parametrize(("kind", "gain"), [("shown", 0.01), ("small talk", -0.003), ("rare", 0.0)])
def test_what_words_tell_helps_or_does_no_harm(trained, planted, kind, gain):
    """Captions name what is at their true image, or anything, or nothing twice; heads see less than they could."""
    draw_words = np.random.default_rng(0)
    shown = planted.image_ID.numpy()[:, :12] > 5
    names = [f"thing{letter}" for letter in "abcdefghijkl"]

    def text(number: int) -> str:
        if kind == "rare":
            return f"caption {'x' * (number + 1)}"
        named = shown[number // 3] if kind == "shown" else draw_words.random(12) < 0.15
        return " ".join(name for name, is_named in zip(names, named, strict=True) if is_named)

    def blurred(values: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        return {
            name: one
            + 2 * judgement.given[name].std() * torch.randn(one.shape, generator=generator(seed + at))
            if name in ("first", "loss", "distance", "final_loss")
            else one
            for at, (name, one) in enumerate(values.items())
        }

    judgement, noisy = trained.judgement(300), planted.is_noisy_N
    with torch.inference_mode():
        vectors = judgement.model.embed(planted.image_ID, planted.caption_CD)
    draw = Draw(blurred(judgement.given, 0), blurred(judgement.swaps, 50), *vectors)
    both = planted.pairs.image_N.numpy(), planted.pairs.caption_N.numpy()
    captions = [text(number) for number in range(planted.pairs.num_captions)]
    words = WordMaps(planted.image_ID.numpy(), *both, captions, draw.right.numpy())
    found = []
    for told in (None, words):
        rate, columns = judge([draw], planted.pairs, SETTINGS, 0, words=told)
        found.append(swaps_auroc(columns["noise_score"][~noisy], columns["noise_score"][noisy]))
    assert found[1] >= found[0] + gain
    assert rate.estimate == pytest.approx(noisy.double().mean().item(), abs=0.06)
    struck = [
        judge([draw], planted.pairs, SETTINGS, 0, whole_images=True, words=told)[1]["noise_score"]
        for told in (None, words)
    ]
    assert torch.equal(*struck), "where noise strikes whole images, words are not asked"
    deaf = SETTINGS.model_copy(update={"words": False})
    silent = judge([draw], planted.pairs, deaf, 0, words=words)[1]["noise_score"]
    assert torch.equal(silent, judge([draw], planted.pairs, SETTINGS, 0)[1]["noise_score"])


def test_a_method_without_swaps_keeps_its_own_score_and_probability(trained, planted):
    num = len(planted.pairs)
    own = {"noise_score": torch.linspace(-1, 1, num), "noise_probability": torch.linspace(0, 0.5, num)}
    vectors = trained.model.embed(planted.image_ID, planted.caption_CD)
    rate, columns = judge([Draw(own, {}, *vectors)], planted.pairs, SETTINGS, 0)
    assert torch.equal(columns["noise_score"], own["noise_score"])
    assert torch.equal(columns["noise_probability"], own["noise_probability"])
    assert rate.estimate == pytest.approx(0.25, abs=1e-3)
    assert rate.low < rate.estimate < rate.high
    assert rate.evidence == "uncalibrated"
    assert not rate.is_weak
    clean = ~planted.is_noisy_N
    distance = columns["neighbour_distance"]
    assert swaps_auroc(distance[clean], distance[~clean]) > 0.8


@pytest.mark.slow
def test_a_set_without_noise_is_left_alone(planted_without_noise):
    found = train(inputs_of(planted_without_noise, QUICK, 300), QUICK)
    rate, columns = scored(found, planted_without_noise)
    probability = columns["noise_probability"]
    assert rate.estimate < 0.05
    assert (probability > 0.8).double().mean() < 0.05
