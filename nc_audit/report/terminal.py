"""Pictures for terminals that draw them: which terminal does, and what to send it.

Two protocols: Kitty's (a PNG in pieces) and Sixel (DEC's, six rows of pixels to a character). Who knows neither gets
half blocks, see `thumbnails.half_blocks`. Nothing here prints; only `ask_terminal` talks to the terminal.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nc_audit.errors import DatasetError, nearest
from nc_audit.report.text import plain
from nc_audit.report.thumbnails import small

Form = Literal["kitty", "sixel", "blocks"]
FORMS: tuple[Form, ...] = ("kitty", "sixel", "blocks")
VARIABLE = "NC_AUDIT_GRAPHICS"

_CELL_WIDTH = 8
_KITTY_SIDE = 192
_KITTY_PIECE = 4096
_SIXEL_COLOURS = 255
_PROGRAMS = {"ghostty", "wezterm", "kitty"}
_ANSWER_SECONDS = 1.0
# Cell size in pixels, then the attributes: every terminal answers the second, which therefore ends the waiting.
_QUESTION = "\x1b[16t\x1b[c"
_ATTRIBUTES = re.compile(r"\x1b\[\?([\d;]*)c")
_CELL_SIZE = re.compile(r"\x1b\[6;(\d{1,3});(\d{1,3})t")


@dataclass(frozen=True)
class Screen:
    """What a terminal draws.

    Attributes:
        form: kitty, sixel or blocks.
        cell_width: of a character cell, in pixels, 1..
    """

    form: Form
    cell_width: int = _CELL_WIDTH


def screen_of(environment: Mapping[str, str], ask: Callable[[], str]) -> Screen:
    """What the terminal draws, as the environment and the terminal itself say.

    NC_AUDIT_GRAPHICS (kitty, sixel or blocks) decides where it is set. Below tmux and screen it is always half blocks:
    they keep pictures to themselves or garble them.

    Args:
        environment: the variables of the process.
        ask: gives the terminal's answer to a question about its attributes, "" where there is none; called only where
            the environment does not say enough.

    Raises:
        DatasetError: NC_AUDIT_GRAPHICS is none of the three.
    """
    wanted = environment.get(VARIABLE, "")
    if wanted:
        for form in FORMS:
            if form == wanted:
                return Screen(form, _cell_width(ask()) if form == "sixel" else _CELL_WIDTH)
        raise DatasetError(f"{VARIABLE} is {plain(wanted)!r}", nearest(wanted, FORMS))
    term = environment.get("TERM", "")
    if environment.get("TMUX") or environment.get("STY") or term.startswith(("screen", "tmux")):
        return Screen("blocks")
    # A terminal started from another inherits KITTY_WINDOW_ID, but says its own name.
    program = environment.get("TERM_PROGRAM", "").lower()
    is_kitty = term in {"xterm-kitty", "xterm-ghostty"} or bool(environment.get("KITTY_WINDOW_ID"))
    if program in _PROGRAMS or (not program and is_kitty):
        return Screen("kitty")
    answer = ask()
    attributes = _ATTRIBUTES.search(answer)
    if attributes and "4" in attributes[1].split(";"):
        return Screen("sixel", _cell_width(answer))
    return Screen("blocks")


def _cell_width(answer: str) -> int:
    size = _CELL_SIZE.search(answer)
    return min(64, max(4, int(size[2]))) if size else _CELL_WIDTH


def ask_terminal(device: str = "/dev/tty", seconds: float = _ANSWER_SECONDS) -> str:
    """The terminal's answer about its cell size and attributes.

    Args:
        device: path of the terminal.
        seconds: how long to wait for it.

    Returns:
        What came, up to the end of the attributes; "" where there is no terminal, the process is in its background, or
        the system knows no such terminals.
    """
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return ""
    try:
        terminal = os.open(device, os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return ""
    got = b""
    try:
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return ""  # a process in the background would be stopped
        before = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal, termios.TCSADRAIN)
            os.write(terminal, _QUESTION.encode())
            until = time.monotonic() + seconds
            while not _ATTRIBUTES.search(got.decode("latin-1")) and len(got) < 1024:
                ready, _, _ = select.select([terminal], [], [], max(0.0, until - time.monotonic()))
                if not ready:
                    break
                piece = os.read(terminal, 256)
                if not piece:
                    break
                got += piece
        finally:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    except (OSError, termios.error):
        return ""
    finally:
        os.close(terminal)
    return got.decode("latin-1")


def kitty(data: bytes, columns: int) -> str:
    """An image as an escape sequence of Kitty's graphics protocol; the cursor ends in the picture's last row.

    Args:
        data: the bytes of an image file.
        columns: cells that the longer edge takes where cells are twice as high as wide, 1..

    Raises:
        DatasetError: it cannot be decoded.
    """
    image = small(data, _KITTY_SIDE)
    across = max(1, round(columns * image.width / max(image.size)))
    out = io.BytesIO()
    image.save(out, "PNG")
    payload = base64.b64encode(out.getvalue()).decode("ascii")
    pieces = [payload[at : at + _KITTY_PIECE] for at in range(0, len(payload), _KITTY_PIECE)]
    # q=2: the terminal shall not answer, or the shell would read it as typing.
    heads = [f"a=T,f=100,q=2,c={across},", *["q=2,"] * (len(pieces) - 1)]
    return "".join(
        f"\x1b_G{head}m={int(at + 1 < len(pieces))};{piece}\x1b\\"
        for at, (head, piece) in enumerate(zip(heads, pieces, strict=True))
    )


def sixel(data: bytes, columns: int, cell_width: int = _CELL_WIDTH) -> str:
    """An image as a Sixel sequence of at most 255 colours.

    Args:
        data: the bytes of an image file.
        columns: cells that the longer edge takes at most, 1..
        cell_width: of a cell, in pixels, 1..

    Raises:
        DatasetError: it cannot be decoded.
    """
    image = small(data, columns * cell_width).quantize(_SIXEL_COLOURS)
    width, height = image.size
    palette = np.asarray(image.getpalette(), int).reshape(-1, 3)
    index = np.full((-(-height // 6) * 6, width), -1)
    index[:height] = np.asarray(image)
    registers = []
    for colour in np.unique(index[:height]).tolist():
        red, green, blue = (round(part * 100 / 255) for part in palette[colour].tolist())
        registers.append(f"#{colour};2;{red};{green};{blue}")
    bands = []
    for band in index.reshape(-1, 6, width):
        lines = []
        for colour in np.unique(band[band >= 0]).tolist():
            bits = ((band == colour) << np.arange(6)[:, None]).sum(0)
            lines.append(f"#{colour}{_run_lengths(''.join(map(chr, bits + 63)))}")
        bands.append("$".join(lines))
    # 0;1: pixels that no colour takes stay as they are; 1;1: square pixels.
    return f'\x1bP0;1q"1;1;{width};{height}{"".join(registers)}{"-".join(bands)}\x1b\\'


def _run_lengths(text: str) -> str:
    """Four and more equal characters as a count; what is empty at the end left away."""
    return re.sub(r"(.)\1{3,}", lambda match: f"!{len(match[0])}{match[1]}", text.rstrip("?"))
