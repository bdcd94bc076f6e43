"""Stage 5, tag: clean, ambiguous or noisy, with reasons a person can check. Takes milliseconds, needs no rescoring.

`thresholds` turns what a user wants (a precision, a budget) into the two probabilities; `tag_scores` applies them.
What people decided (`decisions.jsonl`) wins over what the model says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nc_audit.decisions import Decision
from nc_audit.errors import RecipeError
from nc_audit.run import Run
from nc_audit.schema import FINDING_KINDS, TAGS, TAGS_KNOWN, list_of

MODEL = "model"
NAMELESS = "reviewer"
"""Stands in `decided_by` for a reviewer without a name, or with the model's."""

NEEDED_PAIRS = ["pair_id", "row", "status", "status_detail"]
NEEDED_SCORES = [
    "noise_probability",
    "noise_score",
    "caption_rank",
    "image_rank",
    "relative_loss",
    "swapped_entropy",
    "neighbour_distance",
    "best_caption",
    "best_caption_margin",
    "best_image",
    "best_image_margin",
]
"""The columns that `tag_scores` looks at."""

_GENERIC_ENTROPY = 0.9
_MOST_REASONS = 5
_SAID_BY_STATUS = {"empty_caption"}


@dataclass(frozen=True)
class Thresholds:
    """Clean up to `clean_at`, noisy from `noisy_at`, both noise probabilities, 0..1; ambiguous between.

    An infinite `noisy_at` tags nothing noisy.
    """

    clean_at: float
    noisy_at: float

    def __post_init__(self) -> None:
        if not (0 <= self.clean_at <= self.noisy_at <= 1 or (self.clean_at <= 1 and self.noisy_at == np.inf)):
            raise RecipeError(
                f"thresholds clean_at {self.clean_at:g} and noisy_at {self.noisy_at:g} are not in order",
                "0 <= clean_at <= noisy_at <= 1",
            )


def threshold_for_precision(probability: np.ndarray, precision: float) -> float:
    """The lowest noisy_at at which the pairs tagged noisy are expected to hold at least this share of noise.

    Args:
        probability: noise probability of every pair, shape [N], 0..1.
        precision: wanted share, 0..1, by the probabilities themselves.

    Returns:
        A probability; infinite where no threshold reaches the precision, so that nothing is noisy.
    """
    ordered = np.sort(probability)[::-1]
    expected = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    # Pairs of equal probability fall on one side together, so only the last of each run may be the border.
    borders = np.append(ordered[1:] != ordered[:-1], True)
    good = np.flatnonzero((expected >= precision) & borders)
    return float(ordered[good[-1]]) if len(good) else float("inf")


def threshold_for_budget(score: np.ndarray, share: float) -> np.ndarray:
    """Which pairs are the worst `share` of all, by score; ties at the border stay out.

    Args:
        score: higher = noisier, shape [N].
        share: 0..1.

    Returns:
        Shape [N], bool; at most `share` of the pairs.
    """
    num = int(share * len(score) + 1e-9)
    if num == 0:
        return np.zeros(len(score), bool)
    ordered = np.sort(score)[::-1]
    border = ordered[num - 1]
    return score >= border if num == len(score) or ordered[num] < border else score > border


def tag_scores(
    scores: pa.Table,
    pairs: pa.Table,
    thresholds: Thresholds,
    *,
    blind: bool = False,
    budget: float | None = None,
    decisions: Mapping[str, Decision] | None = None,
    findings: pa.Table | None = None,
) -> pa.Table:
    """The `tags` table of a run.

    Args:
        scores: the `scores` table, or NEEDED_SCORES of it.
        pairs: the `pairs` table, or NEEDED_PAIRS of it; same rows in the same order.
        thresholds: on the noise probability.
        blind: the scores told swaps from given pairs no better than chance: everything is ambiguous, and says so.
        budget: tag the worst share of the rows noisy instead of using `noisy_at`, 0..1.
        decisions: what people decided, by pair_id. Their word wins: kept and corrected pairs are clean, dropped ones
            noisy, `decided_by` names the reviewer. Decisions on pairs that are not there or not ok count for nothing.
        findings: the `findings` table, for reasons and re-matches; None where there is none.

    Returns:
        The table of `schema.TAGS`: tag null where the row's status is not ok, its reason then being the status.
    """
    is_ok = np.asarray(pc.equal(pairs["status"], "ok").to_numpy(zero_copy_only=False), dtype=bool)
    codes = _codes(scores, is_ok, thresholds, blind=blind, budget=budget)
    reasons = _reasons(scores, pairs, codes, is_ok, blind, findings)
    rematch_row, rematch_probability = _rematches(findings, len(codes))
    decided_by: list[str | None] = [MODEL if ok else None for ok in is_ok.tolist()]
    if decisions:
        at, standing = _decided_rows(pairs["pair_id"], is_ok, decisions)
        for row, one in zip(at, standing, strict=True):
            name = decided_by[row] = _encodable(one.reviewer) if one.reviewer not in ("", MODEL) else NAMELESS
            reasons[row] = _reasons_of(one, name, codes[row], reasons[row])
            codes[row] = 2 if one.decision == "drop" else 0
    tags = pa.DictionaryArray.from_arrays(
        pa.array(codes, pa.int8(), mask=~is_ok), pa.array(["clean", "ambiguous", "noisy"])
    ).cast(pa.string())
    return pa.table(
        [
            pairs["pair_id"],
            pairs["row"],
            tags,
            pa.array(reasons, list_of(pa.string())),
            pa.array(decided_by, pa.string()),
            rematch_row,
            rematch_probability,
        ],
        schema=TAGS,
    )


