"""What a reviewer sees, decides, undoes; samples, conflicts, and tags that follow."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_run import Pair
from review_runs import ids_of, lines_of, pairs_of, review_of, run_of

from nc_audit.errors import DatasetError, RunError
from nc_audit.pipeline import apply_decisions, retag
from nc_audit.report import report_rows
from nc_audit.review import review_facts, statement
from nc_audit.review.audit import draw_sample, figures, figures_json, wilson
from nc_audit.review.session import check_reviewer
from nc_audit.run import Run

# --- the queue


def test_all_pairs_come_worst_first_and_equal_ones_once(tmp_path):
    twice = [*pairs_of(6), Pair(0, "caption number 0", tag="noisy", probability=0.95, duplicate_of=0)]
    twice.append(Pair(9, None, status="missing_image"))
    review = review_of(run_of(tmp_path / "run", twice))
    shown = review.page(0, 50, "ann")
    assert [pair["row"] for pair in shown] == [0, 3, 1, 4, 2, 5]
    assert [pair["copies"] for pair in shown] == [2, 1, 1, 1, 1, 1]
    assert shown[0]["best_image_id"] == "image0000"


def test_tags_narrow_the_queue(tmp_path):
    run = run_of(tmp_path / "run")
    assert [p["tag"] for p in review_of(run, tags=["ambiguous"]).page(0, 9, "ann")] == ["ambiguous"] * 2
    with pytest.raises(DatasetError) as caught:
        review_of(run, tags=["noisey"])
    assert (caught.value.message, caught.value.hint) == (
        "--tag: there is no tag 'noisey'",
        "did you mean noisy?",
    )


def test_a_tag_without_a_pair_is_told(tmp_path):
    run = run_of(tmp_path / "run", [Pair(0, probability=0.1)])
    with pytest.raises(DatasetError) as caught:
        review_of(run, tags=["noisy"])
    assert caught.value.message == "nothing to review: no pair is tagged noisy"


def test_a_run_that_is_not_tagged_cannot_be_reviewed(tmp_path):
    run = run_of(tmp_path / "run")
    del run.manifest["stages"]["tag"]
    with pytest.raises(RunError, match="stage tag is not done"):
        review_of(run)


def test_unseen_characters_are_shown_and_the_caption_itself_is_kept(tmp_path):
    nasty = "a\u202eb<script>\x1b[2J\n"
    review = review_of(run_of(tmp_path / "run", [Pair(0, nasty)]))
    pair = review.page(0, 1, "ann")[0]
    assert pair["caption"] == nasty
    assert pair["caption_shown"] == "a\\u202eb<script>\\x1b[2J\\n"


def test_what_a_stranger_wrote_into_the_file_is_shown_and_does_no_harm(tmp_path):
    run = run_of(tmp_path / "run")
    odd = {
        "pair_id": ids_of()[0],
        "decision": "keep",
        "caption": [1],
        "reviewer": "\x1b[2J\ud800",
        "time": {},
    }
    (run.path / "decisions.jsonl").write_text(json.dumps(odd) + "\n")
    review = review_of(run)
    review.decide(ids_of()[0], "drop", None, "ann")
    assert review.page(0, 1, "ann")[0]["others"][0]["reviewer"] == "\\x1b[2J\\ud800"
    assert json.dumps(review.page(0, 1, "ann"))
    assert apply_decisions(run)["decided_rows"] == 1


# --- deciding


def test_undo_takes_back_the_last_decision_and_says_which(tmp_path):
    run = run_of(tmp_path / "run")
    review, (first, second, *_) = review_of(run), ids_of()
    review.decide(first, "keep", None, "ann")
    review.decide(second, "drop", None, "ann")
    assert review.undo("ann")["pair"]["pair_id"] == second
    assert review.undo("ann")["pair"]["pair_id"] == first
    assert review.undo("ann")["pair"] is None
    assert [line["decision"] for line in lines_of(run)] == ["keep", "drop", "undo", "undo"]


def test_a_new_review_goes_on_where_the_last_one_stopped(tmp_path):
    run = run_of(tmp_path / "run")
    for pair_id in ids_of()[:1]:
        review_of(run).decide(pair_id, "drop", None, "ann")
    review = review_of(Run.open(run.path))
    assert review.state("ann")["begin"] == 1
    assert review.state("bob")["begin"] == 0
    assert review.page(0, 1, "ann")[0]["mine"]["decision"] == "drop"


def test_views_find_what_they_name(tmp_path):
    review, ids = review_of(run_of(tmp_path / "run")), ids_of()
    queue = review.queue.pair_ids
    review.decide(queue[1], "keep", None, "ann")
    review.decide(queue[1], "drop", None, "bob")
    review.decide(queue[4], "keep", None, "ann")
    assert len(ids) == len(queue)
    assert review.find(0, 1, "open", "ann") == 2
    assert review.find(0, 1, "decided", "ann") == 1
    assert review.find(1, 1, "decided", "ann") == 4
    assert review.find(5, -1, "conflicts", "ann") == 1
    assert review.find(1, 1, "conflicts", "ann") is None
    assert review.find(5, 1, "all", "ann") is None


def test_others_decisions_show_after_ones_own(tmp_path):
    review, first = review_of(run_of(tmp_path / "run")), ids_of()[0]
    review.decide(first, "keep", None, "bob")
    assert review.page(0, 1, "ann")[0]["others"] == []
    pair = review.decide(first, "drop", None, "ann")["pair"]
    assert [(one["reviewer"], one["decision"]) for one in pair["others"]] == [("bob", "keep")]
    assert pair["conflict"]
    assert pair["stands"] == "ann"


@pytest.mark.parametrize("name", ["", "  ", "model", "a\x1b[2J", "x" * 61])
def test_a_reviewer_needs_a_name(name):
    with pytest.raises(DatasetError):
        check_reviewer(name)
    assert check_reviewer(" José María ") == "José María"


# --- tags follow


def test_tags_follow_decisions_and_name_who_took_them(tmp_path):
    run = run_of(tmp_path / "run")
    noisy, unsure, clean, other, fixed, _ = ids_of()
    review = review_of(run, "ann")
    review.decide(noisy, "keep", None, "ann")
    review.decide(clean, "drop", None, "bob")
    review.decide(fixed, "fix", "what it shows", "ann")
    review.decide(other, "rematch", None, "ann")
    summary = apply_decisions(run)
    rows = {row.pair_id: (row.tag, row.decided_by, row.reasons) for row in report_rows(run)}
    assert rows[noisy] == ("clean", "ann", ["kept by ann", "the model says noisy"])
    assert rows[clean] == ("noisy", "bob", ["dropped by bob"])
    assert rows[fixed] == rows[other] == ("clean", "ann", ["caption corrected by ann"])
    assert rows[unsure][:2] == ("ambiguous", "model")
    assert summary["decided_rows"] == 4
    assert summary["tags"] == {"clean": 4, "ambiguous": 1, "noisy": 1}


def test_tags_follow_again_when_a_decision_is_undone(tmp_path):
    run = run_of(tmp_path / "run")
    review = review_of(run)
    review.decide(ids_of()[0], "keep", None, "ann")
    apply_decisions(run)
    review.undo("ann")
    summary = apply_decisions(run)
    assert summary["tags"] == {"clean": 2, "ambiguous": 2, "noisy": 2}
    assert set(run.table("tags")["decided_by"].to_pylist()) == {"model"}


def test_applying_twice_changes_nothing(tmp_path):
    run = run_of(tmp_path / "run")
    review_of(run).decide(ids_of()[0], "keep", None, "ann")
    apply_decisions(run)
    before = (run.path / "tags.parquet").stat().st_mtime_ns, run.stage("tag")
    apply_decisions(run)
    assert ((run.path / "tags.parquet").stat().st_mtime_ns, run.stage("tag")) == before


def test_new_thresholds_leave_decisions_in_force(tmp_path):
    run = run_of(tmp_path / "run")
    review_of(run).decide(ids_of()[0], "keep", None, "ann")
    assert retag(run, budget=1.0)["tags"] == {"clean": 1, "ambiguous": 0, "noisy": 5}
    review_of(run).decide(ids_of()[1], "keep", None, "ann")
    assert apply_decisions(run)["tags"] == {"clean": 2, "ambiguous": 0, "noisy": 4}
    assert run.stage("tag")["thresholds"]["budget"] == 1.0
    assert "retagged_from" in run.stage("tag")


def test_the_model_s_tag_stays_known_under_a_decision(tmp_path):
    run = run_of(tmp_path / "run")
    review_of(run).decide(ids_of()[0], "keep", None, "ann")
    apply_decisions(run)
    assert review_of(Run.open(run.path)).page(0, 1, "ann")[0]["tag"] == "noisy"


# --- the sample


def test_a_sample_is_the_same_after_a_restart_and_grows_at_its_end(tmp_path):
    run = run_of(tmp_path / "run", 60)
    small = review_of(run, sample=10).queue.pair_ids
    assert review_of(run, sample=10).queue.pair_ids == small
    large = review_of(run, sample=25).queue.pair_ids
    assert large[:10] == small
    assert len(set(large)) == 25
    assert review_of(run, sample=500).queue.pair_ids[:25] == large


def test_a_sample_is_uniform(tmp_path):
    population = [f"p{at:02}" for at in range(20)]
    hits = dict.fromkeys(population, 0)
    for seed in range(400):
        folder = tmp_path / str(seed)
        for one in draw_sample(folder, population, 5, seed):
            hits[one] += 1
    # 100 expected each, standard deviation 8.7
    assert all(65 <= number <= 135 for number in hits.values())


def test_other_pairs_make_another_sample(tmp_path):
    before = draw_sample(tmp_path, ["a", "b", "c"], 3, seed=1)
    assert draw_sample(tmp_path, ["a", "b", "c"], 3, seed=2) == before
    assert set(draw_sample(tmp_path, ["d", "e"], 3)) == {"d", "e"}


def test_a_damaged_sample_is_told(tmp_path):
    (tmp_path / "review").mkdir()
    (tmp_path / "review" / "sample.json").write_text("{}")
    with pytest.raises(RunError) as caught:
        draw_sample(tmp_path, ["a"], 1)
    assert caught.value.hint == "delete it; a new sample is drawn, decisions stay"


def test_a_sampled_pair_hides_what_the_model_says_until_it_is_decided(tmp_path):
    run = run_of(tmp_path / "run")
    review = review_of(run, sample=6)
    before = review.page(0, 1, "ann")[0]
    assert before["is_hidden"]
    assert not {"tag", "probability", "reasons", "best_caption", "best_image"} & before.keys()
    after = review.decide(before["pair_id"], "keep", None, "ann")["pair"]
    assert after["tag"]
    assert not after["is_hidden"]
    assert lines_of(run)[0]["sample"] is True
    assert review.page(0, 1, "bob")[0]["is_hidden"]


def test_figures_of_a_sample_are_those_counted_by_hand(tmp_path):
    run = run_of(tmp_path / "run", 60)
    review = review_of(run, sample=60)
    for pair in review.page(0, 60, "ann"):
        # Every noisy pair is wrong; so is one ambiguous and one clean pair.
        wrong = pair["row"] % 3 == 0 or pair["row"] in (1, 2)
        review.decide(pair["pair_id"], "drop" if wrong else "keep", None, "ann")
    found = review_facts(run)["figures"]
    assert (found["wrong"], found["right"]) == (
        {"clean": 1, "ambiguous": 1, "noisy": 20},
        {"clean": 19, "ambiguous": 19, "noisy": 0},
    )
    assert found["precision"]["estimate"] == 1
    assert found["precision"]["low"] == pytest.approx(0.8389, abs=1e-3)
    assert found["recall"]["estimate"] == pytest.approx(20 / 22)
    assert found["recall"]["low"] < 20 / 22 < found["recall"]["high"] < 1
    assert found["noise"]["estimate"] == pytest.approx(22 / 60)
    apply_decisions(run)
    assert review_facts(run)["figures"] == found, (
        "decisions must not make the tags look better than they were"
    )


def test_a_decision_turned_round_with_the_tag_in_view_is_counted(tmp_path):
    run = run_of(tmp_path / "run", 60)
    ids = review_of(run, sample=40).queue.pair_ids
    review_of(run).decide(ids[0], "keep", None, "ann")
    review = review_of(run, sample=40)
    review.decide(ids[1], "keep", None, "ann")
    review.decide(ids[1], "drop", None, "ann")
    review.decide(ids[2], "keep", None, "ann")
    assert review.figures().in_view == 2


def test_few_decisions_give_no_figure():
    found = figures([("noisy", True)] * 29, {"noisy": 100}, 150)
    assert found.precision is None
    assert statement(found) == [
        "random sample: 29 of 150 pairs decided, 29 with a wrong caption",
        "figures follow from 30 decided pairs on; 100 to 200 make them useful",
    ]


def test_the_statement_says_how_little_it_rests_on():
    outcomes = [("noisy", True)] * 3 + [("clean", False)] * 96 + [("clean", True)]
    found = figures(outcomes, {"clean": 9_000, "ambiguous": 0, "noisy": 300}, 120, conflicts=2, in_view=1)
    assert statement(found) == [
        "random sample: 100 of 120 pairs decided, 4 with a wrong caption",
        "share of wrong captions: 4.0 % (95 % interval 1.6 % to 9.8 %)",
        "precision of noisy: 100.0 % (95 % interval 43.9 % to 100.0 %), from 3 of them in the sample",
        statement(found)[3],
        "that is few: a uniform sample holds no more noise than the dataset; a larger one tells more",
        "20 of the sample are not decided; if those are the hard ones, the figures flatter",
        "reviewers disagree about 2 of them; the last decision counts",
        "decided, or turned round, with the tag in view: 1",
    ]
    assert statement(found)[3].startswith("recall of noisy: 76.4 % (95 % interval ")
    assert statement(found)[3].endswith(", from 4 wrong captions in the sample")


def test_nothing_wrong_and_nothing_noisy_are_said_to_be_unknown():
    found = figures([("clean", False)] * 40, {"clean": 40}, 40)
    assert math.isnan(found.precision.estimate)
    assert math.isnan(found.recall.estimate)
    assert "precision of noisy: unknown, no pair of the sample is tagged so" in statement(found)
    assert "recall of noisy: unknown, no caption of the sample is wrong" in statement(found)
    assert figures_json(found)["precision"] is None


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_s_interval_holds_its_estimate_and_narrows(hits, num):
    hits = min(hits, num)
    found, more = wilson(hits, num), wilson(4 * hits, 4 * num)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert more.high - more.low < found.high - found.low


def test_the_recall_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    sizes, shares = (
        {"clean": 8000, "ambiguous": 400, "noisy": 1600},
        {"clean": 0.02, "ambiguous": 0.5, "noisy": 0.95},
    )
    truth = 1600 * 0.95 / (1600 * 0.95 + 400 * 0.5 + 8000 * 0.02)
    tags, weight = list(sizes), np.array(list(sizes.values())) / 10_000
    hits = 0
    for _ in range(120):
        drawn = rng.choice(tags, 150, p=weight)
        found = figures([(tag, rng.random() < shares[tag]) for tag in drawn], sizes, 150)
        hits += found.recall.low <= truth <= found.recall.high
    assert hits >= 120 * 0.89
