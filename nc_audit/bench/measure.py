"""One recipe on one corrupted corpus: trained, judged, and held against the truth.

Shapes: P = distinct pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nc_audit.bench import metrics
from nc_audit.bench.corpus import Corrupted
from nc_audit.calibrate import NoiseRate
from nc_audit.model import Model
from nc_audit.recipe import Recipe
from nc_audit.score import Draw, judge
from nc_audit.train import Inputs, train
from nc_audit.unlikely_words import WordMaps


@dataclass(frozen=True)
class Verdict:
    """What a recipe says of every distinct pair, in how many seconds, and its trained model."""

    rate: NoiseRate
    columns: dict[str, Tensor]
    model: Model
    facts: dict[str, Any]
    trusted_P: np.ndarray
    seconds: float


def run_recipe(
    corrupted: Corrupted,
    recipe: Recipe,
    *,
    logit_scale: float | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    trusted_share: float = 0.2,
    tokens: Callable[[Corrupted], dict[str, Tensor]] | None = None,
) -> Verdict:
    """Train by a recipe and judge, exactly as `nc-audit score` does after embedding.

    Args:
        corrupted: pairs with embeddings.
        recipe: its `train` and `score` sections count.
        logit_scale: of aligned encoders.
        precision: heads may multiply in, `fp32` or `bf16`.
        device: where heads may train.
        trusted_share: share of the truly clean pairs that is handed to methods which need trusted pairs, 0..1.
        tokens: local embeddings of the pairs, for methods that use them.
    """
    place = recipe.train.place(device)
    local = tokens(corrupted) if tokens and uses_tokens(recipe) else {}
    start = time.perf_counter()
    trusted = np.zeros(len(corrupted.pairs), bool)
    if recipe.train.needs_trusted:
        clean = np.flatnonzero(~corrupted.known_noise_P)
        pick = np.random.default_rng(recipe.train.seed).permutation(len(clean))
        trusted[clean[pick[: round(trusted_share * len(clean))]]] = True
    inputs = Inputs.prepare(
        corrupted.image_ID,
        corrupted.caption_CD,
        corrupted.pairs,
        recipe.train,
        recipe.score.candidates,
        logit_scale=logit_scale,
        precision=precision,
        device=place,
        trusted_N=torch.from_numpy(trusted) if trusted.any() else None,
        **local,
    )
    judgement = train(inputs, recipe.train)
    with torch.inference_mode():
        draws = [
            Draw(one.given, one.swaps, *one.model.to(place).embed(corrupted.image_ID, corrupted.caption_CD))
            for one in judgement.draws
        ]
        words = _words(corrupted, draws[0]) if draws[0].swaps and recipe.score.words else None
        rate, columns = judge(
            draws,
            corrupted.pairs,
            recipe.score,
            recipe.train.seed,
            whole_images=bool(judgement.facts.get("whole_images", False)),
            words=words,
        )
    seconds = time.perf_counter() - start
    return Verdict(
        rate, judgement.given | columns, judgement.model.to("cpu"), judgement.facts, trusted, seconds
    )


def _words(corrupted: Corrupted, draw: Draw) -> WordMaps:
    """What words say of the pairs, learnt from them as `nc-audit score` learns it."""
    return WordMaps(
        corrupted.image_ID.numpy(),
        corrupted.pairs.image_N.numpy(),
        corrupted.pairs.caption_N.numpy(),
        corrupted.folded.captions,
        draw.right.numpy(),
    )


def uses_tokens(recipe: Recipe) -> bool:
    """Whether the recipe's method makes use of local embeddings."""
    return recipe.train.method == "rrsitr" and recipe.train.rrsitr.local


def detection(verdict: Verdict, corrupted: Corrupted, recipe: Recipe) -> dict[str, float | None]:
    """How well the noise is found; trusted pairs do not count.

    Returns:
        true_rate; auroc, ap (None without noise or without clean pairs); f1 at probability .5 and f1_tag at
        the recipe's noisy_at; precision_at_rate (of the worst pairs, as many as there is noise); estimated_rate,
        rate_error (estimate - truth), covered (1 where the interval holds the truth); ece; tagged_noisy (share);
        noisy_precision; clean_purity; expected_auroc and its error; whole_images (1 where so judged); seconds.
    """
    counted = ~verdict.trusted_P
    truth = corrupted.known_noise_P[counted]
    score = verdict.columns["noise_score"].numpy()[counted].astype(np.float64)
    p = verdict.columns["noise_probability"].numpy()[counted].astype(np.float64)
    true_rate = float(truth.mean())
    tagged = p >= recipe.tag.noisy_at
    both = 0 < truth.sum() < len(truth)
    auroc = metrics.auroc(truth, score) if both else None
    rate = verdict.rate
    expected = None if np.isnan(rate.expected_auroc) else rate.expected_auroc
    return {
        "true_rate": true_rate,
        "auroc": auroc,
        "ap": metrics.average_precision(truth, score) if both else None,
        "f1": metrics.f1(truth, p > 0.5) if truth.any() else None,
        "f1_tag": metrics.f1(truth, tagged) if truth.any() else None,
        "precision_at_rate": metrics.precision_at_rate(truth, score) if truth.any() else None,
        "estimated_rate": rate.estimate,
        "rate_low": rate.low,
        "rate_high": rate.high,
        "rate_error": rate.estimate - true_rate,
        "covered": float(rate.low <= true_rate <= rate.high),
        "ece": metrics.expected_calibration_error(truth, p),
        "tagged_noisy": float(tagged.mean()),
        "noisy_precision": float(truth[tagged].mean()) if tagged.any() else None,
        "clean_purity": float(1 - truth[p <= recipe.tag.clean_at].mean())
        if (p <= recipe.tag.clean_at).any()
        else None,
        "expected_auroc": expected,
        "expected_auroc_error": None if expected is None or auroc is None else expected - auroc,
        "whole_images": float(bool(verdict.facts.get("whole_images", False))),
        "seconds": verdict.seconds,
    }
