"""The Ray engine: an audit on the nodes of a Ray cluster, started from any of them or from a laptop's own processes.

What `torchrun` does on one machine, `score --engine ray` does on many: one process a GPU, or one a node where there is
no GPU, embed together, each its share of the shards. The first one makes the run, trains and scores, so that the
machine where the command was typed needs no GPU; it starts them and shows what the first one says. They meet in the
run's folder, which all nodes must see under the same path, as they must the dataset and files of weights.
No tensor passes through Ray, only words.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nc_audit import __version__
from nc_audit.errors import AuditError, EncoderError, RunError
from nc_audit.pipeline import Silence, Watcher, help_embed, score_dataset
from nc_audit.recipe import Recipe
from nc_audit.team import meeting_at

_PATIENCE = 10.0  # seconds for the others to say why, once one process has failed
_OFTEN = 0.2  # seconds between looks at what the first process says
_SOON = 30.0  # seconds within which all should have begun, or it is told that they wait


@dataclass(frozen=True)
class Seat:
    """Room for one process: a node of the cluster by its id and address, and what it gets of it."""

    node: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Job:
    """What every process is told: the arguments of `score_dataset`, and where relative paths begin."""

    dataset: Path
    out: Path
    recipe: Recipe
    recipe_names: tuple[str, ...]
    device: str
    precision: str
    force: bool
    given: str | None
    folder: str
    version: str


@dataclass(frozen=True)
class Refusal:
    """An error that a user can mend, on its way home: not every error survives being sent."""

    message: str
    hint: str


def seats_of(nodes: Sequence[dict[str, Any]], device: str) -> list[Seat]:
    """A seat for each GPU of the living nodes, or, where none has one, for each node; the first node's first.

    Args:
        nodes: as `ray.nodes()` describes them.
        device: auto, cpu or cuda.

    Raises:
        EncoderError: cuda is asked for and no node has a GPU, or no node has anything to work with.
    """
    living = [node for node in nodes if node["Alive"]]
    found = []
    for node in living:
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        found.append((node["NodeID"], node["NodeManagerAddress"], cpus, 0 if device == "cpu" else gpus))
    if any(gpus for *_, gpus in found):
        return [
            Seat(node, address, cpus // gpus, 1) for node, address, cpus, gpus in found for _ in range(gpus)
        ]
    if device == "cuda":
        raise EncoderError(f"none of {len(living):,} nodes of the Ray cluster has a GPU", "--device cpu")
    seats = [Seat(node, address, cpus, 0) for node, address, cpus, _ in found if cpus]
    if not seats:
        raise EncoderError(
            "no node of the Ray cluster has a processor to give", "ray start --num-cpus=N, or --engine local"
        )
    return seats


def score_on_cluster(
    dataset: Path,
    out: Path,
    recipe: Recipe,
    *,
    recipe_names: tuple[str, ...] = (),
    device: str = "auto",
    precision: str = "auto",
    force: bool = False,
    watch: Watcher | None = None,
    given: str | None = None,
) -> dict[str, Any]:
    """`score_dataset` by the processes of a Ray cluster: the one of `RAY_ADDRESS`, or one running here, or a new one.

    Args and returns: see `score_dataset`; relative paths begin at this process's working folder.

    Raises:
        AuditError: what the first process, or else one of the others, says is wrong.
        EncoderError: Ray is not installed, or the cluster has nothing to work with.
        RunError: a process of the cluster ended before it was done. The same command goes on where it stopped.
    """
    watch = watch or Silence()
    job = Job(
        dataset, out, recipe, recipe_names, device, precision, force, given, str(Path.cwd()), __version__
    )
    with _joined() as ray:
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        seats = seats_of(ray.nodes(), device)
        kind = "a GPU" if seats[0].gpus else "a node"
        watch.note(
            f"Ray: {len(seats):,} process{'es' if len(seats) > 1 else ''}, one {kind}, on "
            f"{len({seat.node for seat in seats}):,} node{'s' if len({seat.node for seat in seats}) > 1 else ''}"
        )
        said, meeting = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
        # each in a process of its own, which ends with the work
        member = ray.remote(max_retries=0, max_calls=1)(_member)
        running = [
            member.options(
                num_cpus=seat.cpus,
                **({"num_gpus": seat.gpus} if seat.gpus else {}),
                scheduling_strategy=NodeAffinitySchedulingStrategy(seat.node, soft=False),
            ).remote(seats[0].address, seat.address, rank, len(seats), meeting, said, job)
            for rank, seat in enumerate(seats)
        ]
        try:
            facts: dict[str, Any] = _awaited(ray, running, seats, said, watch)
        finally:
            for one in running:
                ray.cancel(one, force=True)
        return facts


@contextmanager
def _joined() -> Iterator[Any]:
    """Ray, connected to a cluster for a while; one that was started for it ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise EncoderError("--engine ray needs Ray", "pip install 'nc-audit[ray]'") from None
    was_there = ray.is_initialized()
    if not was_there:
        address = os.environ.get("RAY_ADDRESS", "")
        try:
            _knock(address)  # Ray itself tries for minutes
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as problem:
            raise RunError(
                f"the Ray cluster {address or 'of this machine'} cannot be reached: {str(problem).splitlines()[0]}",
                "check RAY_ADDRESS, or unset it to work on this machine",
            ) from None
    try:
        yield ray
    finally:
        if not was_there:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise an OSError where an address HOST:PORT, with or without ray:// before it, does not answer."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _awaited(
    ray: Any, running: Sequence[Any], seats: Sequence[Seat], said: Any, watch: Watcher
) -> dict[str, Any]:
    """What the first process returns, passing on what it says meanwhile; the first failure ends all."""
    waiting, results = list(running), {}
    failing_since: float | None = None
    num_begun, started, is_told = 0, time.monotonic(), False
    while waiting and (failing_since is None or time.monotonic() - failing_since < _PATIENCE):
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_OFTEN)
        for word, *rest in said.get_nowait_batch(said.size()):
            if word == "begun":
                num_begun += 1
            else:
                getattr(watch, word)(*rest)
        if num_begun < len(running) and not is_told and time.monotonic() - started > _SOON:
            watch.note(
                f"Ray: {num_begun:,} of {len(running):,} processes have begun; the cluster may be busy"
            )
            is_told = True
        for one in done:
            rank = running.index(one)
            try:
                results[rank] = ray.get(one)
            except ray.exceptions.RayError as problem:
                results[rank] = _as_ours(
                    problem, seats[rank], was_lost=not isinstance(problem, ray.exceptions.RayTaskError)
                )
            if isinstance(results[rank], Refusal | Exception):
                failing_since = failing_since or time.monotonic()
                if rank == 0 and isinstance(results[rank], Refusal):
                    waiting = []
    # Where one fails, the others lose it: what it says is wrong, or that it was lost, counts for more than that.
    failed = [one for _, one in sorted(results.items()) if isinstance(one, Refusal | Exception)]
    for kind in (Refusal, RunError, Exception):
        for one in failed:
            if isinstance(one, kind):
                raise AuditError(one.message, one.hint) if isinstance(one, Refusal) else one
    facts: dict[str, Any] = results[0]
    return facts


