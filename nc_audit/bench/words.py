"""One wrong word in a caption that is otherwise right: another object, colour or count."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from nc_audit.words import WORD, content_words, words_of

_MOST_TRIES = 200


class WrongWords:
    """The content words of a set of captions, and what stands before each.

    Args:
        captions: all captions of the set, as they were.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        said_in = Counter(word for caption in captions for word in words_of(caption))
        self._content = content_words(said_in, len(captions))
        self._all: list[str] = []
        self._after: defaultdict[str, list[str]] = defaultdict(list)
        for caption in captions:
            for before, _, word in self._places(caption):
                self._all.append(word)
                self._after[before].append(word)

    def put_one(self, caption: str, known: Collection[str], rng: np.random.Generator) -> str | None:
        """The caption with one of its content words replaced by another of the set, or None where that cannot be.

        The new word is drawn as often as the set uses it, first among those that follow the same word elsewhere.

        Args:
            caption: caption to change.
            known: words of all captions of the image (`words_of`); neither they nor their inflections are put in.
            rng: draws the place and the word.
        """
        places = list(self._places(caption))
        for at in rng.permutation(len(places)).tolist():
            before, place, _ = places[at]
            for drawn in (self._after[before], self._all):
                for _ in range(min(_MOST_TRIES, 5 * len(drawn))):
                    word = drawn[int(rng.integers(len(drawn)))]
                    if not any(word.startswith(one) or one.startswith(word) for one in known):
                        first = caption[place.start()]
                        new = word.capitalize() if first.isupper() else word
                        return caption[: place.start()] + new + caption[place.end() :]
        return None

    def _places(self, caption: str) -> Iterator[tuple[str, re.Match[str], str]]:
        """The word before, the place and the word, of each content word of a caption."""
        before = ""
        for place in WORD.finditer(caption):
            word = place.group().casefold()
            if word in self._content:
                yield before, place, word
            before = word
