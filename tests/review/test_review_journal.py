"""The decision file: nothing that was acknowledged is ever lost, nothing that is there is ever changed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_audit.decisions import effective_decisions
from nc_audit.errors import RunError
from nc_audit.review import Journal

WRITER = """
import sys
from pathlib import Path
from nc_audit.review.journal import Journal

journal = Journal(Path(sys.argv[1]))
for number in range(100_000):
    journal.append([{"time": "t", "reviewer": "ann", "pair_id": f"p{number}", "decision": "keep"}])
    sys.stdout.write(f"p{number}\\n")
    sys.stdout.flush()
"""


def entry(pair_id: str, decision: str = "keep", reviewer: str = "ann", **more: object) -> dict[str, object]:
    return {
        "time": "2026-11-22T10:00:00Z",
        "reviewer": reviewer,
        "pair_id": pair_id,
        "decision": decision,
        **more,
    }


def test_what_is_appended_is_on_the_disk_and_stands(tmp_path):
    journal = Journal(tmp_path)
    journal.append([entry("a"), entry("b", "fix", caption="a \u202e café")])
    lines = (tmp_path / "decisions.jsonl").read_bytes()
    assert lines.endswith(b"\n")
    assert lines.isascii()
    assert [json.loads(one)["pair_id"] for one in lines.splitlines()] == ["a", "b"]
    assert journal.standing("b")["caption"] == "a \u202e café"
    assert journal.standing("c") is None


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        told = [writer.stdout.readline().strip() for _ in range(20)]
        writer.kill()
        told += writer.stdout.read().split()
    standing = effective_decisions((tmp_path / "decisions.jsonl").read_text().splitlines())
    assert len(told) >= 20
    assert set(told) <= set(standing)


def test_a_torn_last_line_stays_and_a_new_line_begins_after_it(tmp_path):
    path = tmp_path / "decisions.jsonl"
    before = json.dumps(entry("a")).encode() + b'\n{"time": "2026-11-22T10:00:00Z", "pair_'
    path.write_bytes(before)
    journal = Journal(tmp_path)
    assert journal.decided() == ["a"]
    journal.append([entry("b")])
    assert path.read_bytes().startswith(before + b"\n{")
    assert journal.decided() == Journal(tmp_path).decided() == ["a", "b"]
    assert journal.num_torn == 1


def test_a_whole_last_line_without_line_feed_counts_once(tmp_path):
    (tmp_path / "decisions.jsonl").write_text(json.dumps(entry("a", "drop")))
    journal = Journal(tmp_path)
    assert journal.standing("a")["decision"] == "drop"
    journal.append([entry("a", "undo")])
    assert journal.standing("a") is None
    assert Journal(tmp_path).standing("a") is None


def test_two_journals_of_one_file_see_each_other(tmp_path):
    one, other = Journal(tmp_path), Journal(tmp_path)
    one.append([entry("a")])
    other.append([entry("a", "drop", "bob")])
    one.refresh()
    assert one.in_conflict("a")
    assert other.in_conflict("a")
    assert one.standing("a")["reviewer"] == "bob"
    assert list(one.by_reviewer("a")) == ["ann", "bob"]


def test_threads_and_journals_write_whole_lines(tmp_path):
    journals = [Journal(tmp_path), Journal(tmp_path)]

    def write(number: int) -> None:
        for at in range(20):
            journals[number % 2].append([entry(f"{number}-{at}", "fix", caption="x" * 3000)])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journals[0].refresh()
    assert len(journals[0].decided()) == 80
    assert journals[0].num_torn == 0


def test_a_line_that_is_json_but_no_decision_is_told_and_left_alone(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps(entry("a")) + '\n{"pair_id": "b", "decision": "maybe"}\n')
    before = path.read_bytes()
    with pytest.raises(RunError) as caught:
        Journal(tmp_path)
    assert caught.value.message == f"{path}: line 2 is no decision: it needs pair_id and decision"
    assert caught.value.hint == "mend the line; nothing was changed"
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.append([entry("a")])
    before = (tmp_path / "decisions.jsonl").read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nc_audit.review.journal.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.append([entry("b"), entry("c")])
    monkeypatch.undo()
    assert (tmp_path / "decisions.jsonl").read_bytes() == before
    assert Journal(tmp_path).decided() == ["a"]


events = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["keep", "drop", "fix", "undo"]),
        st.sampled_from(["ann", "bob"]),
    ),
    max_size=25,
)


@given(events, st.integers(0, 25))
def test_the_journal_means_what_the_folded_decisions_mean(tmp_path_factory, taken, split):
    folder: Path = tmp_path_factory.mktemp("run")
    journal = Journal(folder)
    entries = [
        entry(pair, decision, who, **({"caption": f"new {pair}"} if decision == "fix" else {}))
        for pair, decision, who in taken
    ]
    path = folder / "decisions.jsonl"
    for part in (entries[:split], entries[split:]):
        with path.open("a") as handle:
            handle.writelines(json.dumps(one) + "\n" for one in part)
        journal.refresh()
    standing = effective_decisions(path.read_text().splitlines())
    assert set(journal.decided()) == set(standing)
    for pair, one in standing.items():
        found = journal.standing(pair)
        assert (found["decision"], found["reviewer"], found.get("caption")) == (
            one.decision,
            one.reviewer,
            one.caption,
        )


def test_an_undo_takes_back_ones_own_last_decision_only(tmp_path):
    journal = Journal(tmp_path)
    journal.append([entry("a"), entry("a", "drop", "bob"), entry("b"), entry("a", "undo")])
    assert journal.by_reviewer("a").keys() == {"bob"}
    assert journal.last_of("ann", {"a", "b"}) == "b"
    assert journal.last_of("ann", {"a"}) is None


def test_a_long_file_is_read_once_and_then_only_its_end(tmp_path):
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(json.dumps(entry(f"p{at}")) + "\n" for at in range(20_000)))
    journal = Journal(tmp_path)
    start = time.process_time()
    for at in range(20):
        journal.append([entry(f"q{at}")])
    assert time.process_time() - start < 1
    assert len(journal.decided()) == 20_020
