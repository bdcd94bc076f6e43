"""Nothing dropped, nothing lost: what every format holds when it is read again, by our loader and by other readers."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_run import Pair, make_run, picture, reader

from nc_audit.dataset import ImageStore, load_pairs
from nc_audit.dataset.guard import guard, unguard
from nc_audit.errors import DatasetError, DiskError
from nc_audit.export import FORMATS, export_run
from nc_audit.export.names import IMAGE_ENDINGS, base_name

READ_HERE = ["parquet", "imagefolder", "coco", "karpathy", "csv", "jsonl", "webdataset", "hf"]

AWKWARD = [
    "a red house",
    "=SUM(A1:A9)",
    "'=1",
    "''@x",
    "'tis a house",
    "\ttabbed",
    "\r\nbroken\rlines\n",
    '["a list", "of two"]',
    'say "cheese", please; twice',
    " spaces around ",
    "\x1b[31mred\x1b[0m [bold]x[/]",
    "<script>alert(1)</script>",
    "一架飞机停在机场",
    "بيت أحمر",
    "🛩️ e\u0301 \u2028 line",
    "-",
    "0.5",
    "nan",
    "null",
    "a" * 5000,
]
NAMES = [
    "images/a.png",
    "other/a.png",
    "A.PNG",
    "../../etc/passwd",
    "/abs/olute/a.png",
    "C:\\data\\a.png",
    "con.png",
    "CON",
    "nul.tar.gz",
    ".hidden.png",
    "-rf.png",
    "metadata.jsonl",
    "captions.csv",
    "x" * 400 + ".png",
    "Ü" * 200 + ".png",
    "e\u0301.png",
    "é.png",
    "trailing. ",
    "what?*<>|:.png",
    "a\nb\x1b[2J\u202egnp.exe",
    "no ending",
    "照片.jpeg",
    "a%20b#3.png",
    "",
]


def told(pairs):
    return [(hashlib.sha256(picture(pair.number)).hexdigest(), pair.caption, pair.split) for pair in pairs]


def read_again(folder: Path):
    """What our loader finds in an export: image bytes, caption and split of every row, in its order."""
    loaded = load_pairs(folder)
    images = ImageStore(loaded.roots)
    rows = loaded.pairs.to_pylist()
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"][:3]
    return [
        (hashlib.sha256(images.read(row["image_uri"])).hexdigest(), row["caption"], row["split"])
        for row in rows
    ]


def in_order_of(form: str, pairs):
    """The pairs in the order that a format keeps: by split, by image within it, or as they are."""

    def by(key):
        places: dict[object, int] = {}
        for pair in pairs:
            places.setdefault(key(pair), len(places))
        return sorted(pairs, key=lambda pair: places[key(pair)])

    if form in {"parquet", "imagefolder", "coco", "webdataset", "hf"}:
        return by(lambda pair: pair.split)
    if form == "karpathy":
        return by(lambda pair: (pair.number, *named(pair), pair.split))
    return list(pairs)


def named(pair):
    """The last part of an image's name where it is one of an image file."""
    name = base_name(pair.image or f"{pair.number}.png", "")
    return [name] if Path(name).suffix.lower() in IMAGE_ENDINGS else []


def exported(folder: Path, pairs, form: str, **options):
    out = folder / "out"
    export_run(make_run(folder / "run", pairs), out, format=form, read_image=reader(), **options)
    return out


HAS_WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(lambda text: f"{text}a{text}")
PAIRS = st.lists(
    st.builds(
        Pair,
        number=st.integers(0, 5),
        caption=st.sampled_from(AWKWARD[:-5]) | HAS_WORDS,
        image=st.sampled_from(NAMES) | st.text(max_size=12),
        split=st.sampled_from([None, "train", "test", "../up", "My Split", "训练", "all"]),
    ),
    min_size=1,
    max_size=8,
)


def surely_usable(pairs):
    return [pair for pair in pairs if pair.caption and any(c.isalnum() for c in pair.caption)]


def check_round_trip(folder, form, pairs):
    pairs = surely_usable(pairs)
    if pairs:
        assert read_again(exported(folder, pairs, form)) == told(in_order_of(form, pairs))


