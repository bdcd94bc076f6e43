"""Words of captions, and which of them tell one image from another.

A word is a run of letters, casefolded. Where a language writes no spaces, a run between two marks is one word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

WORD = re.compile(r"[^\W\d_]+")
_FUNCTION = frozenset(
    " ".join(
        (
            "a an the this that these those such same other another each every both either neither some any all",
            "and or but nor so as if than then while because though although not no only just also too very",
            "of in on at by to from with without within into onto upon over under above below between among beside",
            "besides near next around along across through behind against toward towards up down out off away about",
            "is are was were be been being am has have had having do does did can could will would may might must",
            "shall should it its itself he him his she her hers they them their theirs we us our you your me my who",
            "whom whose which what where when how why there here much more most less least lot lots",
        )
    ).split()
)
_COMMON = 0.25


def words_of(caption: str) -> set[str]:
    """Distinct words of a caption, function words among them.

    Example:
        >>> sorted(words_of("Two planes, and two cars"))
        ['and', 'cars', 'planes', 'two']
    """
    return set(WORD.findall(caption.casefold()))


def content_words(said_in: Mapping[str, int], num_captions: int) -> set[str]:
    """Words of two letters or more that are no English function words, nor in more than a quarter of the captions.

    The latter holds for the function words of other languages, and for what every caption of a set says ("photo").
    Counts ("two", "several") are content.

    Args:
        said_in: number of captions that hold each word.
        num_captions: how many there are.
    """
    most = max(1, int(_COMMON * num_captions))
    return {word for word, num in said_in.items() if len(word) > 1 and num <= most and word not in _FUNCTION}
