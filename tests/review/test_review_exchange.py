"""Decisions out to files and back: all or nothing, and nothing unnamed."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_run import Pair
from review_runs import ids_of, lines_of, review_of, run_of

from nc_audit.decisions import effective_decisions, read_decisions
from nc_audit.errors import DatasetError
from nc_audit.review import Journal, export_decisions, import_decisions


def decided_run(path):
    run = run_of(path)
    review, ids = review_of(run), ids_of()
    review.decide(ids[0], "keep", None, "bob")
    review.decide(ids[1], "fix", '=HYPERLINK("x") café, "quoted"', "ann")
    review.decide(ids[2], "rematch", None, "ann")
    review.decide(ids[3], "keep", None, "ann")
    review.undo("ann")
    review.decide(ids[0], "drop", None, "ann")
    return run


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_what_is_exported_can_be_imported_and_means_the_same(tmp_path, ending):
    run, file = decided_run(tmp_path / "run"), tmp_path / f"decisions.{ending}"
    assert export_decisions(run, file) == 4
    other = run_of(tmp_path / "other")
    assert import_decisions(other, file, reviewer="somebody") == {
        "imported": 4,
        "unchanged": 0,
        "by_decision": {"keep": 1, "fix": 1, "rematch": 1, "drop": 1},
    }
    assert read_decisions(other.path)[0] == read_decisions(run.path)[0]
    assert Journal(other.path).in_conflict(ids_of()[0])
    assert {line["imported"] for line in lines_of(other)} == {True}


def test_importing_twice_adds_nothing(tmp_path):
    run, file = decided_run(tmp_path / "run"), tmp_path / "decisions.csv"
    export_decisions(run, file)
    before = (run.path / "decisions.jsonl").read_bytes()
    assert import_decisions(run, file, reviewer="ann")["unchanged"] == 4
    assert (run.path / "decisions.jsonl").read_bytes() == before


def test_a_csv_runs_no_formula_and_says_which_decision_stands(tmp_path):
    run, file = decided_run(tmp_path / "run"), tmp_path / "decisions.csv"
    export_decisions(run, file)
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["row"], row["reviewer"], row["decision"], row["stands"]) for row in rows] == [
        ("0", "bob", "keep", "false"),
        ("1", "ann", "fix", "true"),
        ("2", "ann", "rematch", "true"),
        ("0", "ann", "drop", "true"),
    ]
    assert rows[1]["caption"].startswith("'=HYPERLINK")
    assert rows[1]["original_caption"] == "caption number 1"


def test_rows_name_pairs_too_and_the_reviewer_is_given_once(tmp_path):
    run, file = run_of(tmp_path / "run"), tmp_path / "in.csv"
    file.write_text("row,decision,caption\n0,drop,\n1,fix, better words \n2,keep,caption number 2\n")
    assert import_decisions(run, file, reviewer="ann")["imported"] == 3
    standing = effective_decisions((run.path / "decisions.jsonl").read_text().splitlines())
    assert [(one.decision, one.caption, one.reviewer) for one in standing.values()] == [
        ("drop", None, "ann"),
        ("fix", "better words", "ann"),
        ("keep", None, "ann"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "row,decision\n0,keep\n7,keep\nx,drop\n",
            "in.csv: 2 are no ok pair of {run}: row 7, row x",
        ),
        ("pair_id,decision\nnobody,keep\n", "in.csv: 1 is no ok pair of {run}: nobody"),
        ("row,decision\n0,maybe\n", "in.csv: line 2: decision 'maybe' is none of keep, drop, fix, rematch"),
        ("row,decision\n0,undo\n", "in.csv: line 2: decision 'undo' is none of keep, drop, fix, rematch"),
        ("row,decision\n0,fix\n", "in.csv: line 2: fix without a caption"),
        ("row,decision,caption\n0,keep,other words\n", "in.csv: line 2: keep takes no new caption"),
        ("row,pair_id,decision\n0,abc,keep\n", "in.csv: line 2: row 0 is not the pair abc"),
        ("row,decision,time\n0,keep,yesterday\n", "in.csv: line 2: time 'yesterday' is not ISO 8601"),
        ("row,decision,reviewer\n0,keep,model\n", "in.csv: line 2: 'model' is no name for a reviewer"),
        ("row,decision\n,keep\n", "in.csv: line 2: neither pair_id nor row"),
        ("row,verdict\n0,keep\n", "in.csv: it has the columns row, verdict"),
        ("", "in.csv: it has the columns (none)"),
    ],
)
def test_one_wrong_line_and_nothing_is_imported(tmp_path, text, message):
    run, file = run_of(tmp_path / "run"), tmp_path / "in.csv"
    file.write_text(text)
    with pytest.raises(DatasetError) as caught:
        import_decisions(run, file, reviewer="ann")
    assert caught.value.message == message.format(run=run.path)
    assert not (run.path / "decisions.jsonl").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"row": 0, "decision": "keep"}\n{"row"', "in.jsonl: line 2 cannot be read: "),
        (b"[1]\n", "in.jsonl: line 1 cannot be read: no JSON object"),
        (b"\xff\xfe", "in.jsonl: line 1 cannot be read: "),
        (b"[" * 100_000, "in.jsonl: line 1 cannot be read: "),
        (b'{"row": 0.5, "decision": "keep"}', "in.jsonl: line 1: row is no text"),
        (b'{"pair_id": ["a"], "decision": "keep"}', "in.jsonl: line 1: pair_id is no text"),
        (
            b'{"row": 0, "decision": "fix", "caption": "\\ud800"}',
            "in.jsonl: line 1: caption holds half a character: \\ud800",
        ),
    ],
)
def test_a_damaged_file_is_told_with_its_line(tmp_path, data, message):
    run, file = run_of(tmp_path / "run"), tmp_path / "in.jsonl"
    file.write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        import_decisions(run, file, reviewer="ann")
    assert caught.value.message.startswith(message)
    assert not (run.path / "decisions.jsonl").exists()


def test_rows_that_are_not_ok_cannot_be_decided(tmp_path):
    run = run_of(tmp_path / "run", [Pair(0), Pair(1, None, status="missing_image")])
    (tmp_path / "in.csv").write_text("row,decision\n1,keep\n")
    with pytest.raises(DatasetError, match="1 is no ok pair"):
        import_decisions(run, tmp_path / "in.csv", reviewer="ann")


def test_label_studio_gets_tasks_with_suggestions_and_decisions(tmp_path):
    run, file = decided_run(tmp_path / "run"), tmp_path / "tasks.json"
    assert export_decisions(run, file, form="labelstudio") == 6
    tasks = json.loads(file.read_text())
    assert [task["data"]["row"] for task in tasks] == [0, 3, 1, 4, 2, 5]
    first = tasks[0]
    assert first["predictions"][0]["result"] == [
        {"from_name": "decision", "to_name": "image", "type": "choices", "value": {"choices": ["drop"]}}
    ]
    assert first["annotations"][0]["result"][0]["value"] == {"choices": ["drop"]}
    assert tasks[2]["annotations"][0]["result"][1]["value"]["text"] == ['=HYPERLINK("x") café, "quoted"']
    assert "predictions" not in tasks[3]
    assert "annotations" not in tasks[3]


def studio_of(tasks, decide):
    """The tasks as Label Studio exports them after annotators decided."""
    return [
        {
            "id": number,
            "data": task["data"],
            "predictions": [],
            "project": 1,
            "annotations": decide(task["data"]["row"]),
        }
        for number, task in enumerate(tasks)
    ]


def annotation(decision, *captions, **more):
    result = [
        {
            "from_name": "decision",
            "to_name": "image",
            "type": "choices",
            "id": "a1",
            "origin": "manual",
            "value": {"choices": [decision]},
        }
    ]
    if captions:
        result.append(
            {
                "from_name": "new_caption",
                "to_name": "image",
                "type": "textarea",
                "id": "b2",
                "value": {"text": list(captions)},
            }
        )
    return {"id": 7, "completed_by": 3, "was_cancelled": False, "updated_at": "2026-11-23T01:02:03.000000Z",
            "result": result} | more  # fmt: skip


def exported(tmp_path, run, decide):
    export_decisions(run, tmp_path / "tasks.json", form="labelstudio")
    tasks = studio_of(json.loads((tmp_path / "tasks.json").read_text()), decide)
    (tmp_path / "done.json").write_text(json.dumps(tasks))
    return tmp_path / "done.json"


def test_tasks_that_never_saw_label_studio_give_back_what_was_decided(tmp_path):
    run = decided_run(tmp_path / "run")
    export_decisions(run, tmp_path / "tasks.json", form="labelstudio")
    other = run_of(tmp_path / "other")
    assert import_decisions(other, tmp_path / "tasks.json", reviewer="somebody")["imported"] == 3
    standing = [Journal(one.path).standing(pair_id) for one in (run, other) for pair_id in ids_of()[:3]]
    facts = [(one["reviewer"], one["decision"], one.get("caption")) for one in standing]
    assert facts[:3] == facts[3:]


def test_what_label_studio_exports_is_imported(tmp_path):
    run = run_of(tmp_path / "run")
    decided = {
        0: [annotation("drop"), annotation("keep", completed_by={"id": 4, "email": "bob@example.org"})],
        1: [annotation("fix", "the right words")],
        2: [annotation("rematch"), annotation("keep", was_cancelled=True)],
        3: [annotation("keep") | {"result": []}],
    }
    file = exported(tmp_path, run, lambda row: decided.get(row, []))
    assert import_decisions(run, file, reviewer="ann")["by_decision"] == {
        "drop": 1,
        "keep": 1,
        "fix": 1,
        "rematch": 1,
    }
    lines = {(one["pair_id"], one["decision"]): one for one in lines_of(run)}
    ids = ids_of()
    assert lines[ids[0], "keep"]["reviewer"] == "bob@example.org"
    assert lines[ids[0], "drop"]["reviewer"] == "Label Studio user 3"
    assert lines[ids[0], "drop"]["time"] == "2026-11-23T01:02:03.000000Z"
    assert lines[ids[1], "fix"]["caption"] == "the right words"
    assert lines[ids[2], "rematch"]["caption"] == "a better caption 2"
    assert import_decisions(run, file, reviewer="ann") == {"imported": 0, "unchanged": 4, "by_decision": {}}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([annotation("maybe")], "done.json: task 1: decision 'maybe' is none of keep, drop, fix, rematch"),
        ([annotation("fix")], "done.json: task 1: fix without a caption"),
        (
            [annotation("fix", "a", "b")],
            "done.json: task 1 cannot be read: new_caption has 2 values in one annotation",
        ),
        ([{"id": 1}], "done.json: task 1 cannot be read: an annotation without a result"),
        (
            None,
            "done.json: task 1 cannot be read: no task with data and annotations; export as JSON, not JSON-MIN",
        ),
    ],
)
def test_a_label_studio_file_is_imported_whole_or_not_at_all(tmp_path, made, message):
    run = run_of(tmp_path / "run")
    file = exported(tmp_path, run, lambda row: made if row == 0 else [annotation("keep")])
    with pytest.raises(DatasetError) as caught:
        import_decisions(run, file, reviewer="ann")
    assert caught.value.message == message
    assert not (run.path / "decisions.jsonl").exists()


def test_argilla_gets_one_flat_record_a_line(tmp_path):
    run, file = decided_run(tmp_path / "run"), tmp_path / "records.jsonl"
    assert export_decisions(run, file, form="argilla", tags=["noisy", "clean"]) == 4
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["decision"] for record in records] == ["drop", "drop", "keep", "keep"]
    assert all(not isinstance(value, dict | list) for record in records for value in record.values())
    assert records[0]["id"] == records[0]["pair_id"]


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("a.txt", None, "a.txt: no format goes with this ending"),
        ("a.csv", "xlsx", "unknown format 'xlsx'"),
        ("", "csv", "{path} is a folder"),
    ],
)
def test_an_export_that_cannot_be_is_told(tmp_path, name, form, message):
    run = run_of(tmp_path / "run")
    with pytest.raises(DatasetError) as caught:
        export_decisions(run, tmp_path / name, form=form)
    assert caught.value.message == message.format(path=tmp_path)


def test_no_file_is_overwritten_least_of_all_the_decisions(tmp_path):
    run = decided_run(tmp_path / "run")
    before = (run.path / "decisions.jsonl").read_bytes()
    with pytest.raises(DatasetError) as caught:
        export_decisions(run, run.path / "decisions.jsonl")
    assert caught.value.message == f"{run.path / 'decisions.jsonl'} exists"
    assert (run.path / "decisions.jsonl").read_bytes() == before


@settings(max_examples=12)
@given(st.text(min_size=1, max_size=40).filter(lambda text: text.strip() and "\r" not in text))
def test_any_new_caption_survives_json_lines(tmp_path_factory, caption):
    folder = tmp_path_factory.mktemp("run")
    run = run_of(folder / "run", 2)
    taken = review_of(run).decide(ids_of(2)[0], "fix", caption, "ann")["pair"]["mine"]["words"]
    export_decisions(run, folder / "out.jsonl")
    other = run_of(folder / "other", 2)
    import_decisions(other, folder / "out.jsonl", reviewer="ann")
    assert Journal(other.path).standing(ids_of(2)[0])["caption"] == taken
