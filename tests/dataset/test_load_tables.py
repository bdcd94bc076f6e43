"""Tables as people write them: odd encodings, quotes, cells too few or too many, captions in lists and columns."""

from __future__ import annotations

import csv
import json

import pytest
from dataset_checks import column, load

from nc_audit.dataset import tables
from nc_audit.dataset.tables import guess_columns
from nc_audit.errors import DatasetError


@pytest.fixture(autouse=True)
def images(draw):
    draw("a.png", "b.png", "c.png")


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32", b""),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_in_unicode_encodings(tmp_path, write, encoding, mark, end):
    text = end.join(["image,caption", "a.png,prés salés", 'b.png,"a ""red"" roof, tiled"', ""])
    path = write("pairs.csv", mark + text.encode(encoding))
    loaded = load(path)
    assert column(loaded, "caption") == ["prés salés", 'a "red" roof, tiled']
    assert loaded.layout == "csv table pairs.csv"
    assert loaded.notes == ["images taken from column image, captions from column caption"]


@pytest.mark.parametrize(("name", "encode"), [("p.csv", True), ("p.jsonl", False), ("p.json", False)])
def test_latin_1_is_read_and_noted(tmp_path, write, name, encode):
    row = {"image": "a.png", "caption": "le pré d’été"}
    text = (
        f"image,caption\n{row['image']},{row['caption']}\n" if encode else json.dumps(row, ensure_ascii=False)
    )
    text = f"[{text}]" if name.endswith(".json") else text
    loaded = load(write(name, text.encode("cp1252")))
    assert column(loaded, "caption") == ["le pré d’été"]
    note = f"{name} is not valid UTF-8 and was read as Windows-1252, the superset of Latin-1; check accented letters"
    assert note in loaded.notes


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.jsonl"])
def test_a_byte_order_mark_that_lies_is_refused(write, name):
    with pytest.raises(DatasetError) as raised:
        load(write(name, b"\xff\xfe{"))
    assert raised.value.message == f"{name} begins as UTF-16 text and goes on as something else"


def test_bytes_that_are_no_windows_1252_are_latin_1(write):
    loaded = load(write("p.csv", b"image,caption\na.png,x \x81 y\n"))
    assert column(loaded, "caption") == ["x \x81 y"]
    assert "p.csv is not valid UTF-8 and was read as Latin-1; check accented letters" in loaded.notes


def test_line_breaks_inside_a_cell_are_kept_and_noted(write):
    loaded = load(write("p.csv", 'image,caption\na.png,"first\nsecond"\nb.png,x\n'))
    assert column(loaded, "caption") == ["first\nsecond", "x"]
    assert "1 row of p.csv with line breaks inside a cell (first: line 2)" in loaded.notes


def test_a_quote_that_is_never_closed_is_refused(write):
    with pytest.raises(DatasetError) as raised:
        load(write("p.csv", 'image,caption\na.png,x\nb.png,"open\nc.png,y\na.png,z\n'))
    assert raised.value.message == "p.csv line 3: a quote is opened and never closed; it swallows 3 lines"
    assert raised.value.hint == "close the quote, or double it where it is part of a caption"


def test_quotes_in_a_tsv_that_do_not_close_are_part_of_the_caption(write):
    loaded = load(write("p.tsv", 'image\tcaption\na.png\t"open road\nb.png\t5" pipe\n'))
    assert column(loaded, "caption") == ['"open road', '5" pipe']


def test_rows_with_too_few_or_too_many_cells_keep_their_place(write):
    text = "image,caption,source\na.png,a red, tiled, roof,web\nb.png\nc.png,x,web\na.png,y,web,,\n\n"
    loaded = load(write("p.csv", text))
    assert column(loaded, "caption") == ["a red, tiled, roof", None, "x", "y"]
    assert column(loaded, "status") == ["ok", "missing_caption", "ok", "ok"]
    assert column(loaded, "status_detail")[1] == "line 3 has 1 of 3 cells"
    assert "1 row of p.csv with fewer cells than its header (first: line 3)" in loaded.notes
    assert (
        "1 row of p.csv with more cells than its header; the surplus was given back to the caption, whose delimiters "
        "are not quoted (first: line 2)" in loaded.notes
    )


def test_surplus_cells_beside_several_caption_columns_are_left_out(write):
    loaded = load(write("p.csv", "image,caption_0,caption_1\na.png,x,y,z\n"))
    assert column(loaded, "caption") == ["x", "y"]
    assert (
        "1 row of p.csv with more cells than its header; the surplus was left out (first: line 2)"
        in loaded.notes
    )


def test_a_row_without_its_image_cell(write):
    loaded = load(write("p.csv", "caption,image\nonly a caption\nx,a.png\n,a.png\n . ,a.png\n"))
    assert column(loaded, "status") == ["missing_image", "ok", "empty_caption", "empty_caption"]
    assert column(loaded, "status_detail") == [
        "line 2 has 1 of 2 cells",
        None,
        "the caption is empty",
        "the caption holds only punctuation",
    ]


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["one", "two"]', ["one", "two"]),
        ("['it\\'s one', 'two']", ["it's one", "two"]),
        ("[]", [None]),
        ("[untitled]", ["[untitled]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[" * 9000 + "]" * 9000, ["[" * 9000 + "]" * 9000]),
        ("['\\d']", ["\\d"]),
    ],
)
def test_lists_in_a_cell(tmp_path, cell, captions):
    path = tmp_path / "p.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], ["a.png", cell], ["b.png", "x"]])
    assert column(load(path), "caption") == [*captions, "x"]


