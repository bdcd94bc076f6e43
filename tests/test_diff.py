"""Which pairs changed between two runs, through the library and the command line."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from make_run import Pair, make_run, pair_id

from nc_audit.cli import app
from nc_audit.diff import diff_runs
from nc_audit.run import Run

KEPT = Pair(0, "a red house")
GONE, NEW = Pair(1, "only before"), Pair(2, "only [red]after[/red]\x1b[31m")
BEFORE = Pair(3, "a boat", tag="clean", probability=0.125)
AFTER = Pair(3, "a boat", tag="noisy", probability=0.875, reasons=["8 other captions fit the image better"])
LOST = Pair(4, "a road", status="missing_image")
FOUND = Pair(4, "a road", tag="ambiguous", probability=0.5, reasons=["evidence conflicts: 50% likely noise"])


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, Run]:
    before = make_run(tmp_path / "a", [KEPT, KEPT, GONE, BEFORE, LOST])
    return before, make_run(tmp_path / "b", [FOUND, AFTER, NEW, KEPT])


def diff(*args: str) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = app(["diff", *args], standalone_mode=False)
    return code or 0, out.getvalue(), err.getvalue()


def test_the_whole_output(runs: tuple[Run, Run]) -> None:
    code, out, err = diff(*(str(run.path) for run in runs))
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines == [
        "before / after clean ambiguous noisy not audited",
        "clean 1 0 1 0",
        "ambiguous 0 0 0 0",
        "noisy 0 0 0 0",
        "not audited 0 1 0 0",
        "2 pairs changed tag",
        "row 0 images/4.png a road",
        "was not audited",
        "now ambiguous 0.50 (evidence conflicts: 50% likely noise)",
        "row 1 images/3.png a boat",
        "was clean 0.12",
        "now noisy 0.88 (8 other captions fit the image better)",
        "1 pair in the first run only",
        "row 2 images/1.png only before",
        "1 pair in the second run only",
        "row 2 images/2.png only [red]after[/red]\\x1b[31m",
    ]


def test_json_holds_all_counts_and_the_top(runs: tuple[Run, Run]) -> None:
    code, out, _ = diff(*(str(run.path) for run in runs), "--json", "--top", "1")
    assert code == 0
    told = json.loads(out)
    assert told["matrix"] == [
        {"before": "clean", "after": "clean", "pairs": 1},
        {"before": "clean", "after": "noisy", "pairs": 1},
        {"before": "not audited", "after": "ambiguous", "pairs": 1},
    ]
    assert (told["num_changed"], told["num_only_a"], told["num_only_b"]) == (2, 1, 1)
    assert [one["pair_id"] for one in told["changed"]] == [pair_id(LOST)]
    assert told["only_b"][0]["caption"] == NEW.caption


def test_a_run_does_not_differ_from_itself(runs: tuple[Run, Run]) -> None:
    same = diff_runs(runs[0], runs[0])
    assert (same.changes, same.only_a, same.only_b) == ([], [], [])
    assert sum(same.matrix.values()) == 4


def test_the_order_of_the_runs_mirrors_the_difference(runs: tuple[Run, Run]) -> None:
    there, back = diff_runs(*runs), diff_runs(*reversed(runs))
    assert {(b, a): n for (a, b), n in there.matrix.items()} == back.matrix
    assert [one.pair_id for one in there.changes] == [one.pair_id for one in back.changes]
    assert there.only_a == back.only_b


def test_a_folder_that_is_no_run(runs: tuple[Run, Run], tmp_path: Path) -> None:
    code, out, err = diff(str(runs[0].path), str(tmp_path))
    assert (code, out) == (2, "")
    assert err == (
        f"error: {tmp_path} is not a run: it has no run.json\n"
        "fix: nc-audit score DATASET makes one; nc-audit runs lists them\n"
    )
