"""The Ray engine: who gets a seat, what is said where it cannot work, and that its run is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import nc_audit
from nc_audit.cluster import Seat, _as_ours, score_on_cluster, seats_of
from nc_audit.errors import EncoderError, RunError
from nc_audit.recipe import build_recipe

HOME = str(Path(nc_audit.__file__).parents[1])
OPTIONS = ("--encoder", "builtin", "--set", "train.steps=60", "--set", "train.epochs=3")


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, object]:
    return {"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": alive, "Resources": resources}


def test_each_gpu_has_a_seat_with_its_share_of_the_processors():
    nodes = [node("1", CPU=8.0), node("2", CPU=16.0, GPU=3.0), node("3", GPU=1.0, CPU=4.0, alive=False)]
    assert seats_of(nodes, "auto") == [Seat("2", "10.0.0.2", 5, 1)] * 3
    assert seats_of(nodes, "cpu") == [Seat("1", "10.0.0.1", 8, 0), Seat("2", "10.0.0.2", 16, 0)]


def test_without_gpus_each_node_with_processors_has_a_seat():
    nodes = [node("1", CPU=0.0), node("2", CPU=2.0), node("3", CPU=4.0)]
    assert seats_of(nodes, "auto") == [Seat("2", "10.0.0.2", 2, 0), Seat("3", "10.0.0.3", 4, 0)]
    with pytest.raises(EncoderError, match=r"none of 3 nodes of the Ray cluster has a GPU \(--device cpu\)"):
        seats_of(nodes, "cuda")
    with pytest.raises(EncoderError, match="no node of the Ray cluster has a processor to give"):
        seats_of(nodes[:1], "auto")


@pytest.mark.parametrize(
    ("words", "was_lost", "expected"),
    [
        (
            "worker died\nkilled by signal 9",
            True,
            "a process on node 10.0.0.7 ended before it was done: killed by",
        ),
        (
            "x\nModuleNotFoundError: No module named 'nc_audit'",
            False,
            "node 10.0.0.7 cannot begin: ModuleNotFound",
        ),
    ],
)
def test_a_process_that_was_lost_or_cannot_begin_is_an_error_to_mend(words, was_lost, expected):
    found = _as_ours(RuntimeError(words), Seat("7", "10.0.0.7", 1, 0), was_lost=was_lost)
    assert isinstance(found, RunError)
    assert str(found).startswith(expected)


def test_any_other_error_of_a_process_stays_what_it_is():
    problem = ValueError("a fault of ours")
    assert _as_ours(problem, Seat("7", "10.0.0.7", 1, 0), was_lost=False) is problem


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EncoderError, match=r"--engine ray needs Ray \(pip install 'nc-audit\[ray\]'\)"):
        score_on_cluster(tmp_path, tmp_path / "run", build_recipe([]))


def test_a_cluster_that_does_not_answer_is_told_at_once(monkeypatch, tmp_path):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(RunError, match=r"the Ray cluster 127.0.0.1:1 cannot be reached: .*check RAY_ADDRESS"):
        score_on_cluster(tmp_path, tmp_path / "run", build_recipe([]))
    assert time.monotonic() - start < 30


def score(*words: str | Path, cwd: Path, address: str | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HOME}
    if address:
        env |= {"RAY_ADDRESS": address}
    command = [sys.executable, "-m", "nc_audit", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, check=False)


def test_an_unknown_engine_is_refused(tmp_path):
    done = score("score", ".", "--engine", "rey", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown engine 'rey'" in done.stderr
    assert "did you mean ray?" in done.stderr


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes on this machine, of one processor each."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", HOME)
        patch.setenv("OMP_NUM_THREADS", "1")  # as in `score`: the number of threads moves last bits
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            yield str(cluster.address)
        finally:
            cluster.shutdown()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    assert score("demo", "drawn", "--images", "1100", cwd=folder).returncode == 0
    return folder


@pytest.mark.slow
def test_two_nodes_make_the_run_of_one_process(address, drawn):
    assert score("score", "drawn", *OPTIONS, "--out", "one", cwd=drawn).returncode == 0
    done = score("score", "drawn", *OPTIONS, "--engine", "ray", "--out", "two", cwd=drawn, address=address)
    assert done.returncode == 0, done.stderr
    assert "Ray: 2 processes, one a node, on 2 nodes" in done.stderr
    assert "estimated noise rate" in done.stdout
    for name in ("pairs", "scores", "findings", "tags"):
        assert (drawn / f"one/{name}.parquet").read_bytes() == (drawn / f"two/{name}.parquet").read_bytes()
    shards = [sorted(path.name for path in (drawn / run / "embeddings").iterdir()) for run in ("one", "two")]
    assert shards[0] == shards[1]
    # Two of the 1,100 that were learnt from, one of what cannot be decoded.
    assert len([name for name in shards[0] if name.startswith("image-")]) == 3
    again = score("score", "drawn", *OPTIONS, "--engine", "ray", "--out", "two", cwd=drawn, address=address)
    assert "nothing to do: two is complete" in again.stderr


@pytest.mark.slow
def test_what_is_wrong_in_a_process_is_told_as_it_is_at_home(address, drawn):
    words = ("score", "drawn", "--image-encoder", "timm:mobilenetv2_100", "--text-encoder", "tfidf")
    done = score(*words, "--image-weights", "absent", "--engine", "ray", cwd=drawn, address=address)
    assert done.returncode == 2
    assert "error: --image-weights: there is no file absent" in done.stderr


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_command_and_the_same_command_goes_on(address, drawn):
    words = ("score", "drawn", *OPTIONS, "--out", "killed", "--engine", "ray")
    env = os.environ | {"PYTHONPATH": HOME, "RAY_ADDRESS": address}
    command = [sys.executable, "-m", "nc_audit", *words]
    with subprocess.Popen(command, cwd=drawn, stderr=subprocess.PIPE, text=True, env=env) as running:
        deadline = time.monotonic() + 120
        while not list(drawn.glob("killed/embeddings/fitted-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-f", "ray::_member"], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[-1]), 9)
        _, errors = running.communicate(timeout=120)
    assert running.returncode == 2, errors
    assert "ended before it was done" in errors
    assert "the same command goes on where it stopped" in errors
    done = score(*words, cwd=drawn, address=address)
    assert done.returncode == 0, done.stderr
    local = score("score", "drawn", *OPTIONS, "--out", "whole", cwd=drawn)
    assert local.returncode == 0
    assert (drawn / "killed/scores.parquet").read_bytes() == (drawn / "whole/scores.parquet").read_bytes()
