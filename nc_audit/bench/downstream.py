"""The proof of the pudding: plain models trained on raw and on cleaned pairs, compared by retrieval on clean ones.

A plain model is contrastive heads with uniform weights, the same for every way of preparing the pairs: same steps,
same batches per step, same initialisation.

Shapes: P = distinct pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nc_audit.bench.retrieval import recall_at_k
from nc_audit.recipe import Recipe
from nc_audit.train.lockstep import Lockstep
from nc_audit.train.loop import Inputs, Plan, new_heads

if TYPE_CHECKING:
    from nc_audit.bench.corpus import Corrupted, Split
    from nc_audit.bench.measure import Verdict


def downstream(
    verdict: Verdict, corrupted: Corrupted, test: Split, recipe: Recipe
) -> dict[str, float | None]:
    """Mean recall of plain models, per cent, by how their training pairs were prepared.

    Returns:
        raw: everything as it is. drop_noisy: what `export --drop noisy` keeps. reweight: everything, with the weight
        of `export --reweight`. random_drop: as many dropped, by lot. oracle: what is truly clean. recovered: share of
        the gap between raw and oracle that drop_noisy closes, 1 = all; None where there is no gap.
    """
    num, seed = len(corrupted.pairs), recipe.train.seed
    probability = verdict.columns["noise_probability"]
    noisy = (probability >= recipe.tag.noisy_at).numpy()
    by_lot = np.zeros(num, bool)
    by_lot[np.random.default_rng(seed).permutation(num)[: int(noisy.sum())]] = True
    keep = {
        "raw": np.ones(num, bool),
        "drop_noisy": ~noisy,
        "reweight": np.ones(num, bool),
        "random_drop": ~by_lot,
        "oracle": ~corrupted.known_noise_P,
    }
    result: dict[str, float] = {}
    for name, kept in keep.items():
        weight = (1 - probability).clamp(0, 1) if name == "reweight" else torch.ones(num)
        result[name] = plain_recall(corrupted, test, torch.from_numpy(kept), weight, recipe, seed)
    raw, oracle, cleaned = result["raw"], result["oracle"], result["drop_noisy"]
    gap = oracle - raw
    return result | {"recovered": (cleaned - raw) / gap if gap > 0 else None}


def plain_recall(
    corrupted: Corrupted, test: Split, kept_P: Tensor, weight_P: Tensor, recipe: Recipe, seed: int
) -> float:
    """Mean recall on the test split of plain heads trained on some pairs with some weights, per cent."""
    settings = recipe.train
    inputs = Inputs.prepare(
        corrupted.image_ID, corrupted.caption_CD, corrupted.pairs, settings, recipe.score.candidates
    )
    at = kept_P.nonzero().squeeze(1)
    weight = weight_P[at] / weight_P[at].mean().clamp_min(1e-9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = new_heads(inputs, settings)
        trainer = Lockstep(
            [heads],
            inputs,
            [corrupted.pairs.select(at)],
            Plan.of(len(corrupted.pairs), settings),
            settings,
            settings.final_weight_decay,
            [seed + 1],
        )
        for _ in range(trainer.plan.epochs):
            trainer.run_epoch([weight])
    heads.eval()
    with torch.inference_mode():
        image, caption = heads.embed(
            inputs.image_projection(test.image_ID), inputs.caption_projection(test.caption_CD)
        )
    return recall_at_k(image, caption, test.pairs.image_N, test.pairs.caption_N).mean
