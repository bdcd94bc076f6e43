"""One wrong word in a caption that is otherwise right: another object, colour or count, so that the sentence reads on.

A content word is a run of two letters or more that is neither an English function word nor in more than a quarter of
the captions, which holds for the function words of other languages and for what every caption of a set says ("photo").
Counts ("two", "several") are content. Where a language writes no spaces, a run between two marks is one word.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

_FUNCTION = ENGLISH_STOP_WORDS - {
    *("two", "three", "four", "five", "six", "eight", "nine", "ten", "eleven", "twelve", "fifteen", "twenty"),
    *("many", "several", "few"),
}
_COMMON = 0.25  # share of the captions above which a word tells no image from another
_RUN = re.compile(r"[^\W\d_]+")
_MOST_TRIES = 200


class ContentWords:
    """The content words of a set of captions, and what stands before each.

    Args:
        captions: all captions of the set, as they were.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        in_captions = Counter(word for caption in captions for word in words_of(caption))
        most = max(1, int(_COMMON * len(captions)))
        self._content = {
            word
            for word, number in in_captions.items()
            if len(word) > 1 and number <= most and word not in _FUNCTION
        }
        self._all: list[str] = []
        self._after: defaultdict[str, list[str]] = defaultdict(list)
        for caption in captions:
            for before, _, word in self._places(caption):
                self._all.append(word)
                self._after[before].append(word)

    def replace_one(self, caption: str, known: Collection[str], rng: np.random.Generator) -> str | None:
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
        for place in _RUN.finditer(caption):
            word = place.group().casefold()
            if word in self._content:
                yield before, place, word
            before = word


def words_of(caption: str) -> set[str]:
    """Distinct words of a caption, casefolded, function words among them.

    Example:
        >>> sorted(words_of("Two planes, and two cars"))
        ['and', 'cars', 'planes', 'two']
    """
    return {place.group().casefold() for place in _RUN.finditer(caption)}
