from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.decisions import Decision
from nc_audit.errors import RecipeError
from nc_audit.pipeline import retag
from nc_audit.run import Run
from nc_audit.schema import PAIRS, SCORES, TAGS, TAGS_KNOWN, check_table
from nc_audit.tag import Thresholds, tag_scores, threshold_for_budget, threshold_for_precision

ORDER = {"clean": 0, "ambiguous": 1, "noisy": 2}
borders = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


def tables(
    probability: np.ndarray, is_ok: np.ndarray | None = None, **columns: Any
) -> tuple[pa.Table, pa.Table]:
    """A `scores` and a `pairs` table of that many rows; `noise_score` is the probability unless given."""
    num = len(probability)
    is_ok = np.ones(num, bool) if is_ok is None else is_ok
    given_columns = {
        "noise_probability": probability,
        "noise_score": probability,
        "caption_rank": np.ones(num, np.int32),
        "image_rank": np.ones(num, np.int32),
        "best_caption_margin": np.full(num, -0.1),
        "best_image_margin": np.full(num, -0.1),
        "relative_loss": np.full(num, 0.5),
        "swapped_entropy": np.full(num, 0.5),
        "neighbour_distance": np.full(num, 0.5),
    } | columns
    score_columns = []
    for field in SCORES:
        if field.name == "pair_id":
            score_columns.append(pa.array([f"p{i}" for i in range(num)]))
        elif field.name == "row":
            score_columns.append(pa.array(range(num), pa.int64()))
        elif field.name in given_columns:
            values = [v if ok else None for v, ok in zip(given_columns[field.name], is_ok, strict=True)]
            score_columns.append(pa.array(values, field.type))
        else:
            score_columns.append(pa.nulls(num, field.type))
    pair_values: dict[str, list[Any]] = {
        "row": list(range(num)),
        "pair_id": [f"p{i}" for i in range(num)],
        "source": ["captions.csv"] * num,
        "status": ["ok" if ok else "missing_image" for ok in is_ok],
        "status_detail": [None if ok else "no file a.png" for ok in is_ok],
    }
    pairs = pa.table([pa.array(pair_values.get(f.name, [None] * num), f.type) for f in PAIRS], schema=PAIRS)
    return pa.table(score_columns, schema=SCORES), pairs


def tag(probability: np.ndarray, low: float = 0.2, high: float = 0.8, **options: Any) -> list[str | None]:
    return tag_scores(*tables(probability), Thresholds(low, high), **options)["tag"].to_pylist()


# --- tags


@given(strategies.probabilities, strategies.seeds)
def test_every_ok_pair_has_exactly_one_tag_and_no_other_row_has_any(probability, seed):
    is_ok = np.random.default_rng(seed).random(len(probability)) < 0.7
    found = tag_scores(*tables(probability, is_ok), Thresholds(0.2, 0.8))
    check_table("tags", found)
    assert found.schema.equals(TAGS)
    assert found["row"].to_pylist() == list(range(len(probability)))
    for ok, one, by, reasons in zip(
        is_ok,
        found["tag"].to_pylist(),
        found["decided_by"].to_pylist(),
        found["reasons"].to_pylist(),
        strict=True,
    ):
        assert one in TAGS_KNOWN if ok else one is None
        assert by == ("model" if ok else None)
        if not ok:
            assert reasons == ["missing_image: no file a.png"]


def test_borders_belong_to_clean_and_to_noisy():
    # Powers of two, so that the float32 column holds the thresholds exactly.
    probability = np.array([0.0, 0.25, 0.2501, 0.5, 0.7499, 0.75, 1.0])
    assert tag(probability, 0.25, 0.75) == ["clean"] * 2 + ["ambiguous"] * 3 + ["noisy"] * 2
    assert tag(probability, 0.5, 0.5) == ["clean"] * 4 + ["noisy"] * 3


