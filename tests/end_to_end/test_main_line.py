"""The main line through the real command: planted noise in, cleaned export out, on drawn data with no weights."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from nc_audit.run import Run, file_digest

QUICK = ["--encoder", "builtin", "--set", "train.steps=120", "--set", "train.epochs=6"]
QUICK += ["--set", "train.draws=1"]
TABLES = ["pairs.parquet", "scores.parquet", "tags.parquet", "model/trajectory.parquet"]


def nc(*args: str | Path, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "nc_audit", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert not ok or done.returncode == 0, done.stderr
    return done


def rewrite(source: Path, target: Path, change: object) -> Path:
    """A copy of a drawn set with its rows changed."""
    shutil.copytree(source, target)
    with (source / "metadata.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    with (target / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *change(rows)])  # type: ignore[operator]
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("main_line")
    nc("demo", "drawn", "--images", "160", "--noise", "0.3", cwd=place)
    nc("score", "drawn", *QUICK, cwd=place)
    return place


def joined(run: Path) -> dict[str, np.ndarray]:
    pairs, scores, tags = (pq.read_table(run / f"{name}.parquet") for name in ("pairs", "scores", "tags"))
    assert (
        pairs["row"].to_pylist()
        == scores["row"].to_pylist()
        == tags["row"].to_pylist()
        == list(range(len(pairs)))
    )
    table = {
        name: pairs[name].to_pylist() for name in ("pair_id", "image", "caption", "status", "known_noise")
    }
    table |= {
        name: scores[name].to_pylist() for name in ("noise_score", "noise_probability", "loss", "energy")
    }
    return {name: np.array(values, dtype=object) for name, values in table.items()} | {
        "tag": np.array(tags["tag"].to_pylist(), dtype=object)
    }


def test_planted_noise_is_found_and_calibrated(place: Path) -> None:
    table = joined(place / "runs/drawn")
    ok = table["status"] == "ok"
    truth = table["known_noise"][ok].astype(bool)
    probability = table["noise_probability"][ok].astype(float)
    assert roc_auc_score(truth, table["noise_score"][ok].astype(float)) > 0.95
    assert abs(probability.mean() - truth.mean()) < 0.08
    assert truth[table["tag"][ok] == "noisy"].mean() > 0.9


def test_broken_rows_keep_their_place_with_a_status_and_no_score(place: Path) -> None:
    table = joined(place / "runs/drawn")
    broken = table["status"] != "ok"
    assert sorted(table["status"][broken]) == ["corrupt_image", "empty_caption", "missing_image"]
    assert all(value is None for value in table["noise_score"][broken])
    assert all(value is None for value in table["tag"][broken])


def test_the_three_lines_reconcile(place: Path) -> None:
    reported = nc("report", "--top", "200", cwd=place).stdout
    assert len(reported.splitlines()) > 150
    nc("export", "--drop", "noisy", cwd=place)
    table = joined(place / "runs/drawn")
    kept = int(np.isin(table["tag"], ["clean", "ambiguous"]).sum())
    exported = sum(
        pq.read_metadata(path).num_rows for path in (place / "runs/drawn/export").rglob("*.parquet")
    )
    with (place / "runs/drawn/export/dropped.csv").open(newline="", encoding="utf-8") as file:
        dropped = len(list(csv.reader(file))) - 1
    assert (exported, dropped) == (kept, len(table["tag"]) - kept)


def test_every_json_output_is_one_document(place: Path) -> None:
    for args in (["report", "--json"], ["runs", "--json"], ["tag", "--json"]):
        json.loads(nc(*args, cwd=place).stdout)


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(place: Path) -> None:
    run = place / "runs/drawn"
    before = sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*"))
    new = json.loads(nc("score", "drawn", *QUICK, "--dry-run", "--json", "--out", "new", cwd=place).stdout)
    known = json.loads(nc("score", "drawn", *QUICK, "--dry-run", "--json", cwd=place).stdout)
    said = nc("score", "drawn", *QUICK, "--dry-run", cwd=place).stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*")) == before
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    summary = manifest["summary"]
    # The corrupt image, with its caption, is only found when it is decoded.
    assert (new["rows"], new["pairs"]) == (summary["rows"], summary["pairs"] + 1)
    assert (new["images"]["total"], new["images"]["held"]) == (161, 0)
    assert (known["images"]["held"], known["captions"]["held"]) == (161, known["captions"]["total"])
    assert (new["fetch"], new["device"]) == (None, "cpu")
    size = sum(
        path.stat().st_size
        for path in run.rglob("*")
        if path.suffix in (".parquet", ".arrow", ".safetensors")
    )
    assert new["disk"]["total"] == pytest.approx(size, rel=0.3)
    assert known["disk"]["embeddings"] == 0
    assert new["memory"]["embeddings"] == 2 * (161 * 512 + new["captions"]["total"] * 384)
    assert "images: 0 to embed with patches, 161 held by the run" in said.splitlines()
    assert said.splitlines()[-1] == "nothing was written; the same command without --dry-run does it"


@pytest.mark.slow
def test_only_what_is_new_is_embedded(place: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "tiny.safetensors")
    encoder = ["--image-encoder", "timm:test_vit", "--image-weights", "tiny.safetensors", *QUICK[2:]]

    def embedded(change: object) -> tuple[int, int]:
        shutil.rmtree(tmp_path / "grown", ignore_errors=True)
        rewrite(place / "drawn", tmp_path / "grown", change)
        summary = json.loads(nc("score", "grown", *encoder, "--json", cwd=tmp_path).stdout)
        return summary["embedded"]["images"], summary["held"]["images"]

    def without_two(rows: list[list[str]]) -> list[list[str]]:
        return [row for row in rows if row[0] not in ("images/scene_0007.jpg", "images/scene_0100.png")]

    def edited(rows: list[list[str]]) -> list[list[str]]:
        return [[row[0], f"{row[1]} at noon", *row[2:]] for row in rows]

    assert embedded(without_two) == (159, 0)
    assert embedded(lambda rows: rows) == (2, 159)
    assert embedded(edited) == (0, 161)
    assert embedded(lambda rows: rows[::-1]) == (0, 161)


def test_a_finished_run_is_left_alone(place: Path) -> None:
    before = {name: (place / "runs/drawn" / name).stat().st_mtime_ns for name in TABLES}
    nc("score", "drawn", *QUICK, cwd=place)
    assert before == {name: (place / "runs/drawn" / name).stat().st_mtime_ns for name in TABLES}


def test_every_draw_leaves_its_heads_and_evidence_and_none_that_is_gone(place: Path, tmp_path: Path) -> None:
    brief = ["--encoder", "builtin", "--limit", "200", "--out", "twice", "--set", "train.steps=12"]
    brief += ["--set", "train.epochs=3", "--set", "train.pace_from=1"]
    second = [
        "model/draw_2/heads.safetensors",
        "model/draw_2/evidence.parquet",
        "model/draw_2/swaps.parquet",
    ]
    nc("score", place / "drawn", *brief, "--set", "train.draws=2", cwd=tmp_path)
    run = Run.open(tmp_path / "twice")
    assert run.stage("train")["draws"] == 2
    assert set(second) <= set(run.manifest["files"])
    assert all(run.manifest["files"][name]["sha256"] == file_digest(run.path / name) for name in second)
    nc("score", place / "drawn", *brief, "--set", "train.draws=1", cwd=tmp_path)
    run = Run.open(tmp_path / "twice")
    assert run.stage("train")["draws"] == 1
    assert not set(second) & set(run.stage("train")["files"])
    assert not (run.path / "model/draw_2").exists()


def test_tagging_anew_needs_no_scoring_and_is_not_overwritten(place: Path) -> None:
    run = place / "runs/drawn"
    scores, tags = file_digest(run / "scores.parquet"), file_digest(run / "tags.parquet")
    nc("tag", "--budget", "5%", cwd=place)
    retagged = file_digest(run / "tags.parquet")
    assert (joined(run)["tag"] == "noisy").sum() <= 0.05 * len(joined(run)["tag"])
    again = nc("score", "drawn", *QUICK, cwd=place)
    assert file_digest(run / "tags.parquet") == retagged
    assert "--force brings the recipe's thresholds back" in again.stderr
    nc("score", "drawn", *QUICK, "--force", cwd=place)
    assert (file_digest(run / "scores.parquet"), file_digest(run / "tags.parquet")) == (scores, tags)


def test_shuffled_and_duplicated_rows_score_the_same(place: Path) -> None:
    def change(rows: list[list[str]]) -> list[list[str]]:
        more = rows + rows[::7]
        random.Random(1).shuffle(more)
        return more

    rewrite(place / "drawn", place / "shuffled", change)
    nc("score", "shuffled", *QUICK, cwd=place)
    one, two = joined(place / "runs/drawn"), joined(place / "runs/shuffled")
    before = dict(
        zip(
            one["pair_id"],
            zip(one["noise_score"], one["noise_probability"], one["loss"], strict=True),
            strict=True,
        )
    )
    assert len(two["pair_id"]) > len(one["pair_id"])
    for pair_id, *values in zip(
        two["pair_id"], two["noise_score"], two["noise_probability"], two["loss"], strict=True
    ):
        assert (
            values == [None] * 3
            if before[pair_id][0] is None
            else np.allclose(values, before[pair_id], atol=1e-5)
        )


def test_a_second_process_is_refused(place: Path) -> None:
    run = ["--run", "runs/drawn"]
    commands = {
        "wait for it, or score into another --out": [
            ["score", "drawn", *QUICK],
            ["tag", *run],
            ["evaluate", *run],
        ],
        "wait for it": [["export", *run], ["review", *run, "--no-browser"]],
    }
    with Run(place / "runs/drawn").locked():
        holder = (place / "runs/drawn/.lock").read_text(encoding="utf-8")
        for fix, refused in commands.items():
            for command in refused:
                failed = nc(*command, cwd=place, ok=False)
                assert (failed.returncode, failed.stdout) == (2, "")
                assert failed.stderr.splitlines() == [
                    f"error: runs/drawn is in use by {holder}",
                    f"fix: {fix}",
                ]
    assert holder.startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(
    ("args", "message", "fix"),
    [
        (
            ["score", "nothere"],
            "error: nothere does not exist",
            "fix: name a folder or a file with captions and images",
        ),
        (
            ["score", "drawn", "--encoder", "tfdif"],
            "error: unknown encoder 'tfdif'",
            "fix: did you mean tfidf?",
        ),
        (
            ["score", "drawn", "--set", "train.setps=3"],
            "error: the recipe has 1 problem: unknown key train.setps (did you mean steps?)",
            "fix: nc-audit recipes show self_paced lists every key",
        ),
        (
            ["score", "drawn", "--recipe", "nope.toml"],
            "error: recipe nope.toml is not a file",
            "fix: nc-audit recipes lists those that come with the tool",
        ),
        (
            ["report", "--run", "nothere"],
            "error: nothere is not a run: it has no run.json",
            "fix: nc-audit score DATASET makes one; nc-audit runs lists them",
        ),
        (["export", "--drop", "nosy"], "error: drop: there is no tag 'nosy'", "fix: did you mean noisy?"),
        (["score", "drawn", "--device", "tpu"], "error: unknown device 'tpu'", "fix: known: auto, cpu, cuda"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(
    place: Path, args: list[str], message: str, fix: str
) -> None:
    failed = nc(*args, cwd=place, ok=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [message, fix]
    assert failed.stdout == ""


def test_too_few_pairs_are_refused_with_their_number(place: Path) -> None:
    rewrite(place / "drawn", place / "few", lambda rows: rows[:3])
    failed = nc("score", "few", *QUICK, cwd=place, ok=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-2:] == [
        "error: 3 distinct pairs of 1 images and 3 captions are too few to audit",
        "fix: give at least 40 pairs with 10 different images and captions",
    ]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(place: Path) -> None:
    command = [sys.executable, "-m", "nc_audit", "score", "drawn", *QUICK, "--out", "killed"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    nc("score", "drawn", *QUICK, "--out", "whole", cwd=place)
    whole = time.monotonic() - start
    for share in (0.2, 0.4, 0.6, 0.8):
        process = subprocess.Popen(
            command,
            cwd=place,
            env=env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(share * whole)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    nc("score", "drawn", *QUICK, "--out", "killed", cwd=place)
    assert {n: file_digest(place / "killed" / n) for n in TABLES} == {
        n: file_digest(place / "whole" / n) for n in TABLES
    }


@pytest.mark.slow
def test_an_open_clip_checkpoint_runs_the_same_path(place: Path) -> None:
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), place / "b32.pt")
    nc("score", "drawn", "--encoder", "open_clip:ViT-B-32@b32.pt", *QUICK[2:], "--out", "clip", cwd=place)
    assert (joined(place / "clip")["status"] == "ok").sum() == (
        joined(place / "runs/drawn")["status"] == "ok"
    ).sum()


@pytest.mark.slow
def test_a_rerun_follows_decisions_and_leaves_their_file_alone(place: Path) -> None:
    run = place / "runs/decided"
    shutil.copytree(place / "runs/drawn", run)
    before = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    tags = pq.read_table(run / "tags.parquet").to_pylist()
    noisy, clean = (next(one["pair_id"] for one in tags if one["tag"] == tag) for tag in ("noisy", "clean"))
    lines = [
        json.dumps({"time": "2026-11-22T10:00:00Z", "reviewer": "ann", "pair_id": one, "decision": decision})
        for one, decision in ((noisy, "keep"), (clean, "drop"))
    ]
    (run / "decisions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = (run / "decisions.jsonl").read_bytes()

    nc("score", "drawn", *QUICK, "--out", run, cwd=place)
    after = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    assert {name for name in after if after[name] != before[name]} == {"score", "tag"}
    by_pair = {
        one["pair_id"]: (one["tag"], one["decided_by"])
        for one in pq.read_table(run / "tags.parquet").to_pylist()
    }
    assert (by_pair[noisy], by_pair[clean]) == (("clean", "ann"), ("noisy", "ann"))
    assert "nothing to do" in nc("score", "drawn", *QUICK, "--out", run, cwd=place).stderr

    (run / "decisions.jsonl").unlink()
    nc("score", "drawn", *QUICK, "--out", run, cwd=place)
    assert pq.read_table(run / "tags.parquet").to_pylist() == tags
    (run / "decisions.jsonl").write_bytes(content)
    nc("tag", "--run", run, "--noisy-at", "0.9", cwd=place)
    assert (run / "decisions.jsonl").read_bytes() == content
    dropped = nc("export", "--run", run, "--drop", "noisy", cwd=place)
    assert dropped.returncode == 0
    with (run / "export/dropped.csv").open(newline="", encoding="utf-8") as file:
        assert clean in {row["pair_id"] for row in csv.DictReader(file)}