def thresholds_in_use(entry: Mapping[str, Any]) -> tuple[Thresholds, float | None]:
    """The thresholds and the budget that a finished tag stage went by, from its entry in the manifest."""
    stated = entry["thresholds"]
    noisy_at = float("inf") if stated["noisy_at"] is None else stated["noisy_at"]
    return Thresholds(stated["clean_at"], noisy_at), stated.get("budget")


def model_tags(run: Run) -> pa.Array:
    """The tags that the model alone gives under the thresholds in use, one per row; null where not ok.

    Raises:
        RunError: the run is not tagged.
    """
    thresholds, budget = thresholds_in_use(run.stage("tag"))
    blind = run.stage("score")["noise_rate"]["evidence"] == "none"
    is_ok = np.asarray(
        pc.equal(run.table("pairs", ["status"])["status"], "ok").to_numpy(zero_copy_only=False), dtype=bool
    )
    scores = run.table("scores", ["noise_probability", "noise_score"])
    codes = _codes(scores, is_ok, thresholds, blind=blind, budget=budget)
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8(), mask=~is_ok), pa.array(TAGS_KNOWN)).cast(
        pa.string()
    )


def _codes(
    scores: pa.Table, is_ok: np.ndarray, thresholds: Thresholds, *, blind: bool, budget: float | None
) -> np.ndarray:
    """0 clean, 1 ambiguous, 2 noisy, by the model alone; shape [N]."""
    probability = np.asarray(scores["noise_probability"].to_numpy(zero_copy_only=False), dtype=np.float64)
    clean = probability <= thresholds.clean_at
    if budget is None:
        noisy = (probability >= thresholds.noisy_at) & ~(clean & (thresholds.clean_at == thresholds.noisy_at))
    else:
        score = np.asarray(scores["noise_score"].to_numpy(zero_copy_only=False), dtype=np.float64)
        noisy = np.zeros(len(score), bool)
        noisy[is_ok] = threshold_for_budget(score[is_ok], budget)
    if blind:
        clean, noisy = np.zeros_like(clean), np.zeros_like(noisy) if budget is None else noisy
    return np.where(noisy, 2, np.where(clean, 0, 1))


def _decided_rows(
    pair_id: pa.ChunkedArray, is_ok: np.ndarray, decisions: Mapping[str, Decision]
) -> tuple[list[int], list[Decision]]:
    """The ok rows on whose pair somebody decided, and the decision of each."""
    standing = list(decisions.values())
    found = pc.fill_null(pc.index_in(pair_id, pa.array([*map(_encodable, decisions)], pa.string())), -1)
    which = np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)
    at = np.flatnonzero((which >= 0) & is_ok)
    return at.tolist(), [standing[one] for one in which[at].tolist()]


def _encodable(text: str) -> str:
    """The text with lone surrogates, which JSON may hold and Arrow does not, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _reasons_of(decision: Decision, name: str, code: int, model: list[str]) -> list[str]:
    """Who decided what comes first; what the model held against the pair follows where people did not settle it."""
    if decision.decision == "drop":
        return [f"dropped by {name}", *model]
    if decision.decision == "keep":
        against = [f"the model says {TAGS_KNOWN[code]}"] if code else []
        return [f"kept by {name}", *against]
    return [f"caption corrected by {name}"]


def _rematches(findings: pa.Table | None, num_rows: int) -> tuple[pa.Array, pa.Array]:
    """The row whose caption fits each row's image, and the probability, by the likeliest finding that names one."""
    partner, probability = np.zeros(num_rows, np.int64), np.full(num_rows, -1.0, np.float32)
    if findings is not None:
        named = findings.filter(pc.is_valid(findings["probability"]))
        columns = (named[name].to_pylist() for name in ("row", "partner_row", "probability"))
        for row, other, value in zip(*columns, strict=True):
            if value > probability[row]:
                partner[row], probability[row] = other, value
    unknown = probability < 0
    return pa.array(partner, mask=unknown), pa.array(probability, pa.float32(), mask=unknown)