@given(strategies.probabilities, borders, borders)
def test_moving_a_threshold_moves_tags_one_way_only(probability, first, second):
    (low, high), (other_low, other_high) = first, second
    lower, upper = sorted([low, other_low]), sorted([high, other_high])
    # Both thresholds up: every tag stays or moves towards clean.
    before, after = tag(probability, lower[0], upper[0]), tag(probability, lower[1], upper[1])
    assert all(ORDER[b] >= ORDER[a] for b, a in zip(before, after, strict=True))


@given(strategies.probabilities, borders)
def test_tags_rise_with_the_probability(probability, thresholds):
    found = [ORDER[one] for one in tag(np.sort(probability), *thresholds)]
    assert found == sorted(found)


@given(strategies.probabilities)
def test_tagging_twice_changes_nothing(probability):
    scores, pairs = tables(probability)
    first = tag_scores(scores, pairs, Thresholds(0.2, 0.8))
    assert tag_scores(scores, pairs, Thresholds(0.2, 0.8)).equals(first, check_metadata=True)


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.1), (-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)])
def test_thresholds_out_of_order_are_refused(low, high):
    with pytest.raises(RecipeError) as caught:
        Thresholds(low, high)
    assert caught.value.message == f"thresholds clean_at {low:g} and noisy_at {high:g} are not in order"
    assert caught.value.hint == "0 <= clean_at <= noisy_at <= 1"


# --- budget


@given(strategies.scores(max_size=80), st.floats(0, 1))
def test_a_budget_is_never_exceeded_and_takes_the_worst(score, share):
    score = score.numpy()
    chosen = threshold_for_budget(score, share)
    assert chosen.sum() <= share * len(score) + 1e-9
    if chosen.any() and not chosen.all():
        assert score[chosen].min() > score[~chosen].max()
    num = int(share * len(score))
    ordered = np.sort(score)[::-1]
    if num and (num == len(score) or ordered[num] < ordered[num - 1]):
        assert chosen.sum() == num, "without a tie at the border the budget is spent"


@pytest.mark.parametrize(
    ("share", "num"), [(0.05, 5), (0.07, 7), (0.29, 29), (0.57, 57), (0.58, 58), (1.0, 100)]
)
def test_a_budget_without_ties_is_spent_to_the_pair(share, num):
    assert threshold_for_budget(np.arange(100.0), share).sum() == num


@given(strategies.probabilities, st.sampled_from([0.0, 0.05, 0.3, 1.0]), strategies.seeds)
def test_a_budget_counts_ok_rows_only(probability, budget, seed):
    is_ok = np.random.default_rng(seed).random(len(probability)) < 0.6
    found = tag_scores(*tables(probability, is_ok), Thresholds(0.2, 0.8), budget=budget)["tag"].to_pylist()
    assert found.count("noisy") <= budget * is_ok.sum() + 1e-9
    assert sum(one is not None for one in found) == is_ok.sum()


def test_a_budget_ranks_by_score_not_by_probability():
    scores, pairs = tables(np.array([0.9, 0.9, 0.1, 0.5]), noise_score=np.array([1.0, 2.0, 3.0, 0.0]))
    found = tag_scores(scores, pairs, Thresholds(0.2, 0.8), budget=0.5)["tag"].to_pylist()
    assert found == ["ambiguous", "noisy", "noisy", "ambiguous"]


# --- precision


@given(strategies.probabilities, st.floats(0, 1))
def test_precision_threshold_is_the_lowest_that_reaches_it(probability, precision):
    at = threshold_for_precision(probability, precision)
    means = {t: probability[probability >= t].mean() for t in np.unique(probability)}
    reached = [t for t, mean in means.items() if mean >= precision + 1e-12]
    if reached:
        assert at <= min(reached)
    if math.isfinite(at):
        assert means[at] >= precision - 1e-12
    else:
        assert not reached


def test_precision_threshold_by_hand():
    probability = np.array([1.0, 0.9, 0.9, 0.5, 0.1])
    assert threshold_for_precision(probability, 0.93) == 0.9
    assert threshold_for_precision(probability, 0.8) == 0.5
    assert threshold_for_precision(probability, 0.0) == 0.1
    assert threshold_for_precision(np.array([0.2]), 0.9) > 1
    # With only one of the two at .5 the precision would be .75.
    assert threshold_for_precision(np.array([1.0, 0.5, 0.5]), 0.7) == 1.0


