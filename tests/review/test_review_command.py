"""`nc-audit review` as it is typed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from make_run import picture
from review_runs import ids_of, lines_of, review_of, run_of
from typer.testing import CliRunner  # noqa: TID251

from nc_audit.cli import app


def typed(run, *arguments):
    return CliRunner().invoke(app, ["review", "--run", str(run.path), *map(str, arguments)])


def test_stats_say_who_decided_what(tmp_path):
    run = run_of(tmp_path / "run", 60)
    review = review_of(run, sample=40)
    for at, pair_id in enumerate(review.queue.pair_ids[:35]):
        review.decide(pair_id, "drop" if at % 2 else "keep", None, "ann")
    review.decide(review.queue.pair_ids[0], "drop", None, "bob")
    done = typed(run, "--stats")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["ann", "18", "17", "0", "0"]
    assert lines[2].split() == ["bob", "0", "1", "0", "0"]
    assert "35 pairs decided by people; their word wins over the tags" in lines
    assert f"reviewers disagree about 1: {review.queue.pair_ids[0]}" in lines
    assert "random sample: 35 of 40 pairs decided, 18 with a wrong caption" in lines
    told = json.loads(typed(run, "--stats", "--json").stdout)
    assert told["figures"]["decided"] == 35
    assert told["figures"]["level"] == 0.95
    assert told["statement"] == lines[lines.index(told["statement"][0]) :]


def test_import_lets_the_tags_follow_and_export_gives_the_decisions_back(tmp_path):
    run = run_of(tmp_path / "run")
    (tmp_path / "in.csv").write_text("row,decision\n0,keep\n2,drop\n")
    done = typed(run, "--import", tmp_path / "in.csv", "--reviewer", "ann")
    assert (done.exit_code, done.stdout) == (0, "2 decisions imported: 1 keep, 1 drop\n")
    assert run.table("tags")["tag"].to_pylist()[:3] == ["clean", "ambiguous", "noisy"]
    done = typed(run, "--export", tmp_path / "out.jsonl")
    assert (done.exit_code, done.stdout) == (0, f"2 entries written to {tmp_path / 'out.jsonl'}\n")
    again = typed(run, "--import", tmp_path / "out.jsonl", "--json")
    assert json.loads(again.stdout) == {"imported": 0, "unchanged": 2, "by_decision": {}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stats", "--export", "x.csv"], "error: --stats, --export and --import each stop when done"),
        (["--format", "csv"], "error: --format goes with --export"),
        (["--sample", "5", "--tag", "noisy"], "error: --sample draws from all pairs"),
        (["--reviewer", "model"], "error: 'model' is no name for a reviewer"),
        (["--tag", "noise"], "error: --tag: there is no tag 'noise'"),
        (["--import", "none.csv"], "error: there is no file none.csv"),
    ],
)
def test_what_cannot_be_is_told_in_two_lines(tmp_path, arguments, message):
    done = typed(run_of(tmp_path / "run"), *arguments)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[0] == message
    assert done.stderr.splitlines()[1].startswith("fix: ")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_review_in_good_order(tmp_path, how):
    run = run_of(tmp_path / "run")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture(0))
    command = [
        sys.executable,
        "-m",
        "nc_audit",
        "review",
        "--run",
        str(run.path),
        "--reviewer",
        "ann",
        "--no-browser",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        with urllib.request.urlopen(address + "image/image0000", timeout=10) as answer:
            assert answer.read(3) == b"\xff\xd8\xff"
        request = urllib.request.Request(
            address + "api/decide",
            json.dumps({"pair_id": ids_of()[0], "decision": "keep"}).encode(),
            {"Content-Type": "application/json", "Origin": "/".join(address.split("/")[:3])},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["decided"] == 1
        process.send_signal(how)
        told, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    assert "1 pair decided by people; their word wins over the tags" in told
    assert len(lines_of(run)) == 1
    assert run.table("tags")["decided_by"].to_pylist()[0] == "ann"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=2)
