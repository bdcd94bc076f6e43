"""Limits kept and broken, through the library and the command line."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from make_run import Pair, make_run

from nc_audit.cli import app
from nc_audit.errors import DatasetError
from nc_audit.findings import Found
from nc_audit.gate import Limit, check_run
from nc_audit.run import Run
from nc_audit.schema import FINDING_KINDS


@pytest.fixture
def run(tmp_path: Path) -> Run:
    pairs = [Pair(n, tag="noisy" if n < 2 else "ambiguous" if n < 5 else "clean") for n in range(9)]
    pairs.append(Pair(9, status="missing_image"))
    summary = {
        "rows": 10,
        "status": {"ok": 9, "missing_image": 1},
        "tags": {"clean": 4, "ambiguous": 3, "noisy": 2},
        "noise_rate": {"estimate": 0.21, "evidence": "good"},
        "findings": [
            {"kind": "duplicate_image", "count": 1, "detail": ""},
            {"kind": "near_duplicate_image", "count": 2, "detail": ""},
            {"kind": "cut_caption", "count": 4, "detail": ""},
        ],
    }
    stages = {"tag": {"key": "t", "files": []}}
    run = make_run(tmp_path / "run", pairs, summary=summary, stages=stages)
    found = Found()
    found.add("duplicate_image", 3, "image equals a.png (row 2)", 2)
    found.add("near_duplicate_image", 3, "image looks like b.png (row 4)", 4)
    found.add("near_duplicate_image", 4, "image looks like c.png (row 3)", 3)
    run.write_table("findings", found.table(run.table("pairs")))
    return run


def gate(run: Run, *args: str) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = app(["gate", "--run", str(run.path), *args], standalone_mode=False)
    return code or 0, out.getvalue(), err.getvalue()


def test_limits_kept_end_with_0(run: Run) -> None:
    code, out, err = gate(run, "--max-noisy", "2", "--max-unusable", "10%", "--max-leakage", "0")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["limit", "at", "most", "found"],
        ["noisy", "2", "2", "pass"],
        ["unusable", "10", "%", "10.00", "%", "pass"],
        ["leakage", "0", "0", "pass"],
    ]


def test_one_broken_limit_ends_with_1_and_all_are_shown(run: Run) -> None:
    code, out, _ = gate(run, "--max-noisy", "22%", "--max-rate", "0.3", "--max-duplicates", "1")
    assert code == 1
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["noisy", "22", "%", "22.22", "%", "FAIL"],
        ["rate", "30", "%", "21.00", "%", "pass"],
        ["duplicates", "1", "2", "FAIL"],
    ]


def test_json_is_one_document(run: Run) -> None:
    code, out, _ = gate(run, "--max-ambiguous", "2", "--max-cut-caption", "50%", "--json")
    assert code == 1
    assert json.loads(out) == {
        "run": str(run.path),
        "kept": False,
        "checks": [
            {"name": "ambiguous", "limit": 2, "value": 3.0, "unit": "rows", "kept": False},
            {"name": "cut_caption", "limit": 0.5, "value": 0.4, "unit": "share", "kept": True},
        ],
    }


def test_what_cannot_be_told_is_not_within_a_limit(run: Run) -> None:
    run.manifest["summary"]["noise_rate"]["evidence"] = "none"
    (check,) = check_run(run, {"rate": "100%"})
    assert (check.is_kept, check.shown()) == (False, "cannot be told")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: no limit is given\nfix: for example nc-audit gate --max-noisy 2%\n"),
        (
            ["--max-noisy", "0.5"],
            "error: --max-noisy '0.5' is neither a percentage nor a count\nfix: for example 2% or 10\n",
        ),
        (
            ["--max-other-script", "-1"],
            "error: --max-other-script '-1' is neither a percentage nor a count\nfix: for example 2% or 10\n",
        ),
        (["--max-rate", "3"], "error: --max-rate '3' is not a share\nfix: for example 5% or 0.05\n"),
    ],
)
def test_usage_errors_end_with_2(run: Run, args: list[str], message: str) -> None:
    assert gate(run, *args) == (2, "", message)


@pytest.mark.parametrize("text", ["101%", "nan", "1e9", "%", "", "٣", "²", "-5%"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(DatasetError):
        Limit.parse("noisy", text)


def test_every_kind_of_finding_has_an_option(run: Run) -> None:
    for kind in FINDING_KINDS:
        code, out, err = gate(run, f"--max-{kind.replace('_', '-')}", "100%")
        assert (code, err) == (0, ""), out


def test_an_unknown_limit_is_named(run: Run) -> None:
    with pytest.raises(DatasetError) as caught:
        check_run(run, {"leakages": "0"})
    assert str(caught.value) == "unknown limit leakages (did you mean leakage?)"
