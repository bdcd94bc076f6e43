"""Captions by themselves and beside others: empty, a file name, in another language, generic, odd ones out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from nc_audit.findings.found import Found, Vectors, rows_of, usual_agreement

FEW_LANGUAGES = 20  # captions of a known language at least, to say which one is usual
STATUS_WORDS = {"empty_caption": "caption is empty", "missing_caption": "caption is missing"}
_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_FILE = re.compile(
    r"\S*\.(?:jpe?g|png|gif|tiff?|webp|bmp|avif|svg|pdf|txt)|(?:img|dsc|dscn|image|photo)[_-]?\d+",
    re.IGNORECASE,
)
_SMALL_WORDS = {
    name: frozenset(words.split())
    for name, words in {
        "English": "a an the and with of is are in on at there this that by from its to near next two some many",
        "German": "der die das dem den des ein eine einem einer einen und mit ist sind in im auf von neben zwei viele",
        "French": "le la les un une des du de et avec est sont dans sur au aux en près deux plusieurs qui il",
        "Spanish": "el la los las un una unos unas de del y con es son está están en sobre junto al hay dos muchos",
        "Italian": "il lo la gli le un una di del della dei e con è sono nel nella in su sul sulla al due molti che",
        "Portuguese": "o a os as um uma de do da dos das e com é são está em no na sobre ao dois muitos que",
        "Dutch": "de het een van en met is zijn in op bij naast aan voor twee veel er",
    }.items()
}
_LANGUAGES_OF = {
    word: tuple(name for name, words in _SMALL_WORDS.items() if word in words)
    for word in set().union(*_SMALL_WORDS.values())
}
_UNSPACED = {"CJK", "THAI", "LAO", "KHMER", "MYANMAR"}
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HALFWIDTH": "CJK", "FULLWIDTH": "LATIN"}


def written(found: Found, pairs: pa.Table) -> None:
    """Captions that are empty, one word, a file name or URL, or in another script or language than the rest."""
    captions, statuses = pairs["caption"].to_pylist(), pairs["status"].to_pylist()
    texts = ["" if caption is None else caption.strip() for caption in captions]
    scripts = _of_each(texts, script_of)
    for row, (text, script, status) in enumerate(zip(texts, scripts, statuses, strict=True)):
        if status in ("empty_caption", "missing_caption"):
            found.add("empty_caption", row, STATUS_WORDS[status])
        if not text:
            continue
        if _URL.fullmatch(text):
            found.add("file_name_caption", row, "caption is a URL")
        elif _FILE.fullmatch(text):
            found.add("file_name_caption", row, "caption is a file name")
        elif len(text) <= 2 if script in _UNSPACED else len(re.findall(r"\w+", text)) <= 1:
            found.add("short_caption", row, "caption is a single word")
    counts = Counter(one for one in scripts if one)
    if not counts:
        return
    usual, num = counts.most_common(1)[0]
    if num < 0.8 * sum(counts.values()):
        return
    for row, script in enumerate(scripts):
        if script and script != usual:
            found.add(
                "other_script", row, f"caption is in {script.title()}, {num:,} others are in {usual.title()}"
            )
    if usual == "LATIN":
        _other_languages(found, texts)


def script_of(caption: str) -> str | None:
    """The script of most letters of a caption, as Unicode names it (LATIN, CJK, ...); None without letters.

    Example:
        >>> script_of("ein Fluß"), script_of("река"), script_of("12 !")
        ('LATIN', 'CYRILLIC', None)
    """
    if caption.isascii():
        return "LATIN" if any(map(str.isalpha, caption[:2000])) else None
    counts = Counter(_script(letter) for letter in caption[:2000] if letter.isalpha())
    return max(sorted(counts), key=lambda one: counts[one]) if counts else None


def language_of(caption: str) -> str | None:
    """The language whose small words a caption holds most of, two or more; None where that is not clear.

    Example:
        >>> language_of("zwei Flugzeuge auf dem Rollfeld"), language_of("a plane on the runway"), language_of("la casa")
        ('German', 'English', None)
    """
    hits = dict.fromkeys(_SMALL_WORDS, 0)
    for word in _words(caption):
        for name in _LANGUAGES_OF.get(word, ()):
            hits[name] += 1
    first, second = sorted(hits, key=lambda name: -hits[name])[:2]
    return first if hits[first] >= 2 and hits[first] > hits[second] else None


def _other_languages(found: Found, captions: Sequence[str]) -> None:
    """Captions whose small words are of another language than those of nearly all others, and none of theirs."""
    languages = _of_each(captions, language_of)
    counts = Counter(one for one in languages if one)
    if sum(counts.values()) < FEW_LANGUAGES:
        return
    usual, num = counts.most_common(1)[0]
    if num < 0.8 * sum(counts.values()):
        return
    for row, (language, caption) in enumerate(zip(languages, captions, strict=True)):
        if language and language != usual and not _SMALL_WORDS[usual].intersection(_words(caption)):
            found.add("other_script", row, f"caption is in {language}, {num:,} others are in {usual}")


def _of_each(texts: Sequence[str], of: Callable[[str], str | None]) -> list[str | None]:
    """What holds of each text, found out once for equal ones."""
    known = {text: of(text) for text in set(texts)}
    return [known[text] for text in texts]


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption[:2000].casefold())


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return _ONE_SCRIPT.get(name, name)


def generic(found: Found, vectors: Vectors, image_rank: np.ndarray) -> None:
    """Captions of pairs that look right, yet fit many other images better: more than a tenth of all."""
    limit = max(20, len(vectors.image) // 10)
    is_generic = (image_rank > limit) & (vectors.noise_probability < 0.2)
    for row in np.flatnonzero(is_generic).tolist():
        found.add(
            "generic_caption", row, f"generic: {image_rank[row] - 1:,} other images fit the caption better"
        )


def own_disagreement(found: Found, vectors: Vectors) -> None:
    """Captions of likely noisy pairs that agree with their image's other captions no better than with any."""
    usual = usual_agreement(vectors)
    for rows in rows_of(vectors.row_image, len(vectors.image)):
        captions = vectors.row_caption[rows]
        distinct = np.unique(captions)
        if len(distinct) < 3 or len(distinct) > 64 or not (vectors.noise_probability[rows] >= 0.5).any():
            continue
        cosine = vectors.caption[distinct] @ vectors.caption[distinct].T
        mean = (cosine.sum(1) - cosine.diagonal()) / (len(distinct) - 1)
        apart = mean <= usual
        if apart.all():
            continue
        for row, own in zip(rows.tolist(), np.searchsorted(distinct, captions).tolist(), strict=True):
            if apart[own] and vectors.noise_probability[row] >= 0.5:
                found.add("disagrees", row, "disagrees with the image's other captions")
