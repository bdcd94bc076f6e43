"""Every error a caller can cause: what is wrong, with the numbers; what to do next; and the facts as values.

All share the root `AuditError`; each also is the built-in error that a library user would expect to catch.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


class AuditError(Exception):
    """What is wrong (`message`), what to do about it (`hint`), and the facts (`context`)."""

    def __init__(self, message: str, hint: str = "", **context: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = context

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RecipeError(AuditError, ValueError):
    """A recipe is invalid; `problems` lists every one, not only the first."""

    def __init__(self, message: str, hint: str = "", problems: Sequence[str] = (), **context: Any) -> None:
        super().__init__(message, hint, **context)
        self.problems = list(problems)


class DatasetError(AuditError, ValueError):
    """A dataset cannot be read as caption-image pairs."""


class SchemaError(AuditError, ValueError):
    """A table breaks its schema."""


class ShapeError(AuditError, ValueError):
    """A tensor has the wrong shape; the expected one in letters, the actual one in numbers."""

    def __init__(self, name: str, expected: str, actual: Sequence[int]) -> None:
        super().__init__(f"{name} must have shape [{expected}], got {list(actual)}", "")
        self.expected = expected
        self.actual = list(actual)


class EncoderError(AuditError, RuntimeError):
    """An encoder is unknown, or its weights cannot be had."""


class RunError(AuditError, RuntimeError):
    """A run directory is missing, incomplete, stale or in use."""


class DiskError(AuditError, RuntimeError):
    """A file could not be written for want of room.

    Not an OSError: those who read images take one for an image that cannot be read, and go on.
    """


class TrainingError(AuditError, RuntimeError):
    """Training went wrong: a non-finite loss, with the step and the learning rate."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint naming the known word closest to `word`, or all of them when none is close.

    Example:
        >>> nearest("tfdif", ["tfidf", "patches"])
        'did you mean tfidf?'
        >>> nearest("xyz", ["a", "b"])
        'known: a, b'
    """
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
