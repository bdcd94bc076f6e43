"""A review in progress: which pairs, who decided what, and the pictures; knows nothing of HTTP.

In a random sample a pair's tag, probability, reasons and suggestions stay hidden from a reviewer until they decided,
so that the model does not judge itself.
"""

from __future__ import annotations

import io
import threading
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from nc_audit.dataset import decode_image
from nc_audit.decisions import DECISIONS, UNDO
from nc_audit.errors import DatasetError
from nc_audit.report.text import plain
from nc_audit.review.audit import Figures, draw_sample, figures, figures_json, remembered_sample, statement
from nc_audit.review.journal import Journal
from nc_audit.review.pairs import Queue, ReviewPair
from nc_audit.run import Run
from nc_audit.tag import MODEL

MAX_CAPTION = 10_000
MAX_NAME = 60
VIEWS = ("all", "open", "decided", "conflicts")
_SIZES = {"large": 1400, "small": 480}
_CACHE_BYTES = 64 << 20
_AT_ONCE = threading.Semaphore(
    2
)  # a picture of the largest size allowed takes half a gigabyte while it is decoded


def check_reviewer(name: str) -> str:
    """The name, trimmed.

    Raises:
        DatasetError: empty, too long, with unseen characters, or the model's own.
    """
    name = unicodedata.normalize("NFC", name).strip()
    if not name or len(name) > MAX_NAME or plain(name) != name:
        raise DatasetError(
            f"{plain(name)[:MAX_NAME]!r} is no name for a reviewer",
            f"1 to {MAX_NAME} visible characters, for example --reviewer ann",
        )
    if name == MODEL:
        raise DatasetError(
            f"{MODEL!r} is no name for a reviewer", "tags of the model are called so; take another"
        )
    return name


