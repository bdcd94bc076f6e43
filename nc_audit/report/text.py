"""Captions and file names as text that is safe to show: in a terminal, a CSV cell, a Markdown cell, a JSON document.

Both come from strangers. A terminal obeys escape sequences, a bidirectional override shows a name backwards, a
spreadsheet runs what looks like a formula, a Markdown viewer renders markup and HTML. Everything that is written
for people passes through one of these functions, which show such characters instead of sending them.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Controls, invisible format characters, bidirectional marks, line separators, surrogates, non-characters and tag
# characters. The zero-width joiner and non-joiner stay: Persian, Hindi and emoji are written with them.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# What spreadsheets take for the start of a formula, the full-width forms included.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # the last four are full-width

_MARKDOWN = re.compile(r"[\\`*_\[\]|~!#$@]")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def _visible(match: re.Match[str]) -> str:
    character = match.group()
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def plain(text: str) -> str:
    """One line of text that a terminal shows and does not obey.

    Control characters, terminal escapes, line breaks, bidirectional overrides and invisible characters become
    visible backslash escapes; everything else, in any script, stays.

    Example:
        >>> plain("a caption" + chr(27) + "[2J")
        'a caption\\\\x1b[2J'
    """
    return _UNSEEN.sub(_visible, text)


def csv_cell(text: str) -> str:
    """A CSV cell that a spreadsheet shows as text.

    A cell that begins with =, +, -, @, a tab or a line break would be taken for a formula: it gets a leading
    apostrophe. The rest is as in `plain`. Numbers are written as they are and do not pass through here.

    Example:
        >>> csv_cell("=1+1")
        "'=1+1"
    """
    return f"'{plain(text)}" if text.startswith(_FORMULA) else plain(text)


def markdown_cell(text: str) -> str:
    """Text that a Markdown viewer shows as it is: no markup, no HTML, no links, no further table cells.

    Example:
        >>> markdown_cell("a|b <b>*c*</b>")
        'a\\\\|b &lt;b&gt;\\\\*c\\\\*&lt;/b&gt;'
    """
    escaped = _MARKDOWN.sub(r"\\\g<0>", plain(text))
    escaped = re.sub("[&<>]", lambda match: _HTML[match.group()], escaped)
    # GitHub's viewers make links of bare addresses; an escaped mark in the middle stops them.
    return re.sub(r"(?i)\bwww\.", lambda match: match.group()[:-1] + "\\.", escaped.replace("://", "\\://"))


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """A JSON document, lossless and safe to print: unseen characters are JSON escapes, readable ones stay.

    Args:
        value: what `json` can write, without NaN or infinities.
        indent: blanks per level; None for one line.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return _UNSEEN.sub(_json_escape, text)


def _json_escape(match: re.Match[str]) -> str:
    # A line break can only be json's own, between values; those inside strings are escaped already.
    return "\n" if match.group() == "\n" else json.dumps(match.group())[1:-1]
