from __future__ import annotations

import pytest
import torch
from judgement_checks import auroc, check_judgement, equal
from planted import QUICK, Planted, inputs_of

from nc_audit.methods.matching import Matches
from nc_audit.recipe import TsvcSection, build_recipe
from nc_audit.train import train
from nc_audit.train.hinge import View
from nc_audit.train.loop import Inputs, Judgement
from nc_audit.train.tsvc import ASSISTANT, COORDINATOR, MASTER, Hand, surest, train_tsvc, vectors

SHORT = QUICK.model_copy(update={"steps": 10, "epochs": 4, "tsvc": TsvcSection(warm_up_epochs=2)})


@pytest.fixture(scope="module")
def inputs(planted: Planted) -> Inputs:
    return inputs_of(planted, QUICK, 300)


@pytest.fixture(scope="module")
def judgement(inputs: Inputs) -> Judgement:
    return train_tsvc(inputs, QUICK.model_copy(update={"steps": 48}))


@pytest.fixture(scope="module")
def hand(inputs: Inputs, planted: Planted) -> Hand:
    """Three networks that know the truth, roughly."""
    generator = torch.Generator().manual_seed(0)
    hinge = 0.05 + 0.3 * planted.is_noisy_N.float()
    views = [
        View((hinge + 0.04 * torch.randn(len(hinge), generator=generator)).clamp_min(0), Matches.zeros(1))
        for _ in range(3)
    ]
    return Hand.of(views, *vectors(inputs, 64), TsvcSection())


def test_finds_planted_noise(judgement: Judgement, planted: Planted):
    given = judgement.given
    assert auroc(given["noise_score"], planted.is_noisy_N) > 0.93
    assert auroc(given["noise_probability"], planted.is_noisy_N) > 0.85


def test_the_judgement_is_complete(judgement: Judgement, inputs: Inputs):
    infinite = (-float("inf"), float("inf"))
    more = {"mi_variation": infinite, "soft_label": (0.0, 1.0)}
    more |= {"image_novelty": infinite, "caption_novelty": infinite}
    check_judgement(judgement, inputs, QUICK, more)
    given = judgement.given
    assert torch.equal(given["noise_score"], -given["mi_variation"])
    assert torch.equal(given["noise_probability"], 1 - given["soft_label"])


def test_equal_seeds_give_equal_bits_and_others_do_not(inputs: Inputs):
    torch.manual_seed(5)
    first = train(inputs, SHORT.model_copy(update={"method": "tsvc"}))
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert equal(first, train_tsvc(inputs, SHORT))
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(first, train_tsvc(inputs, SHORT.model_copy(update={"seed": 1})))


@pytest.mark.parametrize("noisy_too", [False, True])
def test_the_three_networks_get_different_pairs(hand: Hand, noisy_too):
    lessons = hand.lessons(TsvcSection(), noisy_too=noisy_too)
    streams = [lesson.trains_N for lesson in lessons]
    is_clean = hand.clean_N > 0.5
    assert torch.equal(streams[COORDINATOR], is_clean)
    assert torch.equal(streams[MASTER], is_clean | noisy_too)
    assert not (streams[ASSISTANT] & hand.core_N).any()
    assert streams[ASSISTANT][is_clean & ~hand.core_N].all()
    hopeful, left = (hand.variation_N[~is_clean & taken] for taken in (streams[2], ~streams[2]))
    assert len(hopeful) == pytest.approx((~is_clean).sum().item() / 2, abs=1)
    assert hopeful.min() >= left.max()
    assert (lessons[COORDINATOR].correspondence_N == 1).all()
    assert torch.equal(lessons[MASTER].correspondence_N, hand.label_N)
    assert torch.equal(lessons[ASSISTANT].correspondence_N, hand.variation_label_N)


def test_labels_of_clean_pairs_are_refined_and_the_variation_finds_noise(hand: Hand, planted: Planted):
    is_clean = hand.clean_N > 0.5
    assert (hand.label_N[is_clean] >= hand.clean_N[is_clean]).all()
    assert ((hand.label_N >= 0) & (hand.label_N <= 1)).all()
    assert auroc(-hand.variation_N, planted.is_noisy_N) > 0.93
    assert not planted.is_noisy_N[hand.core_N].any()
    assert hand.core_N.sum() == round(0.5 * int(is_clean.sum()))


def test_the_say_of_the_variation_moves_the_labels_of_noisy_pairs_only(inputs: Inputs, planted: Planted):
    hinge = [0.05 + scale * planted.is_noisy_N.float() for scale in (0.3, 0.2, 0.1)]
    views = [View(values, Matches.zeros(1)) for values in hinge]
    variation, assistant = (
        Hand.of(views, *vectors(inputs, 16), TsvcSection(variation_share=eta)) for eta in (1.0, 0.0)
    )
    is_clean = variation.clean_N > 0.5
    assert torch.equal(variation.label_N[is_clean], assistant.label_N[is_clean])
    assert torch.equal(variation.label_N[~is_clean], variation.variation_label_N[~is_clean])
    assert len(assistant.label_N[~is_clean].unique()) == 1


def test_the_surest_are_the_highest_posteriors_then_the_lowest_losses():
    clean, loss = torch.tensor([1.0, 1.0, 0.6, 1.0, 0.5]), torch.tensor([3.0, 1.0, 0.0, 2.0, 0.0])
    taken = [surest(clean, loss, share).nonzero().squeeze(1).tolist() for share in (0.01, 0.5, 0.75, 1.0)]
    assert taken == [[1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert not surest(torch.tensor([0.1, 0.5]), torch.zeros(2), 0.5).any()


def test_dimensions_leave_pairs_enough_for_covariances(inputs: Inputs):
    num = len(inputs.pairs)
    assert [side.shape for side in vectors(inputs, 7)] == [(num, 7)] * 2
    few = Inputs.prepare(
        inputs.image_ID, inputs.caption_CD, inputs.pairs.select(torch.arange(0, num, 10)), QUICK, 50
    )
    assert vectors(few, 64)[0].shape == (120, 7)


@pytest.mark.parametrize(
    "changed", [{"complementary_factor": 5.0}, {"variation_share": 1.0}, {"core_share": 0.9}]
)
def test_every_key_matters(inputs: Inputs, changed):
    settings = SHORT.model_copy(update={"tsvc": SHORT.tsvc.model_copy(update=changed)})
    found = train_tsvc(inputs, settings).given
    assert not torch.equal(found["soft_label"], train_tsvc(inputs, SHORT).given["soft_label"])


def test_the_recipe_selects_the_method():
    assert build_recipe(["tsvc"]).train.method == "tsvc"
