"""Hostile captions in each text format: what comes out neither acts nor gets lost."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nc_audit.report.text import csv_cell, json_text, markdown_cell, plain

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066\u200b\r\nnext\x9b31m\U000e0041\ufeff"
TEXT = st.text(st.characters(codec="utf-8"))


def is_unseen(character: str) -> bool:
    """Controls, line separators, format characters other than the two joiners, Arabic and Syriac signs and such."""
    return (
        unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
        or character in "\u202e\u2066\u200b\ufeff\u061c"
    )


def test_plain_shows_what_a_terminal_would_obey():
    assert plain(HOSTILE) == (
        r"\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066\u200b\r\nnext\x9b31m\U000e0041\ufeff"
    )


@pytest.mark.parametrize(
    "text", ["une maison près d'une rivière", "一座红色的房子", "خانه‌ها", "घर", "👩‍🚀 + 🛰️", "\\n as typed"]
)
def test_plain_leaves_every_script_as_it_is(text):
    assert plain(text) == text


@given(TEXT)
@example(HOSTILE)
def test_plain_is_one_line_without_controls_and_changes_nothing_twice(text):
    shown = plain(text)
    assert not any(map(is_unseen, shown))
    assert plain(shown) == shown


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_a_formula_becomes_text(start):
    assert csv_cell(f"{start}cmd|' /C calc'!A0") == "'" + plain(f"{start}cmd|' /C calc'!A0")


def test_an_ordinary_caption_stays_as_it_is_in_a_cell():
    assert csv_cell("two planes - one of them red = rare") == "two planes - one of them red = rare"


@given(TEXT)
@example("a|b")
@example("\\|")
@example("<img src=x onerror=alert(1)>")
@example("[x](javascript:alert(1)) ![x](http://a.b/c.png) `code` ~~no~~ **b** _i_")
@example("www.example.org https://example.org a@example.org &amp; &#124;")
@example("```\n| --- |")
def test_a_markdown_cell_renders_to_the_text_itself(text):
    markdown = MarkdownIt("gfm-like", {"linkify": False}).parse(
        f"| a | b |\n| --- | --- |\n| {markdown_cell(text)} | end |\n"
    )
    cells = [token for token in markdown if token.type == "inline"][2:]
    assert len(cells) == 2
    assert {child.type for child in cells[0].children} <= {"text", "text_special"}
    rendered = "".join(child.content for child in cells[0].children)
    assert rendered.split() == plain(text).split()
    assert cells[1].content == "end"


def test_bare_addresses_are_broken_up_for_viewers_that_make_links_of_them():
    assert markdown_cell("see WWW.example.org or https://example.org, a@b.c") == (
        r"see WWW\.example.org or https\://example.org, a\@b.c"
    )


@given(TEXT)
@example(HOSTILE)
def test_json_is_lossless_and_safe_to_print(text):
    document = json_text({"caption": text, text: [text]})
    assert json.loads(document) == {"caption": text, text: [text]}
    assert not any(map(is_unseen, document.replace("\n", "")))


def test_json_keeps_readable_characters():
    assert "près" in json_text(["près"])


def test_json_refuses_what_is_no_number():
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        json_text([float("nan")])