def _found_by_row(findings: pa.Table | None) -> dict[int, list[tuple[str, str]]]:
    """Kind and detail of the findings about each row, in the order of the table: strongest kind first."""
    result: dict[int, list[tuple[str, str]]] = {}
    if findings is not None:
        columns = (findings[name].to_pylist() for name in ("row", "kind", "detail"))
        for row, kind, detail in zip(*columns, strict=True):
            result.setdefault(row, []).append((kind, detail))
    return result


def _with_findings(reasons: list[str], found: list[tuple[str, str]], flagged: bool) -> list[str]:
    """At most `_MOST_REASONS` reasons: warnings, then the scores', then the rest; clean pairs get warnings alone."""
    warnings: list[str] = []
    rest: list[str] = []
    for kind, detail in found:
        target = warnings if FINDING_KINDS[kind][0] == "warn" else rest
        if detail not in target and kind not in _SAID_BY_STATUS:
            target.append(detail)
    first = reasons[:1] if reasons and reasons[0].endswith("likely noise") else []
    ordered = [*first, *warnings[:2], *reasons[len(first) :], *(rest if flagged else [])]
    if flagged and rest and len(ordered) > _MOST_REASONS:
        ordered = [*ordered[: _MOST_REASONS - 1], rest[0]]
    return ordered[:_MOST_REASONS]


def _reasons(
    scores: pa.Table,
    pairs: pa.Table,
    codes: np.ndarray,
    is_ok: np.ndarray,
    blind: bool,
    findings: pa.Table | None,
) -> list[list[str]]:
    def values(name: str) -> np.ndarray:
        return np.asarray(scores[name].to_numpy(zero_copy_only=False), dtype=np.float64)

    caption_rank, image_rank = values("caption_rank"), values("image_rank")
    caption_margin, image_margin = values("best_caption_margin"), values("best_image_margin")
    relative_loss, entropy = values("relative_loss"), values("swapped_entropy")
    neighbour, probability = values("neighbour_distance"), values("noise_probability")
    usual = np.nanmedian(neighbour) if is_ok.any() else 0.0
    spread = np.nanmedian(np.abs(neighbour - usual)) * 1.4826 if is_ok.any() else 1.0
    far = neighbour > usual + 2 * max(spread, 1e-6)
    asked = np.flatnonzero(is_ok & (codes > 0))
    best_caption = _texts(scores["best_caption"], asked)
    best_image = _texts(scores["best_image"], asked)
    result: list[list[str]] = [[] for _ in range(len(codes))]
    # As Python's own numbers: one by one out of an array they would take twice the time.
    columns = (
        column[asked].tolist()
        for column in (
            caption_rank,
            image_rank,
            caption_margin,
            image_margin,
            far,
            relative_loss,
            codes,
            entropy,
            probability,
        )
    )
    for at, caption, image, c_rank, i_rank, c_margin, i_margin, is_far, loss, code, generic, p in zip(
        asked.tolist(), best_caption, best_image, *columns, strict=True
    ):
        reasons = result[at]
        if blind:
            reasons.append("the scores cannot tell given pairs from deliberate mismatches")
            continue
        if c_rank > 1:
            reasons.append(_count(int(c_rank) - 1, "other caption", "the image"))
        if i_rank > 1:
            reasons.append(_count(int(i_rank) - 1, "other image", "the caption"))
        if caption is not None and c_margin > 0:
            reasons.append(f"better caption by {c_margin:.2f}: {caption}")
        if image is not None and i_margin > 0:
            reasons.append(f"better image by {i_margin:.2f}: {image}")
        if is_far:
            reasons.append("images and captions nearby contradict it")
        if loss >= 1:
            reasons.append(f"loss at {loss:.0%} of chance")
        if code == 1:
            if generic >= _GENERIC_ENTROPY:
                reasons.append("generic: fits many others about as well")
            conflicts = "evidence conflicts" if 0.05 < p < 0.95 else "not among the worst"
            reasons.insert(0, f"{conflicts}: {p:.0%} likely noise")
    for at, found in _found_by_row(findings).items():
        result[at] = _with_findings(result[at], found, bool(codes[at] > 0))
    statuses = pairs["status"].to_pylist()
    details = pairs["status_detail"].to_pylist()
    for at in np.flatnonzero(~is_ok).tolist():
        result[at] = [f"{statuses[at]}: {details[at]}" if details[at] else statuses[at]]
    return result


def _texts(column: pa.ChunkedArray, at: np.ndarray) -> list[str | None]:
    return column.take(pa.array(at)).to_pylist()


def _count(number: int, what: str, whom: str) -> str:
    return f"{number:,} {what}s fit {whom} better" if number > 1 else f"1 {what} fits {whom} better"
