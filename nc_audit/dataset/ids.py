"""Identity by content: two images with equal bytes are one image, two captions that normalise equally are one."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

# ASCII, Arabic, Urdu, Armenian, Devanagari, Ethiopic, Burmese, Mongolian and CJK; NFKC has already turned the
# full-width and combined forms into these.
_SENTENCE_FINAL = dict.fromkeys(map(ord, ".!?…؟۔։।॥።။᠃᠉。"), " ")
_WORD = re.compile(r"[^\W_]")


def content_id(*parts: str | bytes) -> str:
    """Hash of a list of strings and byte strings; 32 hex digits of SHA-256.

    Every part enters with its type and length, so that no two lists share a hash by where their parts are cut.

    Example:
        >>> content_id("ab", "c") == content_id("a", "bc")
        False
    """
    digest = hashlib.sha256()  # fed part by part: a joined copy of an image would double its memory
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update((b"s%d:" if isinstance(part, str) else b"b%d:") % len(data))
        digest.update(data)
    return digest.hexdigest()[:32]


def content_id_of_blocks(size: int, blocks: Iterable[bytes]) -> str:
    """The `content_id` of one byte string that comes in blocks, `size` bytes in all.

    Example:
        >>> content_id_of_blocks(3, [b"a", b"bc"]) == content_id(b"abc")
        True
    """
    digest = hashlib.sha256(b"b%d:" % size)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()[:32]


def normalise_caption(caption: str) -> str:
    """What two captions must share to count as one: NFKC, case folded, no full stops, single spaces.

    Full stops and other sentence-final punctuation become spaces wherever they stand. Normalising twice changes
    nothing.

    Example:
        >>> normalise_caption("  A Baseball  field .")
        'a baseball field'
    """
    if caption.isascii():
        return " ".join(caption.lower().replace(".", " ").replace("!", " ").replace("?", " ").split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", caption).casefold())
    folded = unicodedata.normalize("NFKC", folded.casefold())
    return " ".join(folded.translate(_SENTENCE_FINAL).split())


def says_nothing(caption: str) -> bool:
    """Whether a caption holds only white space, punctuation and invisible characters."""
    if _WORD.search(caption):
        return False
    return all(unicodedata.category(character)[0] in "ZCP" for character in caption)