def now() -> str:
    """The time, ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Review:
    """One review of one run.

    Args:
        run: a run that is scored and tagged.
        reviewer: name of who reviews where a request names nobody.
        tags: only pairs that the model gives one of these tags; None for all.
        sample: review that many pairs drawn at random instead, 1..; None for all.
        read_image: the bytes of an image by its image_uri.

    Raises:
        RunError: the run is not tagged, another process writes to it, or its decision file is damaged.
        DatasetError: a tag or the name is none, or there is nothing to review.
    """

    def __init__(
        self,
        run: Run,
        reviewer: str,
        *,
        tags: Sequence[str] | None = None,
        sample: int | None = None,
        read_image: Callable[[str], bytes],
    ) -> None:
        self.run, self.reviewer = run.path, check_reviewer(reviewer)
        self.dataset = str((run.manifest.get("dataset") or {}).get("path") or "")
        self.is_blind = sample is not None
        with run.settled():
            self.queue = Queue(run, tags)
            if sample is not None:
                self.queue.only(draw_sample(run.path, self.queue.population, sample))
        if not len(self.queue):
            what = f"no pair is tagged {' or '.join(tags)}" if tags else "the run has no ok pair"
            raise DatasetError(f"nothing to review: {what}", "nc-audit report shows what there is")
        self.journal = Journal(run.path)
        self._read = read_image
        self._pictures: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.RLock()
        self.num_taken = 0

    def state(self, reviewer: str) -> dict[str, Any]:
        """What the page says around the pairs: names, progress, where to begin, figures of a sample."""
        with self._lock:
            self.journal.refresh()
            return {
                "run": self.run.name or str(self.run),
                "dataset": self.dataset,
                "reviewer": reviewer,
                "sample": self.is_blind,
                "begin": self.find(0, 1, "open", reviewer, include=True),
                **self._progress(reviewer),
            }

    def _progress(self, reviewer: str) -> dict[str, Any]:
        mine = conflicts = 0
        for pair_id in self.journal.decided():
            if pair_id in self.queue.at:
                mine += reviewer in self.journal.by_reviewer(pair_id)
                conflicts += self.journal.in_conflict(pair_id)
        return {"total": len(self.queue), "decided": mine, "conflicts": conflicts}

    def page(self, start: int, count: int, reviewer: str) -> list[dict[str, Any]]:
        """Pairs from a position on, as JSON objects."""
        with self._lock:
            self.journal.refresh()
            return [self._shown(pair, reviewer) for pair in self.queue.page(start, count)]

    def find(self, at: int, step: int, view: str, reviewer: str, *, include: bool = False) -> int | None:
        """The nearest position of a view before (`step` -1) or after (1) one; None where there is none."""
        with self._lock:
            self.journal.refresh()
            at = at if include else at + step
            while 0 <= at < len(self.queue):
                if self._is_in(view, self.queue.pair_ids[at], reviewer):
                    return at
                at += step
            return None

    def _is_in(self, view: str, pair_id: str, reviewer: str) -> bool:
        if view == "all":
            return True
        if view == "conflicts":
            return self.journal.in_conflict(pair_id)
        return (reviewer in self.journal.by_reviewer(pair_id)) == (view == "decided")

    def decide(self, pair_id: str, decision: str, caption: str | None, reviewer: str) -> dict[str, Any]:
        """Take a decision; on the disk when this returns.

        Returns:
            The pair as it is shown now (`pair`) and the progress.

        Raises:
            DatasetError: the pair is not of this review, or the decision is none.
        """
        at = self.queue.at.get(pair_id)
        if at is None:
            raise DatasetError("this pair is not in the review", "reload the page")
        if decision not in DECISIONS:
            raise DatasetError("there is no such decision", "keep, drop, fix or rematch")
        pair = self.queue.page(at, 1)[0]
        entry: dict[str, Any] = {
            "time": now(),
            "reviewer": check_reviewer(reviewer),
            "pair_id": pair_id,
            "decision": decision,
        }
        if decision in ("fix", "rematch"):
            entry["caption"] = _new_caption(pair, decision, caption)
        with self._lock:
            self.journal.append([entry | self._circumstances(pair)])
            self.num_taken += 1
            return {"pair": self._shown(pair, reviewer), **self._progress(reviewer)}

    def undo(self, reviewer: str) -> dict[str, Any]:
        """Take back the reviewer's last decision in this review; `pair` is null where there is none."""
        with self._lock:
            self.journal.refresh()
            pair_id = self.journal.last_of(reviewer, self.queue.at)
            if pair_id is None:
                return {"pair": None, **self._progress(reviewer)}
            pair = self.queue.page(self.queue.at[pair_id], 1)[0]
            entry = {"time": now(), "reviewer": reviewer, "pair_id": pair_id, "decision": UNDO}
            self.journal.append([entry | self._circumstances(pair)])
            return {"pair": self._shown(pair, reviewer), **self._progress(reviewer)}

    def picture(self, image_id: str, size: str) -> bytes | None:
        """An image of the run as JPEG, at most 1400 (large) or 480 (small) pixels wide and high; None if unknown.

        Raises:
            DatasetError: the image can no longer be read.
        """
        uri = self.queue.uri_of.get(image_id)
        if uri is None or size not in _SIZES:
            return None
        key = (image_id, size)
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        with _AT_ONCE:
            side = _SIZES[size]
            try:
                image = decode_image(self._read(uri), (side, side))
            except OSError as problem:
                raise DatasetError(f"{uri} cannot be read: {problem.strerror or problem}") from problem
            image.thumbnail((side, side))
            out = io.BytesIO()
            image.save(out, "JPEG", quality=90)
        data = out.getvalue()
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = data
                self._size += len(data)
            while self._size > _CACHE_BYTES and len(self._pictures) > 1:
                self._size -= len(self._pictures.popitem(last=False)[1])
        return data

    def figures(self) -> Figures | None:
        """What the decided part of the sample says; None outside of a sample."""
        return sample_figures(self.queue, self.journal, self.queue.pair_ids) if self.is_blind else None

    def _circumstances(self, pair: ReviewPair) -> dict[str, Any]:
        facts: dict[str, Any] = {"sample": True} if self.is_blind else {}
        return facts | {"tag": pair.tag, "probability": pair.probability}

    def _shown(self, pair: ReviewPair, reviewer: str) -> dict[str, Any]:
        by_reviewer = self.journal.by_reviewer(pair.pair_id)
        mine = by_reviewer.get(reviewer)
        shown: dict[str, Any] = {
            "at": pair.at,
            "pair_id": pair.pair_id,
            "row": pair.row,
            "copies": pair.copies,
            "image_id": pair.image_id,
            "image": plain(pair.image),
            "caption": pair.caption,
            "caption_shown": plain(pair.caption),
            "split": None if pair.split is None else plain(pair.split),
            "mine": None if mine is None else _brief(mine),
            "is_hidden": self.is_blind and mine is None,
            "others": [],
            "conflict": False,
        }
        if shown["is_hidden"]:
            return shown
        better = pair.best_caption
        # Others' decisions come after one's own, so that nobody follows the crowd; unless that is what is looked at.
        others = [_brief(entry) for name, entry in by_reviewer.items() if name != reviewer]
        conflict = self.journal.in_conflict(pair.pair_id)
        standing = self.journal.standing(pair.pair_id)
        return shown | {
            "tag": pair.tag,
            "probability": pair.probability,
            "reasons": [plain(reason) for reason in pair.reasons if not _is_suggestion(reason)],
            "best_caption": None if better is None else plain(better),
            "best_caption_margin": pair.best_caption_margin,
            "best_image": None if pair.best_image is None else plain(pair.best_image),
            "best_image_id": pair.best_image_id,
            "best_image_margin": pair.best_image_margin,
            "others": others if mine is not None or conflict else [],
            "conflict": conflict,
            "stands": standing["reviewer"] if conflict and standing else None,
        }


