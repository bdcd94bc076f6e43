"""Pictures in terminals: what is sent, decoded back to pixels; which terminal gets what; a terminal that is asked."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_run import Pair, make_run, picture
from PIL import Image

from nc_audit import console
from nc_audit.dataset.images import ImageStore
from nc_audit.errors import DatasetError
from nc_audit.report import report_rows
from nc_audit.report.terminal import Screen, ask_terminal, kitty, screen_of, sixel


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8), "RGB").save(out, "PNG")
    return out.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3))


def drawn_by_kitty(sequence: str) -> tuple[dict[str, str], np.ndarray]:
    """The keys of the first piece and the pixels of a kitty sequence, read as its documentation says."""
    pieces = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", sequence)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in pieces) == sequence
    assert all(len(data) <= 4096 for _, data in pieces)
    assert all(len(data) % 4 == 0 for _, data in pieces[:-1])
    keys = [dict(one.split("=") for one in given.split(",")) for given, _ in pieces]
    assert [one["m"] for one in keys] == ["1"] * (len(pieces) - 1) + ["0"]
    assert all(set(one) <= {"m", "q"} for one in keys[1:])
    image = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    return keys[0], np.asarray(image)


def drawn_by_sixel(sequence: str) -> np.ndarray:
    """The pixels of a sixel sequence, read as DEC's manual says; -1 where nothing is drawn."""
    head = re.match(r'\x1bP0;1q"1;1;(\d+);(\d+)', sequence)
    assert sequence.endswith("\x1b\\")
    width, height = int(head[1]), int(head[2])
    pixels = np.full((-(-height // 6) * 6, width, 3), -1)
    colours, colour, x, y = {}, None, 0, 0
    body = sequence[head.end() : -2]
    parts = re.findall(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|([$-])", body)
    assert re.sub(r"#\d+(;2;\d+;\d+;\d+)?|!\d+[?-~]|[?-~]|[$-]", "", body) == ""
    for register, red, green, blue, times, repeated, single, move in parts:
        if register and red:
            assert max(int(red), int(green), int(blue)) <= 100
            colours[register] = [round(int(one) * 2.55) for one in (red, green, blue)]
        elif register:
            colour = colours[register]
        elif move:
            x, y = 0, y + 6 * (move == "-")
        else:
            bits, count = ord(repeated or single) - 63, int(times or 1)
            for row in range(6):
                if bits >> row & 1:
                    assert (pixels[y + row, x : x + count] == -1).all(), "a pixel is drawn twice"
                    pixels[y + row, x : x + count] = colour
            x += count
            assert x <= width
    assert len(colours) <= 256
    assert (pixels[height:] == -1).all()
    return pixels[:height]


def test_kitty_gets_a_png_in_pieces_without_an_answer():
    keys, pixels = drawn_by_kitty(kitty(png(noise(100, 200)), 24))
    assert keys == {"a": "T", "f": "100", "q": "2", "c": "24", "m": "1"}
    assert pixels.shape == (96, 192, 3)


def test_kitty_draws_the_very_pixels_of_a_small_image():
    small = noise(40, 20)
    keys, pixels = drawn_by_kitty(kitty(png(small), 24))
    assert keys["c"] == "12"
    assert (pixels == small).all()


def test_a_flat_image_as_kitty_and_sixel_to_the_letter():
    data = png(np.full((7, 5, 3), (255, 0, 51)))
    sent = kitty(data, 10)
    assert sent.startswith("\x1b_Ga=T,f=100,q=2,c=7,m=0;iVBOR")
    assert sent.endswith("\x1b\\")
    assert sixel(data, 10) == '\x1bP0;1q"1;1;5;7#0;2;100;0;20#0!5~-#0!5@\x1b\\'


def test_sixel_draws_every_pixel_once_in_about_its_colour():
    steps = np.linspace(0, 255, 30)
    image = np.stack(np.broadcast_arrays(steps[:, None], steps[None, :20], 128.0), -1)
    drawn = drawn_by_sixel(sixel(png(image), 10))
    assert drawn.shape == (30, 20, 3)
    assert (drawn >= 0).all()
    assert np.abs(drawn - image).mean() < 12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 9))
def test_few_colours_come_through_sixel_exactly(height, width, count, seed):
    generator = np.random.default_rng(seed)
    palette = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [51, 102, 153]])[:count]
    image = palette[generator.integers(0, count, (height, width))]
    assert (drawn_by_sixel(sixel(png(image), 10)) == image).all()


def test_sixel_takes_the_columns_in_cells_of_the_terminal():
    assert drawn_by_sixel(sixel(png(noise(400, 200)), 24)).shape == (192, 96, 3)
    assert drawn_by_sixel(sixel(png(noise(400, 200)), 24, 10)).shape == (240, 120, 3)


def never() -> str:
    raise AssertionError("the terminal was asked")


VT340 = "\x1b[6;20;10t\x1b[?63;1;2;4c"