@pytest.mark.parametrize("form", READ_HERE)
@settings(max_examples=6)
@given(pairs=PAIRS)
@example(pairs=[Pair(i % 7, caption) for i, caption in enumerate(AWKWARD) if caption != "-"])
@example(pairs=[Pair(i, f"caption {i}", image=name, split="train") for i, name in enumerate(NAMES)])
def test_what_is_exported_whole_is_read_again_whole(tmp_path_factory, form, pairs):
    check_round_trip(tmp_path_factory.mktemp("trip"), form, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("form", READ_HERE)
@settings(max_examples=150)
@given(pairs=PAIRS)
def test_what_is_exported_whole_is_read_again_whole_many_times(tmp_path_factory, form, pairs):
    check_round_trip(tmp_path_factory.mktemp("trip"), form, pairs)


@pytest.mark.parametrize(
    "form", [form for form in FORMATS if form not in {"datacomp", "webdataset", "parquet", "hf"}]
)
def test_an_image_of_many_rows_is_stored_once_under_a_harmless_name(tmp_path, form):
    pairs = [Pair(i % len(NAMES), f"caption {i}", image=NAMES[i % len(NAMES)]) for i in range(3 * len(NAMES))]
    out = exported(tmp_path, pairs, form)
    files = [path for path in out.rglob("*") if path.is_file() and path.read_bytes().startswith(b"\x89PNG")]
    assert len(files) == len(NAMES)
    assert len({path.name.casefold() for path in files}) == len(files)
    for path in files:
        assert path.resolve().is_relative_to(out.resolve())
        assert path.suffix.lower() in {".png", ".jpeg"}
        assert len(path.name.encode()) < 250
        assert not path.name.startswith((".", "-"))
        assert not set(path.name) & set('<>:"|?*\\\n\x1b\u202e')
        assert path.stem.split(".")[0].lower() not in {"con", "nul"}
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize("form", ["imagefolder", "coco", "karpathy", "csv", "jsonl"])
def test_one_image_under_two_names_stays_two_and_without_names_is_one(tmp_path, form):
    for names, num_files in (
        (["a.png", "x/b.png", "y/b.png"], 2),
        (["pairs.parquet#0", "pairs.parquet#1"], 1),
    ):
        pairs = [Pair(0, f"caption {name}", image=name) for name in names]
        out = exported(tmp_path / str(num_files), pairs, form)
        assert len([path for path in out.rglob("*") if path.suffix == ".png"]) == num_files
        assert read_again(out) == told(pairs)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_bytes_twice(tmp_path, form):
    pairs = [Pair(i // 2, f"caption {i}", split=["train", "test"][i % 2]) for i in range(8)]
    one, two = (exported(tmp_path / name, pairs, form) for name in ("one", "two"))

    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(one) == files(two)
    assert {"README.md", "croissant.json", "export.json", "dropped.csv"} <= {str(name) for name in files(one)}


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "datacomp"])
def test_a_killed_export_of_any_format_leaves_nothing_under_its_name(tmp_path, form):
    run = make_run(tmp_path / "run", [Pair(i, f"caption {i}") for i in range(6)])
    calls = 0

    def killed(uri: str) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return picture(0)

    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "out", format=form, read_image=killed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "datacomp"])
def test_unreadable_images_are_listed_in_every_format(tmp_path, form):
    pairs = [Pair(i // 2, f"caption {i}", split=["train", "test", "gone", "gone"][i // 2]) for i in range(8)]
    out = tmp_path / "out"
    result = export_run(
        make_run(tmp_path / "run", pairs), out, format=form, read_image=reader(gone=[0, 2, 3])
    )
    assert (result.kept, result.dropped) == (2, {"image no longer readable": 6})
    if form in READ_HERE:
        assert read_again(out) == told(pairs[2:4])
    assert not list(out.rglob("*gone*"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_an_error_and_no_unreadable_image(tmp_path, form):
    run = make_run(tmp_path / "run", [Pair(i, f"caption {i}") for i in range(3)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        with pytest.raises(
            DiskError, match=r"^a file would be larger than is allowed here: .*/out could not be written"
        ):
            export_run(run, tmp_path / "out", format=form, read_image=reader())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@given(st.text() | st.sampled_from(AWKWARD))
def test_a_guarded_cell_is_no_formula_and_comes_back(cell):
    assert not guard(cell).startswith(tuple("=+-@\t\r\n＝＋－＠"))
    assert unguard(guard(cell)) == cell


def test_a_csv_of_somebody_else_keeps_its_apostrophes(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(0))
    (tmp_path / "captions.csv").write_text("image,caption\nimages/a.png,'=1 house\n")
    assert load_pairs(tmp_path).pairs["caption"].to_pylist() == ["'=1 house"]


def test_an_export_marker_that_leads_outside_is_not_believed(tmp_path):
    out = exported(tmp_path, [Pair(0, "a house")], "jsonl")
    (tmp_path / "secret.jsonl").write_text('{"image": "a.png", "caption": "stolen"}\n')
    marker = (out / "export.json").read_text()
    (out / "export.json").write_text(marker.replace('"file": "captions.jsonl"', '"file": "../secret.jsonl"'))
    assert load_pairs(out).pairs["caption"].to_pylist() == ["a house"]


def test_the_list_of_what_was_dropped_is_never_the_dataset(tmp_path):
    pairs = [Pair(0, "a house"), Pair(1, "a plane", tag="noisy")]
    out = exported(tmp_path, pairs, "datacomp", drop=["noisy"])
    with pytest.raises(DatasetError, match="holds no file that states image-caption pairs"):
        load_pairs(out)


def test_a_csv_named_alone_is_read_exactly_too(tmp_path):
    captions = ["=1", "'=1", "'tis", "-"]
    out = exported(tmp_path, [Pair(i, f"{text}a") for i, text in enumerate(captions)], "csv")
    assert load_pairs(out / "captions.csv").pairs["caption"].to_pylist() == [f"{text}a" for text in captions]
