"""Terminal output at every width: no line runs over the edge, further lines stand below the first."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_run import Pair, make_run
from rich.console import Console  # noqa: TID251
from rich.text import Text  # noqa: TID251

from nc_audit import console
from nc_audit.diff import Change, Difference, Verdict
from nc_audit.gate import Check, Limit
from nc_audit.report import report_rows, summary
from nc_audit.report.text import plain

HOSTILE = {
    "wide": "一座红色的房子坐落在绿色的森林旁边的道路上，旁边有三个白色的储油罐和一艘船",
    "joined emoji": "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 a family of four beside a rocket 🛰️ " * 3,
    "right to left": "שלום עולם، مرحبا بالعالم " * 6,
    "combining": "z̷̢̛a̶̡͠l̵̛g̶o̸͝ " * 30,
    "vowel signs": "हिन्दी नमस्ते दुनिया " * 8,
    "escapes": "\x1b]0;owned\x07\x1b[2J\r\n\u202egnp.exe\u2066 " * 3,
    "one word": "x" * 500,
    "markup": "[bold red]markup[/bold red] [link=http://x]l[/link]",
}


def lone_cells(character: str) -> int:
    """Cells of a character that a terminal joins to no other, by Unicode's own tables."""
    if unicodedata.east_asian_width(character) in "WF" or "\U0001f1e6" <= character <= "\U0001f1ff":
        return 2
    return int(unicodedata.category(character) not in ("Mn", "Me", "Cf"))


def shown(folder, capsys, monkeypatch, width: int, pairs: list[Pair]) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    run = make_run(folder / "run", pairs)
    console.show_rows(report_rows(run), summary(run))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_line_of_a_report_runs_over_the_edge(tmp_path, capsys, monkeypatch, width, kind):
    text = HOSTILE[kind]
    pair = Pair(0, text, image="images/a.png", tag="noisy", probability=0.9, reasons=["fits nothing", text])
    lines = shown(tmp_path, capsys, monkeypatch, width, [pair])
    assert max(sum(map(lone_cells, line)) for line in lines) <= width
    assert all(character >= " " and character not in "\u202e\u2066" for line in lines for character in line)
    if width < 100:
        found = "".join("".join(lines).split())
        assert found.count("".join(plain(text).split())) == 2, "caption and reason are all there"


def test_a_narrow_terminal_lists_and_a_wide_one_tabulates(tmp_path, capsys, monkeypatch):
    pairs = [
        Pair(0, "two ships", tag="noisy", probability=0.9, reasons=["better caption: " + "a plane " * 6]),
        Pair(1, "a plane", probability=0.1),
    ]
    assert shown(tmp_path, capsys, monkeypatch, 40, pairs) == [
        "noisy p 0.90 row 0 images/0.png",
        "  two ships",
        "  - better caption: a plane a plane a",
        "    plane a plane a plane a plane",
        "",
        "clean p 0.10 row 1 images/1.png",
        "  a plane",
        "",
    ]
    head, first, second = shown(tmp_path / "wide", capsys, monkeypatch, 200, pairs)
    assert head.split() == ["row", "p", "tag", "image", "caption", "reasons"]
    assert first.split()[:6] == ["0", "0.90", "noisy", "images/0.png", "two", "ships"]
    assert head.index("caption") == first.index("two ships") == second.index("a plane")
    assert first.index("better caption") == head.index("reasons")


@pytest.mark.parametrize("caption", ["हिन्दी", "שלום", "👩‍🚀"])
def test_columns_that_would_be_crooked_are_listed_instead(tmp_path, capsys, monkeypatch, caption):
    lines = shown(tmp_path, capsys, monkeypatch, 160, [Pair(0, caption), Pair(1, "two ships")])
    assert lines[1] == f"  {caption}"
    assert lines[4] == "  two ships"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=200), st.integers(24, 90))
def test_any_text_hangs_below_its_first_word_and_stays_whole(text, width):
    target = Console(width=width, color_system=None)
    with target.capture() as captured:
        console._hanging(target, "- ", Text(plain(text)))
    first, *others = captured.get().split("\n")[:-1] or [""]
    assert [line[:2] for line in others] == ["  "] * len(others)
    assert "".join((first[2:] + "".join(others)).split()) == "".join(plain(text).split())


def test_numbers_stand_on_the_right_and_words_on_the_left(capsys):
    console.show_gate([Check("noisy", Limit(0.02, True), 0.1983), Check("unusable", Limit(0, False), 3)])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "limit     at most    found",
        "noisy         2 %  19.83 %  FAIL",
        "unusable        0        3  FAIL",
    ]


def test_a_difference_hangs_its_captions_and_reasons(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "55")
    before = Verdict(
        7,
        "images/7.png",
        "two ships in the wide, wide harbour",
        "noisy",
        0.9,
        ["better caption: a plane or two planes"],
    )
    change = Change("id", before, replace(before, tag="clean", noise_probability=0.1, reasons=[]))
    console.show_diff(Difference({("noisy", "clean"): 1}, [change], [], []), 5)
    assert capsys.readouterr().out.splitlines()[5:] == [
        "1 pair changed tag",
        "  row 7  images/7.png  two ships in the wide, wide",
        "         harbour",
        "    was noisy 0.90  (better caption: a plane or two",
        "        planes)",
        "    now clean 0.10",
        "0 pairs in the first run only",
        "0 pairs in the second run only",
    ]
