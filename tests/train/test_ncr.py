from __future__ import annotations

import pytest
import torch
from judgement_checks import auroc, check_judgement, equal
from planted import QUICK, Planted, inputs_of

from nc_audit.methods.contrastive import negatives_mask
from nc_audit.methods.matching import Matches
from nc_audit.methods.soft_margin import hinge_loss, margin_prediction, soft_margin_loss
from nc_audit.recipe import NcrSection, build_recipe
from nc_audit.train import train
from nc_audit.train.hinge import Lesson, View, batched_hinge, lesson_loss, network
from nc_audit.train.loop import Inputs, Judgement, Plan
from nc_audit.train.ncr import co_teach, train_ncr

SHORT = QUICK.model_copy(update={"steps": 10, "epochs": 4, "ncr": NcrSection(warm_up_epochs=2)})


@pytest.fixture(scope="module")
def inputs(planted: Planted) -> Inputs:
    return inputs_of(planted, QUICK, 300)


@pytest.fixture(scope="module")
def judgement(inputs: Inputs) -> Judgement:
    return train_ncr(inputs, QUICK)


def test_finds_planted_noise(judgement: Judgement, planted: Planted):
    given = judgement.given
    assert auroc(given["noise_score"], planted.is_noisy_N) > 0.9
    assert (given["noise_probability"][planted.is_noisy_N] > 0.5).float().mean() > 0.7
    assert (given["noise_probability"][~planted.is_noisy_N] < 0.5).float().mean() > 0.8
    assert given["weight"][~planted.is_noisy_N].mean() > given["weight"][planted.is_noisy_N].mean() + 0.2


