"""Where an export may be written, and what a failed one leaves behind."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_run import Pair, make_run, reader

from nc_audit.errors import DatasetError, RunError
from nc_audit.export import export_run
from nc_audit.run import sign_lock


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", [Pair(0), Pair(1, "a plane", tag="noisy")])


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def beside(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["README.md", "croissant.json", "data/train-00000-of-00001.parquet", "dropped.csv", "export.json"]


def test_an_export_lists_its_files(run, tmp_path):
    result = export_run(run, tmp_path / "new" / "out", read_image=reader())
    assert result.files == WHOLE == names(tmp_path / "new" / "out")
    assert beside(tmp_path / "new") == ["out"]


def test_an_earlier_export_is_replaced_as_a_whole(run, tmp_path):
    out = tmp_path / "out"
    export_run(run, out, rematch=True, read_image=reader())
    assert "rematches.csv" in names(out)
    export_run(run, out, drop=["noisy"], read_image=reader())
    assert names(out) == WHOLE
    assert json.loads((out / "export.json").read_text(encoding="utf-8"))["kept"] == 1
    assert beside(tmp_path) == ["out", "run"]


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError) as caught:
        export_run(run, out, read_image=reader())
    assert str(caught.value) == (
        f"{out} holds files that are not of an earlier export: 1, such as 'thesis.tex' "
        "(give another --out, or --overwrite to delete all that is there)"
    )
    assert names(out) == ["thesis.tex"]
    export_run(run, out, overwrite=True, read_image=reader())
    assert names(out) == WHOLE


def test_files_added_to_an_earlier_export_are_not_deleted_unasked(run, tmp_path):
    out = tmp_path / "out"
    export_run(run, out, read_image=reader())
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("seen")
    with pytest.raises(
        DatasetError, match=r"holds files that are not of an earlier export: 1, such as 'notes/mine\.txt'"
    ):
        export_run(run, out, read_image=reader())
    assert (out / "notes" / "mine.txt").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"made_by": "somebody", "files": ["a"]}',
        '{"made_by": "nc-audit export"}',
        "[" * 100_000,
    ],
)
def test_a_marker_that_is_not_ours_protects_the_folder(run, tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text(text)
    with pytest.raises(DatasetError, match="holds files that are not of an earlier export: 1"):
        export_run(run, out, read_image=reader())
    assert (out / "export.json").read_text() == text


def test_the_run_and_the_dataset_are_never_replaced(tmp_path):
    dataset = tmp_path / "data" / "scenes"
    dataset.mkdir(parents=True)
    run = make_run(
        tmp_path / "runs" / "toy",
        [Pair(0)],
        dataset={"path": str(dataset), "roots": {"dataset": str(dataset)}},
    )
    for out, held in [
        (run.path, run.path),
        (run.path.parent, run.path),
        (dataset.parent, dataset),
        (dataset, dataset),
    ]:
        with pytest.raises(DatasetError) as caught:
            export_run(run, out, overwrite=True, read_image=reader())
        assert str(caught.value) == f"{out} cannot be replaced: it holds {held} (give another --out)"
    assert (run.path / "pairs.parquet").exists()


def test_a_file_in_the_place_is_refused(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DatasetError) as caught:
        export_run(run, tmp_path / "out", overwrite=True, read_image=reader())
    assert str(caught.value) == f"{tmp_path / 'out'} is a file, not a folder (give another --out)"


def test_an_interrupted_export_leaves_the_earlier_one(run, tmp_path):
    out = tmp_path / "out"
    export_run(run, out, read_image=reader())
    before = (out / "export.json").read_bytes()

    def interrupted(uri: str) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_run(run, out, drop=["noisy"], read_image=interrupted)
    assert (out / "export.json").read_bytes() == before
    assert beside(tmp_path) == ["out", "run"]


def test_what_a_killed_export_left_is_cleared(run, tmp_path):
    left = tmp_path / ".out.partial"
    (left / "data").mkdir(parents=True)
    (left / "data" / "train-00007.partial").write_bytes(b"half")
    (left / "odd").write_bytes(b"")
    export_run(run, tmp_path / "out", read_image=reader())
    assert names(tmp_path / "out") == WHOLE
    assert not left.exists()


def test_a_second_export_to_the_same_place_is_refused(run, tmp_path):
    lock = tmp_path / ".out.lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        sign_lock(handle)
        holder = lock.read_text()
        with pytest.raises(RunError) as caught:
            export_run(run, tmp_path / "out", read_image=reader())
    finally:
        os.close(handle)
    assert holder.startswith(f"process {os.getpid()} on ")
    assert (
        str(caught.value) == f"{tmp_path / 'out'} is in use by {holder} (wait for it, or give another --out)"
    )
    export_run(run, tmp_path / "out", read_image=reader())
    assert not lock.exists()


def test_an_export_of_a_run_that_is_being_written_is_refused(run, tmp_path):
    with run.locked(), pytest.raises(RunError, match=r"/run is in use by process \d+ on .* \(wait for it\)"):
        export_run(run, tmp_path / "out", read_image=reader())
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_hidden_place_is_not_followed(run, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    (tmp_path / ".out.partial").symlink_to(precious)
    with pytest.raises(DatasetError, match=r"\.out\.partial cannot be made: "):
        export_run(run, tmp_path / "out", read_image=reader())
    assert (precious / "file").read_text() == "keep"


def test_a_linked_folder_stays_a_link(run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    export_run(run, tmp_path / "out", read_image=reader())
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "real") == WHOLE


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from make_run import picture
from nc_audit.export import export_run
from nc_audit.run import Run, sign_lock

calls = 0

def read(uri):
    global calls
    calls += 1
    if calls == 3:
        print("in the middle", flush=True)
        time.sleep(60)
    return picture(calls)

export_run(Run.open(Path({run!r})), Path({out!r}), format="webdataset", overwrite=True, read_image=read)
"""


def test_a_process_killed_in_the_middle_leaves_the_earlier_export(tmp_path):
    run, out = make_run(tmp_path / "run", [Pair(i, f"caption {i}") for i in range(5)]), tmp_path / "out"
    export_run(run, out, format="jsonl", read_image=reader())
    before = names(out)
    code = KILLED.format(tests=str(Path(__file__).parents[1]), run=str(run.path), out=str(out))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in the middle\n"
        process.kill()
    assert names(out) == before
    assert beside(tmp_path) == [".out.lock", ".out.partial", "out", "run"]
    export_run(run, out, format="webdataset", read_image=reader())
    assert beside(tmp_path) == ["out", "run"]
    assert "data/train-000000.tar" in names(out)