def sample_figures(queue: Queue, journal: Journal, pair_ids: Sequence[str]) -> Figures:
    """What the decisions about a random sample say about the tags in use."""
    outcomes: list[tuple[str, bool]] = []
    conflicts = in_view = 0
    for pair_id, tag in zip(pair_ids, queue.tag_of(pair_ids), strict=True):
        entry = journal.standing(pair_id)
        if entry is None or tag is None:
            continue
        outcomes.append((tag, entry["decision"] != "keep"))
        conflicts += journal.in_conflict(pair_id)
        first = journal.first_of(pair_id, entry["reviewer"])
        turned = first is not None and (first["decision"] == "keep") != (entry["decision"] == "keep")
        in_view += turned or not entry.get("sample")
    return figures(outcomes, queue.num_tagged, len(pair_ids), conflicts=conflicts, in_view=in_view)


def review_facts(run: Run) -> dict[str, Any]:
    """Who decided what in a run, and what the random sample drawn last says of its tags.

    Returns:
        `decided` (pairs with a standing decision), `reviewers` (standing decisions by name and kind), `conflicts` (ids
        of pairs about which reviewers disagree, their number in `num_conflicts`), `num_torn` (lines passed over),
        `figures` (null before a sample was drawn) and `statement` (the figures in words).

    Raises:
        RunError: the run is not tagged, or a file of the review is damaged.
    """
    journal, known = Journal(run.path), remembered_sample(run.path)
    reviewers: dict[str, Counter[str]] = {}
    decided = journal.decided()
    for pair_id in decided:
        for name, entry in journal.by_reviewer(pair_id).items():
            reviewers.setdefault(name or "nameless", Counter())[entry["decision"]] += 1
    conflicts = [pair_id for pair_id in decided if journal.in_conflict(pair_id)]
    found = None if known is None else sample_figures(Queue(run), journal, known["pair_ids"])
    return {
        "decided": len(decided),
        "reviewers": {name: dict(counts) for name, counts in sorted(reviewers.items())},
        "conflicts": conflicts,
        "num_conflicts": len(conflicts),
        "num_torn": journal.num_torn,
        "figures": None if found is None else figures_json(found),
        "statement": [] if found is None else statement(found),
    }


def _new_caption(pair: ReviewPair, decision: str, caption: str | None) -> str:
    if decision == "rematch":
        # The page may only choose what is offered; the words come from the run.
        if pair.best_caption is None:
            raise DatasetError("there is no better caption to take", "fix the caption instead")
        return pair.best_caption
    caption = unicodedata.normalize("NFC", caption or "").strip()
    if not caption:
        raise DatasetError("the new caption is empty", "drop the pair, or write a caption")
    if len(caption) > MAX_CAPTION:
        raise DatasetError(
            f"the new caption has {len(caption):,} characters", f"at most {MAX_CAPTION:,} are taken"
        )
    return caption


def _brief(entry: dict[str, Any]) -> dict[str, Any]:
    caption = entry.get("caption")
    return {
        "decision": entry["decision"],
        "caption": None if caption is None else plain(caption),
        "words": caption,
        "reviewer": plain(entry["reviewer"]) or "nameless",
        "time": entry["time"],
    }


def _is_suggestion(reason: str) -> bool:
    """Whether the page shows the reason beside the suggestion it speaks of."""
    return reason.startswith(("better caption by ", "better image by "))
