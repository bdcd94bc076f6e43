"""Rows of a report: order, filters, copies, values; the summary; the three writers."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_run import Pair, make_run

from nc_audit.errors import DatasetError, RunError
from nc_audit.findings import Found
from nc_audit.report import ReportRow, report_rows, sort_columns, summary, to_csv, to_json, to_markdown
from nc_audit.report.joined import joined
from nc_audit.run import write_parquet

NOISE_RATE = {"estimate": 0.2, "low": 0.18, "high": 0.22, "level": 0.9}


@pytest.fixture
def run(tmp_path):
    pairs = [
        Pair(0, "a red house", probability=0.25, noise_score=-1.0, more={"similarity": 0.9}),
        Pair(1, "a plane", probability=0.875, noise_score=2.0, tag="noisy", reasons=["its rank is 7", "a tank fits"],
             best_caption="a tank", best_caption_margin=0.2, more={"similarity": 0.1}),
        Pair(2, "a boat", status="missing_image"),
        Pair(1, "a plane", probability=0.875, noise_score=2.0, tag="noisy", duplicate_of=1, more={"similarity": 0.1}),
        Pair(3, "a tank", probability=0.875, noise_score=3.0, tag="noisy", more={"similarity": 0.3}),
        Pair(4, "a tent", probability=0.5, noise_score=0.5, tag="ambiguous", more={"similarity": 0.2}),
        Pair(5, "a court", probability=float("nan"), noise_score=float("nan"), more={"similarity": 0.5}),
    ]  # fmt: skip
    found = {"noise_rate": NOISE_RATE, "findings": ["41 captions are on several images"]}
    return make_run(tmp_path / "runs" / "toy", pairs, summary=found, dataset={"path": "toy/"})


def rows_of(rows: list[ReportRow]) -> list[int]:
    return [row.row for row in rows]


def test_the_worst_come_first_and_equal_pairs_once(run):
    rows = report_rows(run)
    assert rows_of(rows) == [4, 1, 5, 0, 6]
    assert [row.copies for row in rows] == [1, 2, 1, 1, 1]


def test_top_takes_the_first_of_the_same_order(run):
    assert report_rows(run, top=2) == report_rows(run)[:2]


def test_tags_filter(run):
    assert rows_of(report_rows(run, tags=["ambiguous", "noisy"])) == [4, 1, 5]
    assert report_rows(run, tags=[]) == []


def test_findings_filter_and_say_why(run):
    found = Found()
    found.add("unlikely_word", 0, "unlikely word: red")
    found.add("disagrees", 0, "disagrees with the others")
    found.add("copied_caption", 3, "a tank fits")  # row 3 repeats the pair of row 1
    found.add("short_caption", 2, "caption is a single word")  # not ok: it has no score
    run.write_table("findings", found.table(run.table("pairs")))
    assert rows_of(report_rows(run, findings=["unlikely_word"])) == [0]
    both = report_rows(run, findings=["copied_caption", "unlikely_word", "short_caption"])
    assert [(row.row, row.reasons) for row in both] == [
        (1, ["a tank fits", "its rank is 7"]),
        (0, ["unlikely word: red"]),
    ]
    assert report_rows(run, findings=["copied_caption"], tags=["clean"]) == []
    assert report_rows(run, findings=[]) == report_rows(run, findings=["leakage"]) == []


def test_an_unknown_finding_names_the_nearest(run):
    with pytest.raises(DatasetError) as caught:
        report_rows(run, findings=["unlikely_words"])
    assert str(caught.value) == "finding: there is no kind 'unlikely_words' (did you mean unlikely_word?)"


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("noise_score", [4, 1, 5, 0, 6]),
        ("similarity", [1, 5, 4, 6, 0]),
        ("tag", [4, 1, 5, 0, 6]),
        ("row", [0, 1, 4, 5, 6]),
        ("best_caption", [1, 4, 5, 0, 6]),
        ("best_caption_margin", [1, 4, 5, 0, 6]),
        ("caption_rank", [4, 1, 5, 0, 6]),
    ],
)
def test_each_column_sorts_in_its_own_direction(run, column, expected):
    assert rows_of(report_rows(run, sort=column)) == expected


def test_every_sort_column_sorts(run):
    for column in sort_columns(run):
        assert sorted(rows_of(report_rows(run, sort=column))) == [0, 1, 4, 5, 6], column


def test_a_row_holds_what_the_tables_hold(run):
    row = report_rows(run)[1]
    assert row == ReportRow(
        row=1, pair_id=row.pair_id, image="images/1.png", caption="a plane", split=None, tag="noisy",
        noise_probability=0.875, noise_score=2.0, reasons=["its rank is 7", "a tank fits"], best_caption="a tank",
        best_caption_margin=0.2, best_image=None, best_image_margin=None, copies=2, decided_by="model",
        known_noise=None, image_uri="dataset:images/1.png", scores=row.scores,
    )  # fmt: skip
    assert row.scores["similarity"] == 0.1
    assert row.scores["energy"] is None


def test_an_unknown_column_names_the_nearest(run):
    with pytest.raises(RunError) as caught:
        report_rows(run, sort="noise_probabilty")
    assert (
        str(caught.value)
        == f"{run.path} has no column 'noise_probabilty' to sort by (did you mean noise_probability?)"
    )


def test_an_unknown_tag_names_the_nearest(run):
    with pytest.raises(DatasetError) as caught:
        report_rows(run, tags=["noisey"])
    assert str(caught.value) == "tag: there is no tag 'noisey' (did you mean noisy?)"


def test_top_below_one_is_refused(run):
    with pytest.raises(DatasetError) as caught:
        report_rows(run, top=0)
    assert str(caught.value) == "top must be at least 1, got 0 (leave it out to see every pair)"


def test_tables_in_another_row_order_are_joined_by_row(run):
    before = report_rows(run)
    for name in ("scores", "tags"):
        table = run.table(name)
        run.write_table(name, table.take(list(reversed(range(table.num_rows)))))
    assert report_rows(run) == before


def test_a_stale_table_is_refused(run):
    table = run.table("scores")
    run.write_table("scores", table.slice(0, 5))
    with pytest.raises(RunError) as caught:
        report_rows(run)
    assert str(caught.value) == (
        f"{run.path}: scores.parquet is stale: 5 rows, of which 5 are among the 7 of pairs.parquet "
        "(score the dataset again with --force)"
    )


def test_a_missing_table_is_named(run):
    (run.path / "scores.parquet").unlink()
    with pytest.raises(RunError) as caught:
        report_rows(run)
    assert str(caught.value) == (
        f"{run.path} has no scores.parquet (nc-audit score toy/ --out {run.path} makes it)"
    )


def test_a_table_that_is_no_parquet_is_refused(run):
    (run.path / "tags.parquet").write_bytes(b"not a table at all")
    with pytest.raises(RunError) as caught:
        report_rows(run)
    assert caught.value.message.startswith(
        f"{run.path / 'tags.parquet'} is not readable: Parquet magic bytes"
    )
    assert caught.value.hint == "score the dataset again with --force"


def test_a_method_may_add_columns_even_of_our_own_names(run):
    table = run.table("scores")
    table = table.append_column("copies", pa.array([9.0] * 7)).append_column(
        "oddity", pa.array(range(7), pa.int8())
    )
    write_parquet(table, run.path / "scores.parquet")
    rows = report_rows(run, sort="oddity")
    assert rows_of(rows) == [6, 5, 4, 1, 0]
    written = json.loads(to_json(rows, summary(run)))["pairs"][0]
    assert (written["copies"], written["oddity"]) == (1, 6)


def test_the_summary_counts_rows_and_pairs(run):
    assert summary(run) == {
        "run": str(run.path),
        "dataset": "toy/",
        "rows": 7,
        "pairs": 5,
        "status": {"ok": 6, "missing_image": 1},
        "tags": {"clean": 2, "ambiguous": 1, "noisy": 3},
        "noise_rate": NOISE_RATE,
        "findings": ["41 captions are on several images"],
    }


def test_json_is_one_document_without_nan(run):
    counts = summary(run)
    counts["findings"] = [float("inf"), {"share": float("nan")}]
    document = json.loads(to_json(report_rows(run), counts), parse_constant=pytest.fail)
    assert list(document) == ["run", "summary", "pairs"]
    assert document["run"] == str(run.path)
    assert document["summary"]["rows"] == 7
    assert document["summary"]["findings"] == [None, {"share": None}]
    assert document["pairs"][-1]["noise_probability"] is None
    assert document["pairs"][1]["best_caption_margin"] == 0.2
    assert document["pairs"][1]["reasons"] == ["its rank is 7", "a tank fits"]


def test_csv_has_one_line_per_pair(run):
    lines = list(csv.DictReader(io.StringIO(to_csv(report_rows(run)))))
    assert [line["row"] for line in lines] == ["4", "1", "5", "0", "6"]
    assert lines[1]["reasons"] == "its rank is 7; a tank fits"
    assert lines[3]["noise_score"] == "-1.0"
    assert lines[-1]["noise_probability"] == ""
    assert lines[1]["similarity"] == "0.1"


def test_no_rows_still_make_a_header():
    assert to_csv([]).startswith("row,pair_id,image,caption,split,tag,noise_probability,")


def test_markdown_as_a_whole(run):
    assert to_markdown(report_rows(run, top=1), summary(run)) == (
        "# Audit of toy/\n\n"
        "- 7 rows, 5 distinct scored pairs\n"
        "- status: ok 6, missing\\_image 1\n"
        "- tags: clean 2, ambiguous 1, noisy 3\n"
        "- estimated noise rate: 20.0 % (90 % interval 18.0 % to 22.0 %)\n"
        "- 41 captions are on several images\n\n"
        "## Pairs listed: 1\n\n"
        "| row | image | caption | noise probability | tag | reasons | better caption | copies |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| 4 | images/3.png | a tank | 0.875 | noisy |  |  | 1 |\n"
    )


@given(
    caption=st.text(st.characters(codec="utf-8"), min_size=1),
    image=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_hostile_captions_and_names_stay_in_their_cells(tmp_path_factory, caption, image):
    run = make_run(tmp_path_factory.mktemp("run"), [Pair(0, caption, image=image, reasons=[caption])])
    rows, counts = report_rows(run), summary(run)
    pair = json.loads(to_json(rows, counts))["pairs"][0]
    assert (pair["caption"], pair["image"], pair["reasons"]) == (caption, image, [caption])
    lines = list(csv.reader(io.StringIO(to_csv(rows))))
    assert len(lines) == 2
    assert len(lines[0]) == len(lines[1])
    assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in lines[1])
    assert len(to_markdown(rows, counts).splitlines()) == 11


def test_the_report_leaves_heavy_libraries_alone():
    code = "import sys, nc_audit.report; print({'torch', 'pandas', 'datasets', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_some_rows_are_read_as_all_are_and_in_the_order_asked_for(run, monkeypatch):
    monkeypatch.setattr(sys.modules[joined.__module__], "_AT_ONCE", 2)
    columns = {"pairs": ["caption"], "scores": ["noise_score"], "tags": ["tag", "reasons"]}
    whole = joined(run, **columns)
    rows = pa.chunked_array([whole["row"].to_pylist()[::-2]])
    some = joined(run, **columns, rows=rows)
    places = [whole["row"].to_pylist().index(row) for row in rows.to_pylist()]
    assert str(some.to_pylist()) == str(whole.take(places).to_pylist())  # as text: not a number equals itself
    assert joined(run, **columns, rows=rows.slice(0, 0)).num_rows == 0


def test_rows_that_a_table_lacks_are_told(run):
    with pytest.raises(RunError) as caught:
        joined(run, pairs=["caption"], rows=pa.chunked_array([[0, 10**9]]))
    assert str(caught.value) == (
        f"{run.path}: pairs.parquet is stale: 1 of 2 rows are not in it (score the dataset again with --force)"
    )


def test_a_dataset_of_a_bucket_is_told_as_the_user_named_it(tmp_path):
    dataset = {"path": "/cache/snapshots/0f", "given": "s3://bucket/shards"}
    run = make_run(tmp_path / "toy", [Pair(0, "a red house")], dataset=dataset)
    assert summary(run)["dataset"] == "s3://bucket/shards"