def test_the_judgement_is_complete(judgement: Judgement, inputs: Inputs):
    check_judgement(judgement, inputs, QUICK, {"noise_score": (0.0, 1.001)})
    assert judgement.facts["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert torch.equal(judgement.given["noise_probability"], 1 - judgement.given["clean_posterior"])


def test_ties_of_the_posterior_are_broken_and_no_order_is_turned(judgement: Judgement):
    score, probability = judgement.given["noise_score"], judgement.given["noise_probability"]
    assert len(score.unique()) > len(probability.unique())
    added = score - probability
    assert added.min() >= -1e-7
    assert added.max() <= 1e-3 + 1e-6


def test_equal_seeds_give_equal_bits_and_others_do_not(inputs: Inputs):
    torch.manual_seed(5)
    first = train(inputs, SHORT.model_copy(update={"method": "ncr"}))
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert equal(first, train_ncr(inputs, SHORT))
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(first, train_ncr(inputs, SHORT.model_copy(update={"seed": 1})))


def test_every_pair_trains_in_the_warm_up_and_noisy_ones_join_late(judgement: Judgement):
    weights = judgement.trajectory.weights
    assert all((weights[epoch] == 1).all() for epoch in range(QUICK.ncr.warm_up_epochs))
    # Six epochs: from the fourth on pairs called noisy train with what is predicted of them.
    called_noisy = [division == 2 for division in judgement.trajectory.divisions]
    assert (weights[3][called_noisy[2]] > 0).any()
    assert weights[5][called_noisy[4]].mean() < 0.4


def test_noisy_pairs_never_train_where_the_recipe_says_so(inputs: Inputs):
    own = NcrSection(warm_up_epochs=2, noisy_from=1.0)
    found = train_ncr(inputs, SHORT.model_copy(update={"ncr": own})).trajectory
    for epoch in range(own.warm_up_epochs, SHORT.epochs):
        # A pair is called noisy by the mean posterior, so one network may still train on it.
        assert (found.weights[epoch][found.divisions[epoch - 1] == 2] <= 0.5).all()


def view(hinge: list[float]) -> View:
    return View(torch.tensor(hinge), Matches.zeros(len(hinge)))


@pytest.mark.parametrize("noisy_too", [False, True])
def test_each_network_learns_from_the_split_of_the_other(noisy_too):
    clean = [torch.tensor([0.9, 0.1, 0.8]), torch.tensor([0.7, 0.6, 0.0])]
    views = [view([0.0, 0.3, 0.1]), view([0.1, 0.0, 0.4])]
    own = NcrSection(top_share=0.4)
    first, second = co_teach(clean, views, own, noisy_too=noisy_too)
    assert first.trains_N.tolist() == [True, True, noisy_too]
    assert second.trains_N.tolist() == [True, noisy_too, True]
    predicted = [margin_prediction(v.hinge_N, 0.2, 0.4) for v in views]
    both = (predicted[0] + predicted[1]) / 2
    expected = [0.7 + 0.3 * predicted[0][0], 0.6 + 0.4 * predicted[0][1], both[2]]
    torch.testing.assert_close(first.correspondence_N, torch.stack(expected))
    expected = [0.9 + 0.1 * predicted[1][0], both[1], 0.8 + 0.2 * predicted[1][2]]
    torch.testing.assert_close(second.correspondence_N, torch.stack(expected))


def test_pairs_that_do_not_train_are_negatives_only(inputs: Inputs):
    trainer = network(inputs, QUICK, 0.07, Plan.of(len(inputs.pairs), QUICK), 1)
    trainer.heads.eval()
    num, at = len(inputs.pairs), torch.arange(0, 600, 10)
    trains = torch.zeros(num, dtype=torch.bool)
    assert lesson_loss(trainer, Lesson(torch.ones(num), trains), 0.2, 10.0, at) == 0
    trains[at[:30]] = True
    some = lesson_loss(trainer, Lesson(torch.ones(num), trains), 0.2, 10.0, at)
    trains[at[30:]], trains[at[:30]] = True, False
    others = lesson_loss(trainer, Lesson(torch.ones(num), trains), 0.2, 10.0, at)
    every = lesson_loss(trainer, Lesson.everything(num), 0.2, 10.0, at)
    torch.testing.assert_close((some + others) / 2, every)


@pytest.mark.parametrize("power", [2.0, 10.0])
def test_doubtful_pairs_have_less_margin(inputs: Inputs, power):
    trainer = network(inputs, QUICK, 0.07, Plan.of(len(inputs.pairs), QUICK), 1)
    trainer.heads.eval()
    num, at = len(inputs.pairs), torch.arange(0, 600, 10)
    doubt = Lesson(torch.full((num,), 0.5), torch.ones(num, dtype=torch.bool))
    cosine, image, caption = trainer.cosines(at)
    margin = 0.2 * (power**0.5 - 1) / (power - 1)
    expected = soft_margin_loss(cosine, negatives_mask(image, caption), torch.full((60,), margin)).mean()
    torch.testing.assert_close(lesson_loss(trainer, doubt, 0.2, power, at), expected)


def test_the_logit_scale_is_fixed(inputs: Inputs):
    trainer = network(inputs, QUICK, 0.05, Plan.of(len(inputs.pairs), QUICK), 1)
    trainer.run_epoch(lambda at: trainer.heads.scale() * trainer.cosines(at)[0].mean())
    assert trainer.heads.scale().item() == pytest.approx(20.0, rel=1e-5)


@pytest.mark.parametrize("batch", [7, 50, 10_000])
def test_the_hinge_in_batches_reaches_every_pair(planted: Planted, batch):
    image = torch.nn.functional.normalize(planted.image_ID[:, :40], dim=1)
    caption = torch.nn.functional.normalize(planted.caption_CD, dim=1)
    pairs = planted.pairs.select(torch.arange(200))
    generator = torch.Generator().manual_seed(0)
    hinge = batched_hinge(image, caption, pairs, batch, 0.2, generator)
    assert hinge.shape == (200,)
    assert ((hinge >= 0) & (hinge < 3)).all()
    if batch >= 200:
        cosine = image[pairs.image_N] @ caption[pairs.caption_N].T
        other = pairs.image_N[:, None] != pairs.image_N[None, :]
        torch.testing.assert_close(hinge, hinge_loss(cosine, other, 0.2))


def test_the_division_follows_the_posteriors(judgement: Judgement):
    last = judgement.trajectory.divisions[-1]
    assert torch.equal(last == 0, judgement.given["clean_posterior"] > 0.5)


def test_the_recipe_selects_the_method_as_published():
    settings = build_recipe(["ncr"]).train
    assert settings.method == "ncr"
    assert (settings.ncr.margin, settings.ncr.power, settings.ncr.noisy_from) == (0.2, 10.0, 0.5)
