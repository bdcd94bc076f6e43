"""`nc-audit export` as it is typed."""

from __future__ import annotations

import json

import pytest
from make_run import Pair, make_run, picture
from typer.testing import CliRunner  # noqa: TID251

from nc_audit.cli import app
from nc_audit.export import FORMATS

PAIRS = [Pair(0, "a red house"), Pair(1, "=a plane", tag="noisy"), Pair(2, "a boat", split="test")]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    for pair in PAIRS:
        (tmp_path / "data" / "images" / f"{pair.number}.png").write_bytes(picture(pair.number))
    dataset = {"path": str(tmp_path / "data"), "roots": {"dataset": str(tmp_path / "data")}}
    return make_run(tmp_path / "run", PAIRS, dataset=dataset)


def typed(run, *words):
    return CliRunner().invoke(app, ["export", "--run", str(run.path), *words])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_a_word(run, tmp_path, form):
    result = typed(run, "--format", form, "--drop", "noisy", "--out", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["rows"], told["kept"], told["dropped"]) == (3, 2, {"tag: noisy": 1})
    assert all((tmp_path / "out" / name).is_file() for name in told["files"])


def test_what_cannot_be_changes_nothing(run, tmp_path):
    for words, message, fix in [
        (
            ("--format", "cocoa"),
            "error: unknown export format 'cocoa'",
            "fix: did you mean coco?",
        ),
        (
            ("--format", "datacomp", "--reweight"),
            "error: --reweight: datacomp is a list of ids, which cannot carry weights",
            "fix: take another --format",
        ),
    ]:
        result = typed(run, *words, "--out", str(tmp_path / "out"))
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines() == [message, fix]
        assert not (tmp_path / "out").exists()


def test_a_rematch_that_is_not_there_is_one_line(run, tmp_path):
    result = typed(run, "--rematch", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert result.stderr == "! --rematch changes nothing: the run found no confident re-match\n"
    assert result.stdout.splitlines()[0].startswith("3 of 3 rows exported to ")


def test_force_replaces_what_is_not_ours(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert typed(run, "--out", str(tmp_path / "out")).exit_code == 2
    assert (tmp_path / "out" / "thesis.tex").exists()
    assert typed(run, "--out", str(tmp_path / "out"), "--force").exit_code == 0
    assert not (tmp_path / "out" / "thesis.tex").exists()


def test_the_recipe_decides_where_the_command_does_not(run, tmp_path):
    export = {"format": "jsonl", "drop": ["noisy"], "reweight": True}
    run.manifest["recipe"] = {"name": "mine", "digest": "0f", "settings": {"export": export}}
    run.save()
    out = tmp_path / "out"
    assert typed(run, "--out", str(out)).exit_code == 0
    records = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [record["weight"] for record in records] == [0.9, 0.9]
    assert typed(run, "--out", str(out), "--format", "csv", "--drop", "").exit_code == 0
    assert len((out / "captions.csv").read_text().splitlines()) == 4
