"""Lines of decisions.jsonl, folded into what stands."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.decisions import DECISIONS, Decision, effective_decisions, read_decisions
from nc_audit.errors import RunError


def line(decision, pair="p", reviewer="Ada", caption=None, time="t", **more):
    entry = {"time": time, "reviewer": reviewer, "pair_id": pair, "decision": decision, **more}
    return json.dumps(entry | ({"caption": caption} if caption is not None else {}))


def words(*lines):
    return {pair: one.decision for pair, one in effective_decisions(lines).items()}


def test_the_last_decision_stands():
    assert words(line("keep"), line("drop"), line("keep", "q")) == {"p": "drop", "q": "keep"}


def test_an_undo_brings_back_the_one_before():
    assert words(line("keep"), line("drop"), line("undo")) == {"p": "keep"}
    assert words(line("keep"), line("drop"), line("undo"), line("undo")) == {}
    assert words(line("undo"), line("keep")) == {"p": "keep"}


def test_an_undo_takes_back_only_what_the_same_person_decided():
    lines = [line("keep", reviewer="Ada"), line("drop", reviewer="Bob"), line("undo", reviewer="Ada")]
    assert words(*lines) == {"p": "drop"}
    assert words(*lines, line("undo", reviewer="Bob")) == {}


def test_a_decision_says_who_when_and_which_caption():
    lines = [line("fix", caption=" a boat ", time="2026-11-22T12:00:00Z", sample=True, tag="noisy")]
    assert effective_decisions(lines) == {
        "p": Decision("p", "fix", " a boat ", "Ada", "2026-11-22T12:00:00Z")
    }
    (kept,) = effective_decisions([line("keep", caption="said for nothing")]).values()
    assert kept.caption is None


@pytest.mark.parametrize("torn", ['{"pair_id": "p", "decisi', "[" * 100_000, "\ufffd"])
@pytest.mark.parametrize("after", [[], [line("drop", "q")]])
def test_a_torn_line_is_ignored_with_a_warning(torn, after):
    with pytest.warns(UserWarning, match="is torn") as caught:
        found = effective_decisions([line("keep"), torn, *after])
    assert [str(one.message) for one in caught] == [
        "decisions.jsonl: line 2 is torn and was ignored; every other decision counts"
    ]
    assert list(found) == ["p", "q"][: 1 + len(after)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("[]", "decisions.jsonl: line 2 is no decision (mend the line; nothing was changed)"),
        (
            '{"pair_id": 7, "decision": "keep"}',
            "decisions.jsonl: line 2 is no decision: it needs pair_id and decision "
            "(mend the line; nothing was changed)",
        ),
        (
            line("burn"),
            "decisions.jsonl: line 2: there is no decision 'burn' (known: keep, drop, fix, rematch, undo)",
        ),
        (
            line("fix", caption=" "),
            "decisions.jsonl: line 2: fix without a caption (mend the line; nothing was changed)",
        ),
    ],
)
def test_a_line_that_is_no_decision_is_an_error(bad, message):
    with pytest.raises(RunError) as caught:
        effective_decisions([line("keep"), bad])
    assert str(caught.value) == message


def test_a_run_without_the_file_has_no_decisions(tmp_path):
    assert read_decisions(tmp_path) == ({}, [])


def test_captions_with_odd_line_breaks_stay_on_their_line(tmp_path):
    text = json.dumps({"pair_id": "p", "decision": "fix", "caption": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "decisions.jsonl").write_text(text + "\n", encoding="utf-8")
    decisions, notes = read_decisions(tmp_path)
    assert (decisions["p"].caption, notes) == ("a\u2028b\x85c", [])


def test_a_torn_file_is_told_of(tmp_path):
    (tmp_path / "decisions.jsonl").write_bytes(line("keep").encode() + b'\n{"pair_id": "\xff')
    decisions, notes = read_decisions(tmp_path)
    assert (list(decisions), len(notes)) == (["p"], 1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*DECISIONS, "undo"]), st.sampled_from("pq"), st.sampled_from(["Ada", "Bob"])
        )
    )
)
def test_folding_is_a_stack_for_each_reviewer(steps):
    lines = [line(word, pair, who, caption="a boat") for word, pair, who in steps]
    expected = {}
    for pair in "pq":
        mine = [(at, word, who) for at, (word, of, who) in enumerate(steps) if of == pair]
        standing = []
        for who in ("Ada", "Bob"):
            stack = []
            for at, word, by in mine:
                if by == who:
                    stack = stack[:-1] if word == "undo" else [*stack, (at, word)]
            standing += stack
        if standing:
            expected[pair] = max(standing)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words(*lines) == expected
