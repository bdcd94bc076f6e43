"""Every check of the repository in one command: `python tests/check.py`.

Runs the formatter, the linter, the type checker and the tests, says which step runs, and stops at the first that
fails, with that step's exit code. It uses the tools of the interpreter that runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY_TIER = "not gpu and not network and not benchmark"
MIN_COVERAGE = 85
MOST_WORKERS = 8


def steps(*, fix: bool, slow: bool, coverage: bool, further: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Name and command of each step, in order; `further` arguments go to pytest."""
    # The tests of a file stay together, for what they share is made once.
    # pytest-benchmark, where an environment happens to have it, warns beside several workers, and warnings are errors.
    tests = ["pytest", "-q", "-p", "no:benchmark", "-n", str(num_workers()), "--dist", "loadfile"]
    if slow:
        tests += ["-m", EVERY_TIER]
    if coverage:
        tests += ["--cov=nc_audit", "--cov-branch", "--cov-report=term:skip-covered"]
        if not further:
            tests += [f"--cov-fail-under={MIN_COVERAGE}"]
    return [
        ("format", ["ruff", "format", *([] if fix else ["--check"]), "."]),
        ("lint", ["ruff", "check", *(["--fix"] if fix else []), "."]),
        ("types", ["mypy"]),
        ("tests", [*tests, *further]),
    ]


def num_workers() -> int:
    """Processes that test, each with one thread: one for each processor there is leave to use, up to a bound."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(mine, MOST_WORKERS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; the exit code of the first that fails, 0 when none does."""
    parser = argparse.ArgumentParser(
        description="Formatter, linter, type checker, tests.", epilog="Other arguments go to pytest."
    )
    parser.add_argument("--fix", action="store_true", help="format and mend what can be mended, then check")
    parser.add_argument("--all", action="store_true", help="the slow tests too")
    parser.add_argument(
        "--coverage", action="store_true", help="measure branch coverage; takes about twice as long"
    )
    options, further = parser.parse_known_args(arguments)
    if options.coverage and importlib.util.find_spec("pytest_cov") is None:
        parser.error("--coverage needs pytest-cov: pip install -e '.[dev]'")
    # One thread: matrices are small, and two threads that share their processors with anything else wait by spinning.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for name, command in steps(fix=options.fix, slow=options.all, coverage=options.coverage, further=further):
        print(f"== {name}: {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, check=False
        ).returncode
        print(
            f"== {name}: {'ok' if code == 0 else f'failed ({code})'} in {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
