"""What changed between two runs: pairs that got another tag, and why; rows that only one of them has."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from nc_audit.run import Run

UNAUDITED = "not audited"


@dataclass(frozen=True)
class Verdict:
    """What one run says of a pair."""

    row: int
    image: str | None
    caption: str | None
    tag: str
    noise_probability: float | None
    reasons: list[str]


@dataclass(frozen=True)
class Change:
    """A pair whose tag differs."""

    pair_id: str
    before: Verdict
    after: Verdict

    @property
    def moved(self) -> float:
        """How far the noise probability moved; 1 where one run did not audit the pair."""
        one, other = self.before.noise_probability, self.after.noise_probability
        return 1.0 if one is None or other is None else abs(other - one)


@dataclass(frozen=True)
class Difference:
    """Run B against run A, by pair. `matrix` counts the pairs of both by old and new tag.

    `changes` come largest move of the noise probability first; `only_a` and `only_b` in input order.
    """

    matrix: dict[tuple[str, str], int]
    changes: list[Change]
    only_a: list[tuple[str, Verdict]]
    only_b: list[tuple[str, Verdict]]

    def as_json(self, top: int | None = None) -> dict[str, Any]:
        """The difference as JSON values, with at most `top` entries in each list."""
        return {
            "matrix": [{"before": a, "after": b, "pairs": n} for (a, b), n in sorted(self.matrix.items())],
            "num_changed": len(self.changes),
            "num_only_a": len(self.only_a),
            "num_only_b": len(self.only_b),
            "changed": [
                {"pair_id": one.pair_id, "before": asdict(one.before), "after": asdict(one.after)}
                for one in self.changes[:top]
            ],
            "only_a": [{"pair_id": pair_id, **asdict(one)} for pair_id, one in self.only_a[:top]],
            "only_b": [{"pair_id": pair_id, **asdict(one)} for pair_id, one in self.only_b[:top]],
        }


def diff_runs(a: Run, b: Run) -> Difference:
    """The difference of two tagged runs; equal pairs count once, by their first row.

    Raises:
        RunError: a run is not tagged.
    """
    before, after = _verdicts(a), _verdicts(b)
    both = [pair_id for pair_id in before if pair_id in after]
    changes = [Change(one, before[one], after[one]) for one in both if before[one].tag != after[one].tag]
    return Difference(
        dict(Counter((before[one].tag, after[one].tag) for one in both)),
        sorted(changes, key=lambda one: (-one.moved, one.before.row)),
        [(one, verdict) for one, verdict in before.items() if one not in after],
        [(one, verdict) for one, verdict in after.items() if one not in before],
    )


def _verdicts(run: Run) -> dict[str, Verdict]:
    tags = run.table("tags", ["pair_id", "row", "tag", "reasons"])
    pairs = run.table("pairs", ["image", "caption"])
    probability = run.table("scores", ["noise_probability"])["noise_probability"].to_pylist()
    result: dict[str, Verdict] = {}
    columns = [tags[name].to_pylist() for name in ("pair_id", "row", "tag", "reasons")]
    columns += [pairs["image"].to_pylist(), pairs["caption"].to_pylist(), probability]
    for pair_id, row, tag, reasons, image, caption, value in zip(*columns, strict=True):
        if pair_id not in result:
            result[pair_id] = Verdict(row, image, caption, tag or UNAUDITED, value, reasons)
    return result