# --- blind evidence


@given(strategies.probabilities)
def test_blind_evidence_makes_everything_ambiguous_and_says_so(probability):
    found = tag_scores(*tables(probability), Thresholds(0.2, 0.8), blind=True)
    assert set(found["tag"].to_pylist()) == {"ambiguous"}
    assert found["reasons"].to_pylist() == [
        ["the scores cannot tell given pairs from deliberate mismatches"]
    ] * len(probability)


# --- reasons


def test_reasons_are_what_a_person_can_check():
    scores, pairs = tables(
        np.array([0.1, 0.5, 0.95] + [0.1] * 8),
        caption_rank=np.array([5, 1, 1235] + [1] * 8),
        image_rank=np.array([5, 3, 1] + [1] * 8),
        best_caption=["a"] + [None] + ["two boats"] + [None] * 8,
        best_caption_margin=np.array([0.3, np.nan, 0.25] + [np.nan] * 8),
        best_image=["i", "b.png", "c.png"] + [None] * 8,
        best_image_margin=np.array([0.3, 0.1, -0.2] + [np.nan] * 8),
        relative_loss=np.array([0.1, 0.9, 1.31] + [0.1] * 8),
        swapped_entropy=np.array([0.95, 0.95, 0.95] + [0.1] * 8),
        neighbour_distance=np.array([0.5, 0.5, 0.9] + [0.5, 0.51] * 4),
    )
    found = tag_scores(scores, pairs, Thresholds(0.2, 0.8))
    assert found["tag"].to_pylist()[:3] == ["clean", "ambiguous", "noisy"]
    assert found["reasons"].to_pylist()[:3] == [
        [],
        [
            "evidence conflicts: 50% likely noise",
            "2 other images fit the caption better",
            "better image by 0.10: b.png",
            "generic: fits many others about as well",
        ],
        [
            "1,234 other captions fit the image better",
            "better caption by 0.25: two boats",
            "images and captions nearby contradict it",
            "loss at 131% of chance",
        ],
    ]


def test_a_set_without_one_ok_row_is_tagged_without_complaint():
    found = tag_scores(*tables(np.array([0.5, 0.5]), np.zeros(2, bool)), Thresholds(0.2, 0.8))
    assert found["tag"].null_count == 2


# --- tagging a run anew


@pytest.fixture
def run(tmp_path) -> Run:
    """A scored and tagged run of ten pairs."""
    made = Run(tmp_path / "run")
    scores, pairs = tables(np.array([0, 1, 1, 2, 4, 4, 5, 6, 7, 8]) / 8)
    made.write_table("pairs", pairs)
    made.write_table("scores", scores)
    made.write_table("tags", tag_scores(scores, pairs, Thresholds(0.2, 0.8)))
    rate = {"evidence": "good", "estimate": 0.4, "low": 0.3, "high": 0.5, "level": 0.9, "expected_auroc": 0.9}
    facts: dict[str, dict[str, Any]] = {
        "load": {},
        "embed": {"encoders": {}},
        "train": {"pairs": 10, "images": 10, "captions": 10, "whole_images": False},
        "score": {"noise_rate": rate},
        "tag": {"thresholds": {}},
    }
    for stage, stated in facts.items():
        made.commit(stage, stage, {}, 0.0, **stated)
    return made


def test_retag_by_thresholds_budget_and_precision(run):
    as_scored = {"clean": 3, "ambiguous": 5, "noisy": 2}
    assert retag(run)["tags"] == as_scored
    assert retag(run, clean_at=0.5, noisy_at=0.625)["tags"] == {"clean": 6, "ambiguous": 0, "noisy": 4}
    assert retag(run, budget=0.1)["tags"]["noisy"] == 1
    # The worst four hold (8 + 7 + 6 + 5) / 8 / 4 = .8125 noise, the worst three .875.
    assert retag(run, target_precision=0.85)["tags"] == {"clean": 3, "ambiguous": 4, "noisy": 3}
    assert retag(run, target_precision=0.81)["tags"]["noisy"] == 4
    assert retag(run)["tags"] == as_scored


