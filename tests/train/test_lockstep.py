from __future__ import annotations

import pytest
import torch
from planted import QUICK, planted_set

from nc_audit.errors import TrainingError
from nc_audit.methods import contrastive
from nc_audit.train import Inputs
from nc_audit.train.lockstep import Lockstep
from nc_audit.train.loop import Plan, Trainer, new_heads, seeded

SETTINGS = QUICK.model_copy(update={"steps": 12, "epochs": 3, "input_dropout": 0.0, "dropout": 0.0})


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    planted = planted_set(100, 3, 0.2)
    return Inputs.prepare(planted.image_ID, planted.caption_CD, planted.pairs, SETTINGS, 50)


def test_heads_side_by_side_train_as_they_would_alone(inputs):
    parts = [inputs.pairs.select(torch.arange(start, start + 200)) for start in (0, 50, 100)]
    plan = Plan.of(200, SETTINGS)
    weights = [torch.rand(200, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    with seeded(0):
        heads = [new_heads(inputs, SETTINGS) for _ in range(3)]
        together = Lockstep(heads, inputs, parts, plan, SETTINGS, 1.0, [5, 6, 7])
        for _ in range(plan.epochs):
            together.run_epoch(weights)
    with seeded(0):
        alone = [new_heads(inputs, SETTINGS) for _ in range(3)]
        for one, part, weight, seed in zip(alone, parts, weights, (5, 6, 7), strict=True):
            trainer = Trainer(one, inputs, part, plan, SETTINGS, 1.0, seed)

            def loss(at, trainer=trainer, weight=weight):
                cosine, image, caption = trainer.cosines(at)
                counts = contrastive.negatives_mask(image, caption)
                return (weight[at] * contrastive.in_batch_loss(trainer.heads.scale() * cosine, counts)).mean()

            for _ in range(plan.epochs):
                trainer.run_epoch(loss)
    for number, one in enumerate(alone):
        for found, expected in zip(heads[number].parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
        vectors = one.embed(inputs.image_head_ID, inputs.caption_head_CD)
        for found, expected in zip(together.embed(number), vectors, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        assert together.scale(number) == pytest.approx(one.scale().item(), rel=1e-3)


def test_a_loss_that_is_not_finite_is_told(inputs):
    heads = [new_heads(inputs, SETTINGS)]
    trainer = Lockstep(heads, inputs, [inputs.pairs], Plan.of(300, SETTINGS), SETTINGS, 1.0, [0])
    with pytest.raises(TrainingError, match=r"loss is nan at step 0 .*lower train.lr"):
        trainer.run_epoch([torch.full((len(inputs.pairs),), float("nan"))])
