"""Whether the hub can be asked right now, answered quickly where it cannot."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

PATIENCE = 1.5  # seconds


@contextmanager
def unasked() -> Iterator[None]:
    """Nothing is asked of the hub meanwhile: what is not in its cache counts as out of reach."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def refusal(kind: Literal["models", "datasets"], repository: str) -> str | None:
    """Why the hub cannot serve a repository right now, or None where it can; answers within two seconds.

    Args:
        kind: of repository, as the hub's address has it.
        repository: `OWNER/NAME`.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{constants.ENDPOINT}/api/{kind}/{repository}"
        try:
            request = urllib.request.Request(url, headers=headers, method="HEAD")
            with urllib.request.urlopen(request, timeout=PATIENCE):
                answer.append(None)
        except urllib.error.HTTPError as problem:
            answer.append(f"the hub answers {problem.code} for {repository}")
        except (OSError, ValueError):
            answer.append("the hub cannot be reached")

    # A thread, because looking up a host name knows no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answer[0] if answer else "the hub does not answer"
