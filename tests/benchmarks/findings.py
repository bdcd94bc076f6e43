"""How often findings are right, on a run whose rows have their truth in `known_noise`: JSON lines, one a kind.

    nc-audit bench DATASET --kinds word --rates 0.2 --recipes similarity --out words
    nc-audit score words/injected/word-0.2-0.parquet --image-root DATASET --out run
    python tests/benchmarks/findings.py run

`named_wrong` is the share of noise among the rows named, `wrong_named` the share of the noise that is named,
`right_named` the share of the rest that is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from nc_audit.run import Run
from nc_audit.schema import FINDING_KINDS


def measure(run: Run) -> list[dict[str, float | str]]:
    """Counts and shares (0..1) of each kind that occurs, of the rows that are ok."""
    pairs = run.table("pairs", ["status", "known_noise"])
    is_ok = np.array([status == "ok" for status in pairs["status"].to_pylist()])
    is_wrong = pairs["known_noise"].to_numpy() == 1
    findings = run.table("findings", ["row", "kind"]).to_pandas()
    found = []
    for kind in FINDING_KINDS:
        is_named = np.isin(np.arange(len(is_ok)), findings["row"][findings["kind"] == kind]) & is_ok
        if is_named.any():
            found.append(
                {
                    "kind": kind,
                    "rows": int(is_named.sum()),
                    "named_wrong": float(is_wrong[is_named].mean()),
                    "wrong_named": float(is_named[is_ok & is_wrong].mean()),
                    "right_named": float(is_named[is_ok & ~is_wrong].mean()),
                }
            )
    return found


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    for line in measure(Run(parser.parse_args().run)):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