def test_several_caption_columns(write):
    text = "filename,Caption1,caption2,caption10\na.png,one,two,ten\nb.png,three,, \nc.png,,,\n"
    loaded = load(write("p.csv", text))
    assert column(loaded, "caption") == ["one", "two", "ten", "three", None]
    assert column(loaded, "status") == ["ok"] * 4 + ["missing_caption"]
    assert (
        "images taken from column filename, captions from columns Caption1, caption2, caption10"
        in loaded.notes
    )
    assert (
        "5 blank cells of p.csv in the caption columns, taken as no caption at all (first: line 3)"
        in loaded.notes
    )


def test_semicolons_and_long_cells(write):
    long = "x" * 300_000
    loaded = load(write("p.csv", f"Image Path;Description\na.png;one, two\nb.png;{long}\n"))
    assert column(loaded, "caption") == ["one, two", long]


def test_carried_columns(write):
    text = "image,caption,Split,is_noisy\na.png,x,train,True\nb.png,y,,0\nc.png,z,test,perhaps\n"
    loaded = load(write("p.csv", text))
    assert column(loaded, "split") == ["train", None, "test"]
    assert column(loaded, "known_noise") == [True, False, None]
    assert "1 value of p.csv of known noise neither true nor false, left out (first: line 4)" in loaded.notes


def test_columns_named_by_options(tmp_path, write):
    path = write("p.csv", "id,what_is_seen\na.png,x\n")
    assert column(load(path, image_column="id", caption_column="What is seen"), "caption") == ["x"]
    assert column(load(tmp_path, image_column="id", caption_column="what_is_seen"), "caption") == ["x"]
    with pytest.raises(DatasetError) as raised:
        load(path, image_column="id", caption_column="what_is_sen")
    assert raised.value.message == "p.csv has no column what_is_sen, named with --caption-column"
    assert raised.value.hint == "did you mean what_is_seen?"


@pytest.mark.parametrize("as_folder", [True, False])
def test_no_caption_column_lists_the_columns(tmp_path, write, as_folder):
    path = write("p.csv", "image,what_is_seen,n\na.png,x,1\n")
    with pytest.raises(DatasetError) as raised:
        load(tmp_path if as_folder else path)
    assert (
        raised.value.message == "p.csv: no column is known to hold captions; columns: image, what_is_seen, n"
    )
    assert raised.value.hint == "name it with --caption-column"
    path.write_text("what,caption\na.png,x\n")
    with pytest.raises(DatasetError) as raised:
        load(tmp_path if as_folder else path)
    assert raised.value.message == "p.csv: no column is known to hold images; columns: what, caption"


def test_json_lines(write):
    records = [
        {"image": "a.png", "captions": ["one", {"raw": "two"}, ["three", "words"]], "noise": 1},
        {"image": {"path": "b.png"}, "captions": "four"},
        {"captions": 5},
        {"image": "c.png"},
    ]
    loaded = load(write("p.jsonl", "\n".join(json.dumps(record) for record in records) + "\n\n"))
    assert column(loaded, "caption") == ["one", "two", "three words", "four", "5", None]
    assert column(loaded, "status") == ["ok"] * 4 + ["missing_image", "missing_caption"]
    assert column(loaded, "status_detail")[4:] == ["line 3 has no image", "line 4 has no captions"]
    assert column(loaded, "known_noise") == [True] * 3 + [None] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": }', "p.jsonl is not valid json: line 2 column 11: Expecting value"),
        ("[1]", "p.jsonl line 2 is a list, not an object"),
        ('{"a":' * 90_000, "p.jsonl is nested too deeply to be a list of captions"),
    ],
)
def test_malformed_json_lines(write, line, message):
    with pytest.raises(DatasetError) as raised:
        load(write("p.jsonl", '{"image": "a.png", "text": "x"}\n' + line + "\n"))
    assert raised.value.message == message


def test_empty_tables(write):
    for name, text, message in (
        ("p.csv", "", "p.csv is empty"),
        ("q.csv", "image,caption\n", "has no rows"),
        ("p.jsonl", "\n", "p.jsonl holds no records"),
    ):
        with pytest.raises(DatasetError, match=message):
            load(write(name, text))


def test_guesses_prefer_files_to_urls_and_the_plain_name_to_numbered_ones():
    assert guess_columns(["url", "FileName", "caption_1", "caption_2", "Title"]) == (
        "FileName",
        ("caption_1", "caption_2"),
    )
    assert guess_columns(["url", "text", "caption"]) == ("url", ("caption",))
    assert guess_columns(["image", "text", "jpg"], embedded=["jpg"]) == ("jpg", ("text",))
    assert guess_columns(["x", "y"]) == (None, ())


def test_a_json_line_without_end_is_refused_before_it_is_read_whole(tmp_path, monkeypatch, draw, write):
    monkeypatch.setattr(tables, "_MAX_LINE", 60)
    draw("a.png")
    fits = json.dumps({"image": "a.png", "caption": "x" * 20}).ljust(59) + "\n"
    path = write("captions.jsonl", fits)
    assert column(load(path), "caption") == ["x" * 20]
    path.write_text(fits + fits.rstrip("\n") + "  \n")
    with pytest.raises(DatasetError) as error:
        load(path)
    assert error.value.message == "captions.jsonl line 2 has more than 60 characters"
    assert error.value.hint == "repair the line"
