from __future__ import annotations

import math

import pytest
import torch
from judgement_checks import auroc, check_judgement, equal
from planted import QUICK, Planted, inputs_of, planted_set

from nc_audit.errors import RecipeError
from nc_audit.methods.matching import Matches
from nc_audit.methods.mixture import clean_posterior
from nc_audit.recipe import SremSection, build_recipe
from nc_audit.train import train
from nc_audit.train.loop import Inputs, Judgement
from nc_audit.train.srem import Filtration, train_srem

SHORT = QUICK.model_copy(update={"steps": 10, "epochs": 4, "srem": SremSection(warm_up_epochs=2)})


@pytest.fixture(scope="module")
def inputs(planted: Planted) -> Inputs:
    return inputs_of(planted, QUICK, 300)


@pytest.fixture(scope="module")
def judgement(inputs: Inputs) -> Judgement:
    return train_srem(inputs, QUICK)


def test_finds_planted_noise(judgement: Judgement, planted: Planted):
    given = judgement.given
    assert auroc(given["noise_score"], planted.is_noisy_N) > 0.9
    assert given["weight"][~planted.is_noisy_N].mean() > given["weight"][planted.is_noisy_N].mean() + 0.2


def test_what_both_criteria_call_clean_is_purer_than_what_the_loss_alone_does():
    planted = planted_set(rate=0.6)
    given = train_srem(inputs_of(planted, QUICK, 300), QUICK).given
    by_loss = given["clean_posterior"] > 0.5
    both = by_loss & (given["energy_posterior"] > 0.5)
    noisy = planted.is_noisy_N.float()
    assert 100 < both.sum() < by_loss.sum()
    assert noisy[both].mean() < noisy[by_loss].mean() < 0.4


def test_the_judgement_is_complete(judgement: Judgement, inputs: Inputs):
    check_judgement(judgement, inputs, QUICK, {"energy_posterior": (0.0, 1.0)})
    given, trajectory = judgement.given, judgement.trajectory
    assert judgement.facts["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    torch.testing.assert_close(given["noise_score"], torch.stack(trajectory.losses[-3:]).mean(0))
    assert torch.equal(given["noise_score"], given["loss"])
    assert torch.equal(given["noise_probability"], 1 - clean_posterior(given["loss"]))
    torch.testing.assert_close(given["weight"], torch.stack(trajectory.weights[3:]).mean(0))


def test_no_match_is_learnt_in_the_warm_up_and_only_clean_ones_after(judgement: Judgement):
    weights, divisions = judgement.trajectory.weights, judgement.trajectory.divisions
    assert not any(weights[epoch].any() for epoch in range(QUICK.srem.warm_up_epochs))
    for epoch in range(QUICK.srem.warm_up_epochs, QUICK.epochs):
        assert torch.equal(weights[epoch] == 1, divisions[epoch - 1] == 0)


def test_equal_seeds_give_equal_bits_and_others_do_not(inputs: Inputs):
    torch.manual_seed(5)
    first = train(inputs, SHORT.model_copy(update={"method": "srem"}))
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert equal(first, train_srem(inputs, SHORT))
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(first, train_srem(inputs, SHORT.model_copy(update={"seed": 1})))


@pytest.mark.parametrize(
    "changed",
    [
        {"entropy_weight": "decided"},
        {"complementary_temperature": 1e9},
        {"complementary_factor": 0.0},
        {"energy_factor": 5.0},
        {"energy_quantiles": (0.1, 0.9)},
        {"passes": 1},
    ],
)
def test_every_key_matters(inputs: Inputs, changed):
    settings = SHORT.model_copy(update={"srem": SHORT.srem.model_copy(update=changed)})
    found = train_srem(inputs, settings).given
    assert not torch.equal(found["noise_score"], train_srem(inputs, SHORT).given["noise_score"])
    assert found["noise_score"].isfinite().all()


def test_a_warm_up_that_never_ends_learns_no_match(inputs: Inputs):
    settings = SHORT.model_copy(update={"srem": SremSection(warm_up_epochs=9)})
    assert not train_srem(inputs, settings).given["weight"].any()


def test_the_split_needs_both_criteria_and_keeps_its_bounds(inputs: Inputs):
    loss = torch.tensor([0.0, 0.1, 0.0, 5.0, 5.1, 5.2])
    energy = torch.tensor([-9.0, -9.1, -3.0, -9.0, -3.1, -3.0])
    zeros = torch.zeros(6)
    matches = Matches(zeros, loss, energy, zeros, zeros)
    split = Filtration.of(matches, inputs.candidates, None, SremSection())
    assert split.is_clean().tolist() == [True, True, False, False, False, False]
    assert split.division().tolist() == [0, 0, 1, 1, 2, 2]
    low, high = torch.quantile(energy + math.log(300), torch.tensor([0.25, 0.75])).tolist()
    assert split.bounds == pytest.approx((low, high), abs=1e-4)
    again = Filtration.of(matches, inputs.candidates, (1.0, 2.0), SremSection())
    assert again.bounds == (1.0, 2.0)


def test_the_recipe_selects_the_method():
    assert build_recipe(["srem"]).train.method == "srem"


@pytest.mark.parametrize("quantiles", ["[0.7, 0.3]", "[0.5, 0.5]", "[-0.1, 0.5]", "[0.5, 1.5]"])
def test_quantiles_that_do_not_rise_are_refused(quantiles):
    with pytest.raises(RecipeError) as caught:
        build_recipe(["srem"], [f"train.srem={{energy_quantiles = {quantiles}}}"])
    assert caught.value.message == (
        "the recipe has 1 problem: train.srem: energy_quantiles must be two rising shares, 0..1"
    )
