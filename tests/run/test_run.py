from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nc_audit.errors import DiskError, RunError, SchemaError
from nc_audit.pipeline import _is_ours
from nc_audit.run import (
    Run,
    digest_of,
    file_digest,
    list_runs,
    remember_latest,
    replacing,
    write_parquet,
)
from nc_audit.schema import TAGS


def tags_table(num: int = 3) -> pa.Table:
    return pa.table(
        [
            [f"p{i}" for i in range(num)],
            range(num),
            ["clean"] * num,
            [["why"]] * num,
            ["model"] * num,
            pa.nulls(num, pa.int64()),
            pa.nulls(num, pa.float32()),
        ],
        schema=TAGS,
    )


@pytest.fixture
def run(tmp_path) -> Run:
    """A run with one finished stage and one file."""
    made = Run(tmp_path / "runs" / "one")
    made.write_table("tags", tags_table())
    made.manifest["dataset"] = {"path": "pictures"}
    made.commit("tag", "key-1", {"tags.parquet": 3}, 0.12345, thresholds={"clean_at": 0.2})
    return made


# --- atomic replacement


def test_replacing_commits_on_success(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_succeeds(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    script = (
        "import os, sys; from pathlib import Path; from nc_audit.run import replacing\n"
        f"with replacing(Path({str(path)!r})) as partial:\n"
        "    partial.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_table_gives_the_same_bytes(tmp_path):
    write_parquet(tags_table(), tmp_path / "a.parquet")
    write_parquet(tags_table(), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pq.read_table(tmp_path / "a.parquet").equals(tags_table(), check_metadata=True)


def test_digests():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    assert digest_of([1, 2]) != digest_of([2, 1])
    assert len(digest_of("\ud800 lone surrogate")) == 32


def test_file_digest_is_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- stages


def test_a_committed_stage_is_done_under_its_key_only(run):
    again = Run.open(run.path)
    assert again.is_done("tag", "key-1")
    assert not again.is_done("tag", "key-2")
    assert not again.is_done("score", "key-1")


def test_what_a_commit_records(run):
    manifest = json.loads((run.path / "run.json").read_text())
    path = run.path / "tags.parquet"
    assert manifest["files"]["tags.parquet"] == {
        "rows": 3,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
    }
    entry = Run.open(run.path).stage("tag")
    assert (entry["key"], entry["files"], entry["seconds"]) == ("key-1", ["tags.parquet"], 0.123)
    assert entry["thresholds"] == {"clean_at": 0.2}


def test_a_tampered_file_makes_the_stage_stale(run):
    path = run.path / "tags.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert not Run.open(run.path).is_done("tag", "key-1")


def test_a_missing_file_makes_the_stage_stale(run):
    (run.path / "tags.parquet").unlink()
    assert not Run.open(run.path).is_done("tag", "key-1")


def test_a_folder_in_the_place_of_a_file_makes_the_stage_stale(run):
    (run.path / "tags.parquet").unlink()
    (run.path / "tags.parquet").mkdir()
    assert not Run.open(run.path).is_done("tag", "key-1")


def test_a_stage_that_is_not_done_names_the_command(run):
    with pytest.raises(RunError) as caught:
        run.stage("score")
    assert caught.value.message == f"{run.path}: stage score is not done"
    assert caught.value.hint == f"nc-audit score pictures --out {run.path} resumes it"


def test_a_missing_table_names_the_command(run):
    with pytest.raises(RunError) as caught:
        run.table("scores")
    assert caught.value.message == f"{run.path} has no scores.parquet"
    assert caught.value.hint == f"nc-audit score pictures --out {run.path} makes it"


def test_tables_are_checked_on_both_ways(run):
    assert run.table("tags").equals(tags_table())
    assert run.table("tags", ["tag"]).column_names == ["tag"]
    broken = tags_table().drop_columns(["reasons"])
    with pytest.raises(SchemaError) as caught:
        run.write_table("tags", broken)
    assert caught.value.message == "tags: column reasons is missing"
    write_parquet(broken, run.path / "tags.parquet")
    with pytest.raises(SchemaError, match="tags: column reasons is missing"):
        run.table("tags")


# --- opening


def test_no_run(tmp_path):
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path)
    assert caught.value.message == f"{tmp_path} is not a run: it has no run.json"
    assert caught.value.hint == "nc-audit score DATASET makes one; nc-audit runs lists them"


def test_a_manifest_that_is_cut_off(run):
    path = run.path / "run.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(RunError) as caught:
        Run.open(run.path)
    assert caught.value.message.startswith(f"{path} is not readable: ")
    assert caught.value.hint == "score the dataset again with --force"


@pytest.mark.parametrize("content", ['{"format": 99}', "[]", '"text"', "{}"])
def test_a_manifest_of_another_format(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path)
    assert caught.value.message == f"{tmp_path / 'run.json'} has another format than 1"
    assert caught.value.hint == "use the version of nc-audit that wrote it"


def test_a_manifest_without_stages_is_an_error_of_ours(tmp_path):
    (tmp_path / "run.json").write_text('{"format": 1}')
    with pytest.raises(RunError):
        Run.open(tmp_path).stage("load")


# --- the lock

HOLDER = """
import sys; from pathlib import Path; from nc_audit.run import Run
with Run(Path(sys.argv[1])).locked():
    print("held", flush=True); sys.stdin.readline()
"""


def test_a_run_held_by_another_process_is_refused(tmp_path):
    path = tmp_path / "one"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(RunError) as caught, Run(path).locked():
            pytest.fail("two processes hold one run")
        with pytest.raises(RunError) as read, Run(path).settled():
            pytest.fail("a run is read while it is written")
        assert time.monotonic() - start < 1
        who = rf"process {holder.pid} on {re.escape(socket.gethostname())} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        assert re.fullmatch(rf"{re.escape(str(path))} is in use by {who}", caught.value.message)
        assert caught.value.hint == "wait for it, or score into another --out"
        assert (read.value.message, read.value.hint) == (caught.value.message, "wait for it")
        holder.stdin.write("\n")
    with Run(path).locked():
        assert (path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert (path / ".lock").read_text() == ""


def test_a_killed_holder_does_not_keep_the_run(tmp_path):
    path = tmp_path / "one"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
        holder.wait()
    assert (path / ".lock").read_text().startswith(f"process {holder.pid} on ")
    with Run(path).locked():
        pass


def test_a_lock_of_a_process_whose_number_went_to_another_does_not_keep_the_run(tmp_path):
    (tmp_path / ".lock").write_text(
        f"process {os.getpid()} on {socket.gethostname()} since 2026-11-23 06:40:12 UTC"
    )
    with Run(tmp_path).locked():
        pass


def test_who_writes_waits_for_who_reads_but_not_for_ever(run, monkeypatch):
    with run.locked():
        pass
    with run.settled(), run.settled():
        monkeypatch.setattr("nc_audit.run._READERS_NEED", 0.1)
        with pytest.raises(RunError) as caught, run.locked():
            pytest.fail("a run is written while it is read")
    assert caught.value.message == f"{run.path} is in use by another process, which reads it"
    with run.locked():
        pass


def test_who_reads_sees_the_manifest_as_it_is_by_then(run):
    with run.locked():
        pass
    other = Run.open(run.path)
    other.manifest["dataset"] = {"path": "elsewhere"}
    other.save()
    with run.settled():
        assert run.manifest["dataset"] == {"path": "elsewhere"}


def test_a_run_that_cannot_be_locked_can_be_read(run):
    with run.settled():
        assert not (run.path / ".lock").exists()


# --- no room


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota of the disk is used up"),
        (OSError(errno.EFBIG, "File too large"), "a file would be larger than is allowed here"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
    ],
)
def test_a_write_without_room_says_what_and_where_and_leaves_nothing(tmp_path, problem, why):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise problem

    with pytest.raises(DiskError) as caught:
        fail()
    found = re.fullmatch(
        rf"{why}: {re.escape(str(path))} could not be written \([\d,.]+ MB free in {re.escape(str(tmp_path))}\)",
        caught.value.message,
    )
    assert found
    assert (
        caught.value.hint
        == "make room, then give the same command again; nothing half-written stands in its way"
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "problem", [PermissionError(errno.EACCES, "Permission denied"), ValueError("os error")]
)
def test_what_failed_for_other_reasons_passes_as_it_is(tmp_path, problem):
    def fail() -> None:
        with replacing(tmp_path / "file"):
            raise problem

    with pytest.raises(type(problem)) as caught:
        fail()
    assert caught.value is problem


# --- latest and lists


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with two runs and things that are none."""
    folder = tmp_path / "runs"
    for name in ("b", "a"):
        Run(folder / name).path.mkdir(parents=True)
        Run(folder / name).save()
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "run.json").write_text("{")
    (folder / "file").write_text("")
    return folder


def test_runs_by_name_without_unreadable_ones_and_latest(runs):
    remember_latest(runs / "a", runs)
    assert [run.path for run in list_runs(runs)] == [runs / "a", runs / "b"]
    assert list_runs(runs / "nowhere") == []


def test_latest_is_a_relative_link_that_moves(runs):
    remember_latest(runs / "a", runs)
    assert (runs / "latest").readlink() == Path("a")
    assert Run.latest(runs).path == runs / "a"
    remember_latest(runs / "b", runs)
    assert Run.latest(runs).path == runs / "b"
    assert not [p for p in runs.iterdir() if "partial" in p.name]


def test_latest_may_point_out_of_the_folder(runs, tmp_path):
    elsewhere = Run(tmp_path / "elsewhere")
    elsewhere.path.mkdir()
    elsewhere.save()
    remember_latest(elsewhere.path, runs)
    assert Run.latest(runs).path == elsewhere.path.resolve()


@pytest.mark.parametrize("state", ["nothing", "dangling"])
def test_no_latest_run(runs, state):
    if state == "dangling":
        (runs / "latest").symlink_to("gone")
    with pytest.raises(RunError) as caught:
        Run.latest(runs)
    assert caught.value.message == f"no run yet under {runs}/"
    assert caught.value.hint == "nc-audit score DATASET, or name one with --run DIR"


# --- what is a run


@pytest.mark.parametrize(
    ("names", "is_ours"),
    [
        ([], True),
        (["run.json", "anything"], True),
        ([".lock"], True),
        ([".lock", "pairs.parquet"], True),
        ([".lock", ".run.json.partial", ".pairs.parquet.partial"], True),
        (["pairs.parquet"], False),
        ([".lock", "holiday.jpg"], False),
        (["holiday.jpg"], False),
    ],
)
def test_a_run_stopped_before_its_manifest_stood_is_told_from_a_folder_of_others(tmp_path, names, is_ours):
    for name in names:
        (tmp_path / name).write_text("")
    assert _is_ours(tmp_path) == is_ours


def test_a_table_without_a_column_that_is_needed_is_told(run):
    with pytest.raises(RunError) as caught:
        run.table("tags", ["row", "mood", "age"])
    assert str(caught.value) == (
        f"{run.path / 'tags.parquet'} has no column age, mood (score the dataset again with --force)"
    )
