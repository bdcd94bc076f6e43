"""Runs to review and requests to a review server."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_run import Pair, make_run, pair_id, reader

from nc_audit.review import Review, ReviewServer
from nc_audit.run import Run

STAGES = {
    "train": {
        "key": "t",
        "files": [],
        "seconds": 0.0,
        "pairs": 0,
        "images": 0,
        "captions": 0,
        "whole_images": False,
    },
    "score": {
        "key": "s",
        "files": [],
        "seconds": 0.0,
        "noise_rate": {"estimate": 0.2, "low": 0.1, "high": 0.3, "level": 0.9, "evidence": "strong"},
    },
    "tag": {
        "key": "g",
        "files": [],
        "seconds": 0.0,
        "thresholds": {"clean_at": 0.2, "noisy_at": 0.8, "budget": None},
    },
    "load": {"key": "l", "files": [], "seconds": 0.0},
    "embed": {"key": "e", "files": [], "seconds": 0.0, "encoders": {}},
}


LOOKS = {
    "caption_rank": 1,
    "image_rank": 1,
    "relative_loss": 0.5,
    "swapped_entropy": 0.5,
    "neighbour_distance": 0.5,
}
"""Scores that give no reason of their own."""


def pairs_of(number: int) -> list[Pair]:
    """Noisy, ambiguous and clean pairs in turn, the noisiest first."""
    found = []
    for at in range(number):
        tag, probability = (("noisy", 0.95), ("ambiguous", 0.5), ("clean", 0.05))[at % 3]
        found.append(
            Pair(
                at,
                f"caption number {at}",
                tag=tag,
                probability=probability - at / 10_000,
                best_caption=f"a better caption {at}",
                best_caption_margin=0.25,
                reasons=[f"{at + 2} other captions fit the image better"],
                more={"best_image": "images/0.png", "best_image_margin": 0.125, **LOOKS},
            )
        )
    return found


def run_of(path: Path, pairs: Sequence[Pair] | int = 6) -> Run:
    """A tagged run with such stages that it can be reviewed and tagged anew."""
    pairs = pairs_of(pairs) if isinstance(pairs, int) else pairs
    settings = {"tag": {"clean_at": 0.2, "noisy_at": 0.8}}
    recipe = {"name": "self_paced", "digest": "0f0f", "settings": settings}
    roots = {"roots": {"dataset": str(path.parent)}, "path": str(path.parent)}
    return make_run(path, pairs, stages=json.loads(json.dumps(STAGES)), recipe=recipe, dataset=roots)


def ids_of(pairs: Sequence[Pair] | int = 6) -> list[str]:
    return [pair_id(one) for one in (pairs_of(pairs) if isinstance(pairs, int) else pairs)]


def review_of(run: Run, reviewer: str = "ann", **options: Any) -> Review:
    return Review(run, reviewer, read_image=options.pop("read_image", reader()), **options)


@contextmanager
def served(review: Review) -> Iterator[ReviewServer]:
    server = ReviewServer(review)
    thread = threading.Thread(target=server.serve_until_finished, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.is_finished.set()
        thread.join(10)
        assert not thread.is_alive()


def ask(
    server: ReviewServer,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    token: str | None = None,
    headers: dict[str, str | None] | None = None,
    raw: bytes | None = None,
) -> tuple[int, Any, dict[str, str]]:
    """Status, body (JSON decoded where it is JSON) and headers of an answer to an honest request, or one made worse.

    Headers that are None are left out.
    """
    host = f"127.0.0.1:{server.server_port}"
    given: dict[str, str | None] = {"Host": host}
    data = raw
    if body is not None:
        data = json.dumps(body).encode()
    if data is not None:
        given |= {
            "Content-Type": "application/json",
            "Origin": f"http://{host}",
            "Content-Length": str(len(data)),
        }
    given |= headers or {}
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        line.putrequest(
            method or ("GET" if data is None else "POST"),
            f"/{server.token if token is None else token}/{path}",
            skip_host=True,
            skip_accept_encoding=True,
        )
        for name, value in given.items():
            if value is not None:
                line.putheader(name, value)
        line.endheaders(data)
        answer = line.getresponse()
        content = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
    finally:
        line.close()
    is_json = found.get("content-type", "").startswith("application/json")
    return answer.status, json.loads(content) if is_json else content, found


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "decisions.jsonl").read_text().splitlines()]