def _as_ours(problem: Exception, seat: Seat, *, was_lost: bool) -> Exception:
    """What Ray says of a process that failed: a RunError where it was lost or could not begin, else as it is."""
    why = (str(problem).strip().splitlines() or [""])[-1]
    if why.startswith("ModuleNotFoundError"):
        return RunError(f"node {seat.address} cannot begin: {why}", "install the same nc-audit on all nodes")
    if was_lost:
        return RunError(
            f"a process on node {seat.address} ended before it was done: {why}",
            "the same command goes on where it stopped",
        )
    return problem


class _Post:
    """A watcher whose words are read on another machine; progress a few times a second."""

    def __init__(self, said: Any) -> None:
        self.said, self.last = said, (0.0, "")

    def note(self, text: str) -> None:
        """Passed on."""
        self.said.put(("note", text))

    def warn(self, text: str) -> None:
        """Passed on."""
        self.said.put(("warn", text))

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Passed on, unless the last was a moment ago and of the same."""
        now = time.monotonic()
        if what != self.last[1] or done == total or now - self.last[0] >= _OFTEN:
            self.last = (now, what)
            self.said.put(("progress", what, done, total))


def _member(
    host: str, address: str, rank: int, size: int, meeting: Any, said: Any, job: Job
) -> dict[str, Any] | Refusal | None:
    """One process of the team, run by Ray on its node: the first returns the summary, the others nothing."""
    said.put(("begun",))
    try:
        if job.version != __version__:
            raise RunError(
                f"nc-audit is {__version__} there and {job.version} here", "install the same on all nodes"
            )
        try:
            os.chdir(job.folder)
        except OSError as problem:
            raise RunError(
                f"{job.folder} cannot be entered: {problem.strerror}",
                "all nodes must see the dataset and the run under the same path",
            ) from None
        team = meeting_at(host, rank, size, meeting.put_nowait_batch, meeting.get)
        if not team.is_first:
            help_embed(team, job.recipe, job.device, job.precision)
            return None
        return score_dataset(
            job.dataset,
            job.out,
            job.recipe,
            recipe_names=job.recipe_names,
            device=job.device,
            precision=job.precision,
            force=job.force,
            watch=_Post(said),
            given=job.given,
            team=team,
        )
    except AuditError as problem:
        where = f" (on node {address})" if rank else ""
        return Refusal(problem.message + where, problem.hint)
