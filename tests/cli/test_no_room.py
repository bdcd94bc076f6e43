"""Commands for which there is no room: one clear line, exit code 2, nothing half-written, and the same bytes later."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make_run import Pair, make_run, picture

from nc_audit.run import file_digest

STAGES = {
    "score": {
        "key": "k",
        "files": ["scores.parquet"],
        "seconds": 0.0,
        "noise_rate": {
            "estimate": 0.2,
            "low": 0.1,
            "high": 0.3,
            "level": 0.9,
            "evidence": "good",
            "expected_auroc": 0.9,
        },
    },
    "tag": {
        "key": "t",
        "files": ["tags.parquet"],
        "seconds": 0.0,
        "thresholds": {"clean_at": 0.2, "noisy_at": 0.8},
    },
    "train": {"pairs": 60, "images": 60, "captions": 60, "whole_images": False, "seconds": 0.0},
    "embed": {"encoders": {"image": "patches", "text": "tfidf"}, "seconds": 0.0, "cut_captions": 0},
    "load": {"seconds": 0.0},
}
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from nc_audit.cli import main
main()
"""
FIX = "fix: make room, then give the same command again; nothing half-written stands in its way"


def nc(*args: str, cwd: Path, limit: int | None = None, **kwargs: object) -> subprocess.CompletedProcess[str]:
    start = ["-m", "nc_audit"] if limit is None else ["-c", LIMITED.format(limit=limit)]
    return subprocess.run(
        [sys.executable, *start, *args],
        cwd=cwd,
        text=True,
        stderr=subprocess.PIPE,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        **({"stdout": subprocess.PIPE} | kwargs),  # type: ignore[call-overload]
    )


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.json")
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tagged run of sixty pairs, and their images."""
    tmp_path = tmp_path / "place"
    (tmp_path / "images").mkdir(parents=True)
    for number in range(60):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number, side=40))
    pairs = [
        Pair(
            n,
            caption=f"a house numbered {n} beside a road " + "with a long hedge " * 9,
            probability=n / 60,
            noise_score=n / 10,
            more={"neighbour_distance": 0.1},
        )
        for n in range(60)
    ]
    make_run(
        tmp_path / "run", pairs, stages=STAGES, dataset={"path": "drawn", "roots": {"dataset": str(tmp_path)}}
    )
    return tmp_path


@pytest.mark.parametrize(
    ("command", "limit", "path"),
    [
        (["tag", "--run", "run", "--budget", "50%"], 2000, "run/tags.parquet"),
        (["report", "--run", "run", "--format", "csv", "--out", "out.csv"], 2000, "out.csv"),
        pytest.param(
            ["report", "--run", "run", "--format", "html", "--out", "out.html"],
            2000,
            "out.html",
            marks=pytest.mark.slow,
        ),
        (["export", "--run", "run", "--out", "out"], 2000, "out"),
        (["export", "--run", "run", "--out", "out", "--format", "webdataset"], 20_000, "out"),
        pytest.param(
            ["export", "--run", "run", "--out", "out", "--format", "jsonl"],
            2000,
            "out",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["review", "--run", "run", "--export", "out.jsonl", "--format", "argilla"],
            200,
            "out.jsonl",
            marks=pytest.mark.slow,
        ),
        (["demo", "out", "--images", "40"], 2000, "out"),
    ],
    ids=lambda value: "-".join(value[:1] + value[5:]) if isinstance(value, list) else str(value),
)
def test_a_command_without_room_leaves_things_as_they_were(
    place: Path, command: list[str], limit: int, path: str
) -> None:
    is_exact = command[0] in ("tag", "export")
    if is_exact:
        shutil.copytree(place, place.parent / "calm")
    before = tree(place)
    failed = nc(*command, cwd=place, limit=limit)
    first, second = failed.stderr.splitlines()
    assert failed.returncode == 2
    assert first.startswith(
        f"error: a file would be larger than is allowed here: {path} could not be written ("
    )
    assert second == FIX
    assert failed.stdout == ""
    assert tree(place) == before
    assert nc(*command, cwd=place).returncode == 0
    assert tree(place) != before
    if is_exact:
        assert nc(*command, cwd=place.parent / "calm").returncode == 0
        assert tree(place) == tree(place.parent / "calm")


@pytest.mark.parametrize(
    "command", [["report", "--run", "run"], ["report", "--run", "run", "--json"], ["--help"]]
)
def test_output_that_cannot_be_written_is_told(place: Path, command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        failed = nc(*command, cwd=place, stdout=full)
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [
        "error: the output could not be written: its disk is full",
        "fix: send it elsewhere, or make room there",
    ]


def test_notes_that_cannot_be_written_stop_nothing(place: Path) -> None:
    script = f"exec 2>/dev/full; exec {sys.executable} -m nc_audit report --run run --format csv"
    done = subprocess.run(["sh", "-c", script], cwd=place, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 21


# Size of the disk in kB, and what no longer goes onto it.
SIZES = [
    (12, "pairs.parquet"),
    (400, "embeddings/fitted-"),
    (8820, "model/heads.safetensors"),
    (10_900, "scores.parquet"),
]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize(("size", "name"), SIZES)
def test_a_score_on_a_full_disk_goes_on_to_the_same_bytes(tmp_path: Path, size: int, name: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    settings = ["--encoder", "builtin", "--set", "train.steps=20", "--set", "train.epochs=3"]
    try:
        nc("demo", "drawn", "--images", "60", cwd=tmp_path)
        failed = nc("score", "drawn", *settings, "--out", "disk/run", cwd=tmp_path)
        assert failed.returncode == 2
        first, second = failed.stderr.splitlines()[-2:]
        assert first.startswith(f"error: the disk is full: disk/run/{name}")
        assert second == FIX
        assert [path.name for path in disk.rglob(".*")] == [".lock"]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert nc("score", "drawn", *settings, "--out", "disk/run", cwd=tmp_path).returncode == 0
        assert nc("score", "drawn", *settings, "--out", "calm", cwd=tmp_path).returncode == 0
        assert tree(disk / "run") == tree(tmp_path / "calm")
    finally:
        subprocess.run(["umount", disk], check=False)