@pytest.mark.parametrize(
    ("environment", "ask", "screen"),
    [
        ({"TERM": "xterm-kitty"}, never, Screen("kitty")),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, never, Screen("kitty")),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, never, Screen("kitty")),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, never, Screen("kitty")),
        ({"TERM": "xterm-ghostty"}, never, Screen("kitty")),
        ({"TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, lambda: "", Screen("blocks")),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "tmux", "KITTY_WINDOW_ID": "1"}, never, Screen("blocks")),
        ({"TERM": "xterm-kitty", "TMUX": "socket,1,0"}, never, Screen("blocks")),
        ({"TERM": "screen.xterm-256color", "KITTY_WINDOW_ID": "1"}, never, Screen("blocks")),
        ({"TERM": "xterm-kitty", "STY": "1.pts"}, never, Screen("blocks")),
        ({"TERM": "xterm-256color"}, lambda: VT340, Screen("sixel", 10)),
        ({"TERM": "xterm-256color"}, lambda: "\x1b[?62;4c", Screen("sixel", 8)),
        ({"TERM": "xterm-256color"}, lambda: "\x1b[?62;22;24;44c", Screen("blocks")),
        ({"TERM": "xterm-256color"}, lambda: "", Screen("blocks")),
        ({}, lambda: "typed ahead 4c", Screen("blocks")),
        ({"NC_AUDIT_GRAPHICS": "blocks", "TERM": "xterm-kitty"}, never, Screen("blocks")),
        ({"NC_AUDIT_GRAPHICS": "kitty", "TMUX": "x"}, never, Screen("kitty")),
        ({"NC_AUDIT_GRAPHICS": "sixel"}, lambda: "", Screen("sixel", 8)),
    ],
)
def test_each_terminal_gets_what_it_draws(environment, ask, screen):
    assert screen_of(environment, ask) == screen


def test_an_unknown_form_of_pictures_is_told():
    with pytest.raises(DatasetError) as caught:
        screen_of({"NC_AUDIT_GRAPHICS": "sixels"}, never)
    assert str(caught.value) == "NC_AUDIT_GRAPHICS is 'sixels' (did you mean sixel?)"


def answered_by(answer: bytes) -> tuple[str, bytes, str]:
    """What a child process hears from a terminal that answers so, what it asked, and what it finds typed after."""
    child, terminal = pty.fork()
    if child == 0:  # a session of its own, with the new terminal as its controlling one
        heard = ask_terminal(seconds=0.5 if not answer else 20)
        os.write(1, b"heard " + heard.encode().hex().encode() + b"\n")
        os._exit(0)
    shown = b""
    sent = False
    try:
        while True:
            try:
                shown += os.read(terminal, 1024)
            except OSError:  # the child has gone
                break
            if not sent and shown.endswith(b"\x1b[c"):
                sent = True
                for piece in (answer[:5], answer[5:]):
                    os.write(terminal, piece)
                    time.sleep(0.05)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    question, _, heard = shown.partition(b"heard ")
    return bytes.fromhex(heard.decode().strip()).decode(), question, heard.decode()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("answer", [VT340, ""])
def test_a_terminal_is_asked_and_its_answer_not_shown(answer):
    heard, question, _ = answered_by(answer.encode())
    assert (heard, question) == (answer, b"\x1b[16t\x1b[c")


def test_no_terminal_no_answer(tmp_path):
    (tmp_path / "file").touch()
    assert ask_terminal(str(tmp_path / "none")) == ""
    assert ask_terminal(str(tmp_path / "file")) == ""


def shown_in(tmp_path, monkeypatch, environment: dict[str, str], *, is_terminal: bool) -> str:
    """What `show_thumbnails` writes to a terminal or a pipe."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture(0))
    run = make_run(tmp_path / "run", [Pair(0, "a house", probability=0.9)])
    for name in ("NO_COLOR", "KITTY_WINDOW_ID", "TMUX", "STY", "TERM_PROGRAM", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rows, images = report_rows(run), ImageStore({"dataset": str(tmp_path)})
    if is_terminal:
        ours, theirs = pty.openpty()
    else:
        ours, theirs = os.pipe()
    got: list[bytes] = []

    def collect() -> None:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                return
            if not piece:
                return
            got.append(piece)

    thread = threading.Thread(target=collect)
    thread.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as stdout, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", stdout)
        console.show_thumbnails(rows, images)
    thread.join(10)
    os.close(ours)
    return b"".join(got).decode().replace("\r\n", "\n")


KITTY = {"TERM": "xterm-kitty", "COLUMNS": "80", "LINES": "24"}


def test_a_kitty_shows_the_picture_between_the_words(tmp_path, monkeypatch):
    shown = shown_in(tmp_path, monkeypatch, KITTY, is_terminal=True)
    before, _, rest = shown.partition("\x1b_G")
    sequence, _, after = rest.rpartition("\x1b\\")
    assert before == "\x1b[32mclean\x1b[0m p 0.90 row 0 images/0.png\n"
    assert drawn_by_kitty(f"\x1b_G{sequence}\x1b\\")[1].shape == (8, 8, 3)
    assert after == "\na house\n\n"


@pytest.mark.parametrize(
    ("environment", "is_terminal"),
    [(KITTY, False), (KITTY | {"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, True)],
)
def test_pipes_and_no_color_get_words_alone(tmp_path, monkeypatch, environment, is_terminal):
    shown = shown_in(tmp_path, monkeypatch, environment, is_terminal=is_terminal)
    assert shown == "clean p 0.90 row 0 images/0.png\na house\n\n"


def test_below_tmux_half_blocks(tmp_path, monkeypatch):
    environment = KITTY | {"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}
    shown = shown_in(tmp_path, monkeypatch, environment, is_terminal=True)
    assert "\x1b_" not in shown
    assert shown.count("\u2580") == 32
