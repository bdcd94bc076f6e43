"""What people decided stands above the tags in every export."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_run import Pair, make_run, pair_id, reader

from nc_audit.errors import RunError
from nc_audit.export import FORMATS, export_run

PAIRS = [
    Pair(0, "a red house", probability=0.25),
    Pair(1, "a plane", tag="noisy", probability=0.875),
    Pair(2, "a boat", tag="noisy", probability=0.75),
    Pair(3, "a tent", tag="clean", probability=0.125),
    Pair(4, "a road", tag="noisy", probability=1.0),
    Pair(5, "", status="empty_caption"),
]


def decide(run, *lines):
    with (run.path / "decisions.jsonl").open("a", encoding="utf-8") as file:
        for pair, decision, caption in lines:
            entry = {"time": "2026-11-22T12:00:00Z", "reviewer": "Ada", "pair_id": pair_id(pair)}
            entry |= {"decision": decision} | ({"caption": caption} if caption else {})
            file.write(json.dumps(entry) + "\n")


def exported(out):
    tables = [pq.read_table(path, partitioning=None) for path in sorted(out.rglob("*.parquet"))]
    return {row["row"]: row for row in pa.concat_tables(tables).to_pylist()}


def listed(path):
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run", PAIRS)
    decide(
        run,
        (PAIRS[1], "keep", None),
        (PAIRS[2], "fix", "a ship at sea"),
        (PAIRS[3], "drop", None),
        (PAIRS[5], "fix", "a lake"),
    )
    return run


def test_kept_and_mended_pairs_stay_and_dropped_ones_go(run, tmp_path):
    result = export_run(run, tmp_path / "out", drop=["noisy"], reweight=True, read_image=reader(gone=[5]))
    rows = exported(tmp_path / "out")
    assert {row: (one["caption"], one["tag"], one["weight"]) for row, one in rows.items()} == {
        0: ("a red house", "clean", 0.75),
        1: ("a plane", "clean", 1.0),
        2: ("a ship at sea", "clean", 1.0),
    }
    assert result.dropped == {"decision: drop": 1, "status: empty_caption": 1, "tag: noisy": 1}
    assert [(line["row"], line["why"], line["detail"]) for line in listed(tmp_path / "out/dropped.csv")] == [
        ("3", "decision: drop", "by Ada"),
        ("4", "tag: noisy", ""),
        ("5", "status: empty_caption", "as the test says"),
    ]
    assert listed(tmp_path / "out" / "rematches.csv") == [
        {
            "row": "2", "image": "images/2.png", "old_caption": "a boat", "new_caption": "a ship at sea",
            "probability": "", "pair_id": pair_id(PAIRS[2]), "from_row": "", "decided_by": "Ada",
        }
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\n- decided by people: 4 rows; they count more than tags\n" in card
    assert "\n- captions replaced: 1, each listed in `rematches.csv`\n" in card


def test_without_drop_nothing_is_dropped_but_weighs_nothing(run, tmp_path):
    export_run(run, tmp_path / "out", reweight=True, read_image=reader())
    rows = exported(tmp_path / "out")
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert (rows[3]["tag"], rows[3]["weight"]) == ("noisy", 0.0)


def test_a_caption_that_was_missing_is_mended(tmp_path):
    run = make_run(tmp_path / "run", PAIRS)
    pairs = pq.read_table(run.path / "pairs.parquet")
    uri = pa.array([f"dataset:images/{i}.png" for i in range(6)])
    ids = pa.array([f"image{i:04d}" for i in range(6)])
    for name, values in (("image_uri", uri), ("image_id", ids)):
        at = pairs.schema.get_field_index(name)
        pairs = pairs.set_column(at, pairs.schema.field(name), values)
    run.write_table("pairs", pairs)
    decide(run, (PAIRS[5], "fix", "a lake"))
    result = export_run(run, tmp_path / "out", drop=["noisy"], reweight=True, read_image=reader())
    assert (result.kept, result.num_rematched) == (3, 1)
    row = exported(tmp_path / "out")[5]
    assert (row["caption"], row["tag"], row["weight"], row["noise_probability"]) == (
        "a lake",
        "clean",
        1.0,
        None,
    )


def test_people_go_before_the_model_in_re_matches(tmp_path):
    first = Pair(1, "a plane", tag="noisy", rematch_row=2, rematch_probability=0.25)
    pairs = [
        first,
        Pair(2, "a boat", tag="noisy", rematch_row=0, rematch_probability=0.25),
        Pair(3, "a tent"),
    ]
    run = make_run(tmp_path / "run", pairs)
    decide(run, (first, "rematch", "chosen by hand"), (pairs[1], "keep", None))
    export_run(run, tmp_path / "out", drop=["noisy"], rematch=True, read_image=reader())
    assert {row: one["caption"] for row, one in exported(tmp_path / "out").items()} == {
        0: "chosen by hand",
        1: "a boat",
        2: "a tent",
    }


@pytest.mark.parametrize("form", FORMATS)
def test_decisions_count_in_every_format(run, tmp_path, form):
    result = export_run(run, tmp_path / "out", format=form, drop=["noisy"], read_image=reader())
    if form == "datacomp":
        assert result.dropped["caption changed, which ids cannot say"] == 1
        assert result.kept == 2
    else:
        assert (result.kept, result.num_rematched) == (3, 1)
    assert result.dropped["decision: drop"] == 1


def test_a_torn_line_is_told_and_the_others_count(run, tmp_path):
    with (run.path / "decisions.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"pair_id": "0f", "deci')
    result = export_run(run, tmp_path / "out", drop=["noisy"], read_image=reader())
    assert result.notes == ["decisions.jsonl: line 5 is torn and was ignored; every other decision counts"]
    assert result.kept == 3


def test_a_line_that_is_no_decision_stops_the_export(run, tmp_path):
    decide(run, (PAIRS[0], "burn", None))
    with pytest.raises(RunError) as caught:
        export_run(run, tmp_path / "out", read_image=reader())
    assert str(caught.value) == (
        "decisions.jsonl: line 5: there is no decision 'burn' (known: keep, drop, fix, rematch, undo)"
    )
    assert not (tmp_path / "out").exists()
