from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from nc_audit.bench.metrics import (
    auroc,
    average_precision,
    expected_calibration_error,
    f1,
    precision_at_rate,
    reliability,
)
from nc_audit.errors import ShapeError


@st.composite
def scored(draw, both: bool = True):
    """Truth and scores with many ties; at least one pair of each kind when `both`."""
    num, seed = draw(st.integers(2, 50)), draw(seeds)
    rng = np.random.default_rng(seed)
    noisy = rng.random(num) < draw(st.floats(0.1, 0.9))
    if both:
        noisy[:2] = [True, False]
    return noisy, rng.integers(0, draw(st.integers(2, 100)), num) / 8


@given(scored())
def test_auroc_is_the_share_of_ordered_couples(case):
    noisy, score = case
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, is_a in zip(score, noisy, strict=True)
        if is_a
        for b, is_b in zip(score, noisy, strict=True)
        if not is_b
    ]
    assert auroc(noisy, score) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert auroc(noisy, score) + auroc(noisy, -score) == pytest.approx(1, abs=1e-12)


@given(scored())
def test_average_precision_sums_steps_over_thresholds(case):
    noisy, score = case
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        called = [s >= threshold for s in score]
        hits = sum(c and n for c, n in zip(called, noisy, strict=True))
        recall = hits / sum(noisy)
        total += (recall - recall_before) * hits / sum(called)
        recall_before = recall
    assert average_precision(noisy, score) == pytest.approx(total, abs=1e-12)


@given(scored(), st.floats(0, 12))
def test_f1_is_the_harmonic_mean(case, threshold):
    noisy, score = case
    called = score > threshold
    hits = sum(c and n for c, n in zip(called, noisy, strict=True))
    if hits == 0:
        assert f1(noisy, called) == 0
        return
    precision, recall = hits / sum(called), hits / sum(noisy)
    assert f1(noisy, called) == pytest.approx(2 / (1 / precision + 1 / recall), abs=1e-12)


@given(scored(), st.one_of(st.none(), st.floats(0, 1)))
def test_precision_at_rate_is_what_shuffled_sorting_gives_on_average(case, rate):
    noisy, score = case
    num = int(noisy.sum()) if rate is None else round(rate * len(score))
    if num == 0:
        assert math.isnan(precision_at_rate(noisy, score, rate))
        return
    # Best and worst order of ties bound it; the exact average counts each tied pair by its chance to be drawn.
    chance = np.zeros(len(score))
    for i, s in enumerate(score):
        above, tied = sum(t > s for t in score), sum(t == s for t in score)
        chance[i] = min(1.0, max(0.0, (num - above) / tied))
    assert chance.sum() == pytest.approx(num)
    assert precision_at_rate(noisy, score, rate) == pytest.approx(float(chance @ noisy) / num, abs=1e-12)


@given(scored(), seeds)
def test_the_order_of_pairs_has_no_say(case, seed):
    noisy, score = case
    order = np.random.default_rng(seed).permutation(len(score))
    for metric in (auroc, average_precision, precision_at_rate):
        assert metric(noisy[order], score[order]) == pytest.approx(metric(noisy, score), abs=1e-12)


@given(scored(both=False), st.integers(1, 20))
def test_calibration_equals_loops_over_bins(case, num_bins):
    noisy, score = case
    # Edges of the bins, and both ends, are among the probabilities.
    probability = np.clip(score / score.max(), 0, 1) if score.max() > 0 else score
    table = reliability(noisy, probability, num_bins)
    error = 0.0
    for k in range(num_bins):
        low, high = k / num_bins, (k + 1) / num_bins
        inside = [low <= p and (p < high or k == num_bins - 1) for p in probability]
        count = sum(inside)
        assert (table.low[k], table.high[k], table.count[k]) == (low, high, count)
        if not count:
            assert math.isnan(table.stated[k])
            assert math.isnan(table.true[k])
            continue
        stated = sum(p for p, i in zip(probability, inside, strict=True) if i) / count
        true = sum(n for n, i in zip(noisy, inside, strict=True) if i) / count
        assert table.stated[k] == pytest.approx(stated, abs=1e-12)
        assert table.true[k] == pytest.approx(true, abs=1e-12)
        error += count / len(probability) * abs(stated - true)
    assert expected_calibration_error(noisy, probability, num_bins) == pytest.approx(error, abs=1e-12)


def test_honest_probabilities_are_calibrated_and_wrong_ones_are_not():
    rng = np.random.default_rng(0)
    probability = rng.random(20_000)
    noisy = rng.random(20_000) < probability
    assert expected_calibration_error(noisy, probability) < 0.02
    assert expected_calibration_error(noisy, 1 - probability) == pytest.approx(0.5, abs=0.02)


def test_where_nothing_can_be_said_there_is_no_number():
    all_clean, all_noisy, score = [False] * 3, [True] * 3, [0.1, 0.2, 0.3]
    assert math.isnan(auroc(all_clean, score))
    assert math.isnan(auroc(all_noisy, score))
    assert math.isnan(average_precision(all_clean, score))
    assert average_precision(all_noisy, score) == 1
    assert math.isnan(precision_at_rate(all_clean, score))
    assert math.isnan(precision_at_rate(all_noisy, score, 0.1))
    assert math.isnan(f1(all_clean, all_clean))
    assert f1(all_clean, all_noisy) == 0
    nothing = np.zeros(0)
    assert math.isnan(expected_calibration_error(nothing.astype(bool), nothing))


def test_lengths_must_agree_and_the_truth_comes_first():
    with pytest.raises(ShapeError) as caught:
        auroc([True, False], [0.5])
    assert str(caught.value) == "scores must have shape [2], got [1]"
    with pytest.raises(ShapeError) as caught:
        reliability([[True]], [[0.5]])
    assert str(caught.value) == "the truth must have shape [N], got [1, 1]"
    with pytest.raises(AssertionError, match="the truth comes first, as bool"):
        auroc([0.1, 0.2], [True, False])
    with pytest.raises(AssertionError, match="calls are bool"):
        f1([True, False], [0.1, 0.2])