def test_retag_with_a_precision_that_no_threshold_reaches_tags_nothing_noisy(run):
    scores, _ = tables(np.array([0, 1, 1, 2, 4, 4, 5, 6, 6, 6]) / 8)
    run.write_table("scores", scores)
    assert retag(run, target_precision=0.99)["tags"] == {"clean": 3, "ambiguous": 7, "noisy": 0}


def test_retag_leaves_the_scores_alone(run):
    before = (run.path / "scores.parquet").read_bytes()
    retag(run, clean_at=0.0, noisy_at=0.1)
    assert (run.path / "scores.parquet").read_bytes() == before


# --- what people decided


def decision(pair_id: str, what: str, reviewer: str = "ann") -> Decision:
    return Decision(pair_id, what, "new words" if what in ("fix", "rematch") else None, reviewer, "t")


@given(strategies.probabilities, strategies.seeds)
def test_people_win_over_the_model_and_leave_every_other_row_alone(probability, seed):
    rng = np.random.default_rng(seed)
    is_ok = rng.random(len(probability)) < 0.7
    given_tables = tables(probability, is_ok)
    decided = {
        f"p{at}": decision(f"p{at}", str(rng.choice(["keep", "drop", "fix", "rematch"])))
        for at in np.flatnonzero(rng.random(len(probability)) < 0.4)
    } | {"stranger": decision("stranger", "drop")}
    plain = tag_scores(*given_tables, Thresholds(0.2, 0.8)).to_pylist()
    found = tag_scores(*given_tables, Thresholds(0.2, 0.8), decisions=decided)
    check_table("tags", found)
    for before, after in zip(plain, found.to_pylist(), strict=True):
        one = decided.get(after["pair_id"])
        if one is None or before["tag"] is None:
            assert after == before
        else:
            assert after["tag"] == ("noisy" if one.decision == "drop" else "clean")
            assert after["decided_by"] == "ann"


def test_reasons_say_who_decided_and_what_the_model_said():
    probability = np.array([0.9, 0.5, 0.1, 0.9, 0.9, 0.1])
    decided = {
        f"p{at}": decision(f"p{at}", what)
        for at, what in enumerate(["keep", "keep", "keep", "drop", "fix", "rematch"])
    }
    found = tag_scores(*tables(probability), Thresholds(0.2, 0.8), decisions=decided)
    assert found["reasons"].to_pylist() == [
        ["kept by ann", "the model says noisy"],
        ["kept by ann", "the model says ambiguous"],
        ["kept by ann"],
        ["dropped by ann"],
        ["caption corrected by ann"],
        ["caption corrected by ann"],
    ]


@pytest.mark.parametrize("name", ["", "model"])
def test_nobody_decides_in_the_model_s_name(name):
    decided = {"p0": decision("p0", "drop", name)}
    found = tag_scores(*tables(np.array([0.1, 0.1])), Thresholds(0.2, 0.8), decisions=decided)
    assert found["decided_by"].to_pylist() == ["reviewer", "model"]


def test_half_a_character_in_a_decision_breaks_nothing():
    decided = {"p0": decision("p0", "drop", "a\ud800"), "p\udfff": decision("p\udfff", "drop")}
    found = tag_scores(*tables(np.array([0.1, 0.1])), Thresholds(0.2, 0.8), decisions=decided)
    assert found["decided_by"].to_pylist() == ["a\\ud800", "model"]


def test_a_budget_does_not_take_a_decision_back():
    decided = {"p0": decision("p0", "keep")}
    found = tag_scores(*tables(np.array([0.9, 0.8])), Thresholds(0.2, 0.8), budget=1.0, decisions=decided)
    assert found["tag"].to_pylist() == ["clean", "noisy"]
