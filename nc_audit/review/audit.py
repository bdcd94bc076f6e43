"""What a random sample of reviewed pairs says about the tags: precision, recall and the share of noise.

The sample is uniform over the distinct ok pairs, so that the figures speak of all of them; decisions taken worst
first would not. Whoever decides keep says that the caption describes the image; drop, fix and rematch say that it
does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nc_audit.errors import RunError
from nc_audit.run import digest_of, replacing
from nc_audit.schema import TAGS_KNOWN

LEAST = 30
"""Decided pairs below which no figure is given."""

LEVEL = 0.95
_Z = 1.959963984540054
_DRAWS = 20_000
_FEW = 10
_FILE = "review/sample.json"


@dataclass(frozen=True)
class Share:
    """An estimated share with the interval of LEVEL; 0..1. NaN where there is nothing to count."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What a sample says.

    Attributes:
        drawn: pairs of the sample; `decided` of them are decided.
        wrong: decided pairs whose caption does not describe the image, by the model's tag.
        right: the others, by the model's tag.
        num_tagged: distinct ok pairs of the run by the model's tag.
        precision: of the noisy tag: share of wrong pairs among those tagged noisy, with Wilson's interval.
        recall: of the noisy tag: share of the wrong pairs that are tagged noisy. The share of wrong pairs of each tag
            counts with the number of pairs that have the tag; the interval draws each share from its posterior under
            Jeffreys' prior, so that a tag without one wrong pair in the sample is not taken for flawless.
        noise: share of wrong pairs in the whole run, Wilson's interval.
        conflicts: decided pairs about which reviewers disagree; the last decision counts.
        in_view: pairs decided, or turned round, with the tag in view.
    """

    drawn: int
    decided: int
    wrong: dict[str, int]
    right: dict[str, int]
    num_tagged: dict[str, int]
    precision: Share | None
    recall: Share | None
    noise: Share | None
    conflicts: int
    in_view: int


def draw_sample(run: Path, population: Sequence[str], size: int, seed: int = 0) -> list[str]:
    """Pairs drawn uniformly, in random order, the same ones at every call.

    A larger sample begins with the smaller one, and so goes on with what is decided already. What was drawn is
    remembered in the run; it is drawn anew when the pairs of the run are no longer the same.

    Args:
        run: folder of the run.
        population: ids of all distinct ok pairs, sorted.
        size: 1..; no more are drawn than there are.
        seed: of the drawing, when nothing is remembered.

    Returns:
        Their ids, in the order to review them.
    """
    known = remembered_sample(run)
    digest = digest_of(list(population))
    if known and known["population"] == digest:
        seed = known["seed"]
    order = np.random.default_rng(seed).permutation(len(population))[:size]
    pair_ids = [population[at] for at in order.tolist()]
    if not known or known["population"] != digest or len(known["pair_ids"]) < len(pair_ids):
        with replacing(run / _FILE) as partial:
            facts = {"seed": seed, "population": digest, "pair_ids": pair_ids}
            partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return pair_ids


def remembered_sample(run: Path) -> dict[str, Any] | None:
    """The sample that was drawn last: seed, population (a digest) and pair_ids; None before the first.

    Raises:
        RunError: the file is damaged.
    """
    path = run / _FILE
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(one, str) for one in [known["population"], *known["pair_ids"]]):
            raise TypeError("pair_ids are no words")
        int(known["seed"])
    except (ValueError, KeyError, TypeError) as problem:
        raise RunError(
            f"{path} is not readable: {problem}", "delete it; a new sample is drawn, decisions stay"
        ) from problem
    return dict(known)


def figures(
    outcomes: Sequence[tuple[str, bool]],
    num_tagged: Mapping[str, int],
    drawn: int,
    *,
    conflicts: int = 0,
    in_view: int = 0,
) -> Figures:
    """The figures of a sample.

    Args:
        outcomes: of each decided pair, the model's tag and whether its caption is wrong.
        num_tagged: distinct ok pairs of the run by tag.
        drawn: size of the sample.
        conflicts: as in `Figures`.
        in_view: likewise.

    Returns:
        Shares are None where fewer than LEAST pairs are decided.
    """
    wrong = {tag: sum(one == tag and bad for one, bad in outcomes) for tag in TAGS_KNOWN}
    right = {tag: sum(one == tag and not bad for one, bad in outcomes) for tag in TAGS_KNOWN}
    enough = len(outcomes) >= LEAST
    return Figures(
        drawn=drawn,
        decided=len(outcomes),
        wrong=wrong,
        right=right,
        num_tagged={tag: num_tagged.get(tag, 0) for tag in TAGS_KNOWN},
        precision=wilson(wrong["noisy"], wrong["noisy"] + right["noisy"]) if enough else None,
        recall=_recall(wrong, right, num_tagged) if enough else None,
        noise=wilson(sum(wrong.values()), len(outcomes)) if enough else None,
        conflicts=conflicts,
        in_view=in_view,
    )


def wilson(hits: int, num: int) -> Share:
    """A share and its Wilson interval; all NaN where there is nothing to count.

    Example:
        >>> found = wilson(8, 10)
        >>> found.estimate, round(found.low, 4), round(found.high, 4)
        (0.8, 0.4902, 0.9433)
    """
    if num == 0:
        return Share(math.nan, math.nan, math.nan)
    share, slack = hits / num, _Z**2 / num
    centre = (share + slack / 2) / (1 + slack)
    half = _Z * math.sqrt(share * (1 - share) / num + slack / (4 * num)) / (1 + slack)
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == num else min(1.0, centre + half)
    return Share(share, low, high)


def _recall(wrong: Mapping[str, int], right: Mapping[str, int], num_tagged: Mapping[str, int]) -> Share:
    def total(shares: Mapping[str, Any]) -> Any:
        return sum(num_tagged.get(tag, 0) * shares[tag] for tag in TAGS_KNOWN)

    plain = {tag: wrong[tag] / max(1, wrong[tag] + right[tag]) for tag in TAGS_KNOWN}
    if total(plain) == 0:
        return Share(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(0)
    drawn = {tag: rng.beta(wrong[tag] + 0.5, right[tag] + 0.5, _DRAWS) for tag in TAGS_KNOWN}
    recalls = num_tagged.get("noisy", 0) * drawn["noisy"] / total(drawn)
    low, high = np.quantile(recalls, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    estimate = num_tagged.get("noisy", 0) * plain["noisy"] / total(plain)
    return Share(estimate, float(min(low, estimate)), float(max(high, estimate)))


def statement(found: Figures) -> list[str]:
    """The figures in words, one line each, honest about how little they may rest on."""
    decided, wrong = found.decided, sum(found.wrong.values())
    lines = [f"random sample: {decided:,} of {found.drawn:,} pairs decided, {wrong:,} with a wrong caption"]
    if found.precision is None or found.recall is None or found.noise is None:
        lines.append(f"figures follow from {LEAST} decided pairs on; 100 to 200 make them useful")
        return lines
    tagged = found.wrong["noisy"] + found.right["noisy"]
    lines.append(f"share of wrong captions: {_words(found.noise)}")
    lines.append(
        f"precision of noisy: {_words(found.precision)}, from {tagged:,} of them in the sample"
        if tagged
        else "precision of noisy: unknown, no pair of the sample is tagged so"
    )
    lines.append(
        f"recall of noisy: {_words(found.recall)}, from {wrong:,} wrong captions in the sample"
        if wrong
        else "recall of noisy: unknown, no caption of the sample is wrong"
    )
    if wrong < _FEW or tagged < _FEW:
        lines.append(
            "that is few: a uniform sample holds no more noise than the dataset; a larger one tells more"
        )
    if decided < found.drawn:
        lines.append(
            f"{found.drawn - decided:,} of the sample are not decided; if those are the hard ones, the figures flatter"
        )
    if found.conflicts:
        lines.append(f"reviewers disagree about {found.conflicts:,} of them; the last decision counts")
    if found.in_view:
        lines.append(f"decided, or turned round, with the tag in view: {found.in_view:,}")
    return lines


def figures_json(found: Figures) -> dict[str, Any]:
    """The figures as a JSON object; what is unknown is null."""
    facts = asdict(found) | {"level": LEVEL}
    for name in ("precision", "recall", "noise"):
        share = facts[name]
        if share is not None:
            facts[name] = None if math.isnan(share["estimate"]) else share
    return facts


def _words(share: Share) -> str:
    if math.isnan(share.estimate):
        return "unknown"
    interval = f"{100 * LEVEL:.0f} % interval {100 * share.low:.1f} % to {100 * share.high:.1f} %"
    return f"{100 * share.estimate:.1f} % ({interval})"
