"""What an export keeps and drops: counts, weights, re-matches, the lists, the card."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_run import Pair, make_run, picture, reader

from nc_audit.errors import DatasetError, RunError
from nc_audit.export import export_run
from nc_audit.schema import STATUSES, TAGS_KNOWN


def exported(out):
    tables = [pq.read_table(path, partitioning=None) for path in sorted(out.rglob("*.parquet"))]
    return pa.concat_tables(tables).sort_by("row").to_pylist()


def listed(path):
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def run(tmp_path):
    pairs = [
        Pair(0, "a red house", probability=0.25),
        Pair(0, "a house that is red", probability=0.125),
        Pair(1, "a plane", tag="noisy", probability=0.875, rematch_row=3, rematch_probability=0.2),
        Pair(1, "a boat", tag="noisy", probability=0.75),
        Pair(2, "a tent", tag="ambiguous", probability=0.5),
        Pair(3, "", status="empty_caption"),
        Pair(4, "a court", status="missing_image"),
        Pair(5, "a road", tag=None, probability=None, noise_score=None),
    ]
    return make_run(tmp_path / "toy", pairs, dataset={"path": str(tmp_path / "secret-place" / "my_scenes")})


def test_everything_that_can_be_exported_is_when_nothing_is_dropped(run, tmp_path):
    result = export_run(run, tmp_path / "out", read_image=reader())
    rows = exported(tmp_path / "out")
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["image"] for row in rows[:3]] == [
        {"bytes": picture(0), "path": "0.png"},
        {"bytes": picture(0), "path": "0.png"},
        {"bytes": picture(1), "path": "1.png"},
    ]
    assert list(rows[0]) == ["image", "caption", "row", "pair_id", "image_id", "tag", "noise_probability"]
    assert (result.rows, result.kept) == (8, 5)
    assert result.dropped == {"not scored": 1, "status: empty_caption": 1, "status: missing_image": 1}


def test_dropped_rows_are_listed_with_the_reason(run, tmp_path):
    result = export_run(run, tmp_path / "out", drop=["noisy"], read_image=reader())
    assert [row["row"] for row in exported(tmp_path / "out")] == [0, 1, 4]
    assert [
        (line["row"], line["why"], line["detail"]) for line in listed(tmp_path / "out" / "dropped.csv")
    ] == [
        ("2", "tag: noisy", ""),
        ("3", "tag: noisy", ""),
        ("5", "status: empty_caption", "as the test says"),
        ("6", "status: missing_image", "as the test says"),
        ("7", "not scored", ""),
    ]
    assert result.dropped["tag: noisy"] == 2


def test_each_image_is_read_once_while_its_captions_follow_each_other(run, tmp_path):
    calls: list[str] = []
    export_run(run, tmp_path / "out", read_image=reader(calls))
    assert calls == ["dataset:images/0.png", "dataset:images/1.png", "dataset:images/2.png"]


def test_images_are_held_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("nc_audit.export._CACHE_BYTES", 2 * len(picture(0)))
    calls: list[str] = []
    pairs = [Pair(number, f"caption {row}") for row, number in enumerate([0, 1, 0, 2, 1, 0])]
    export_run(make_run(tmp_path / "run", pairs), tmp_path / "out", read_image=reader(calls))
    assert [int(uri[-5]) for uri in calls] == [0, 1, 2, 0]


def test_weights_are_one_minus_the_probability(run, tmp_path):
    export_run(run, tmp_path / "out", reweight=True, read_image=reader())
    assert [row["weight"] for row in exported(tmp_path / "out")] == [0.75, 0.875, 0.125, 0.25, 0.5]


def test_weights_stay_within_bounds_and_need_a_probability(tmp_path):
    pairs = [
        Pair(0, "a", probability=1.5),
        Pair(1, "b", probability=-0.5),
        Pair(2, "c", probability=float("nan")),
    ]
    run = make_run(tmp_path / "run", pairs)
    result = export_run(run, tmp_path / "out", reweight=True, read_image=reader())
    assert [row["weight"] for row in exported(tmp_path / "out")] == [0.0, 1.0]
    assert result.dropped == {"not scored": 1}


def test_a_rematched_pair_gets_the_caption_of_its_row_and_is_kept(run, tmp_path):
    result = export_run(
        run, tmp_path / "out", drop=["noisy"], rematch=True, reweight=True, read_image=reader()
    )
    rows = exported(tmp_path / "out")
    assert [(row["row"], row["caption"], row["original_caption"]) for row in rows] == [
        (0, "a red house", None),
        (1, "a house that is red", None),
        (2, "a boat", "a plane"),
        (4, "a tent", None),
    ]
    assert [row["weight"] for row in rows] == pytest.approx([0.75, 0.875, 0.8, 0.5])
    assert (result.num_rematched, result.notes) == (1, [])
    assert listed(tmp_path / "out" / "rematches.csv") == [
        {
            "row": "2", "image": "images/1.png", "old_caption": "a plane", "new_caption": "a boat",
            "probability": "0.2", "pair_id": rows[2]["pair_id"], "from_row": "3", "decided_by": "model",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "probability"),
    [(None, 0.1), (1, None), (1, float("nan")), (0, 0.1), (2, 0.1), (3, 0.1), (99, 0.1)],
)
def test_an_unsure_rematch_is_none(tmp_path, row, probability):
    pairs = [
        Pair(0, "a plane", tag="noisy", rematch_row=row, rematch_probability=probability),
        Pair(1, "a boat"),
        Pair(2, "a plane"),
        Pair(3, "", status="empty_caption"),
        Pair(4, "a road", rematch_probability=0.5),
    ]
    result = export_run(
        make_run(tmp_path / "run", pairs), tmp_path / "out", rematch=True, drop=["noisy"], read_image=reader()
    )
    assert (result.num_rematched, result.dropped["tag: noisy"]) == (0, 1)
    assert result.notes == ["--rematch changes nothing: the run found no confident re-match"]
    assert listed(tmp_path / "out" / "rematches.csv") == []


def test_a_run_without_rematches_says_so_in_one_line(tmp_path):
    run = make_run(
        tmp_path / "run", [Pair(0, "a plane", tag="noisy", best_caption="b", best_caption_margin=1.0)]
    )
    result = export_run(run, tmp_path / "out", rematch=True, read_image=reader())
    assert result.notes == ["--rematch changes nothing: the run found no confident re-match"]
    assert [row["caption"] for row in exported(tmp_path / "out")] == ["a plane"]


def test_an_image_that_is_gone_by_now_drops_its_rows(run, tmp_path):
    result = export_run(run, tmp_path / "out", rematch=True, read_image=reader(gone=[1]))
    assert [row["row"] for row in exported(tmp_path / "out")] == [0, 1, 4]
    assert result.dropped["image no longer readable"] == 2
    assert result.num_rematched == 0
    lines = listed(tmp_path / "out" / "dropped.csv")
    assert [line["row"] for line in lines] == ["2", "3", "5", "6", "7"]
    assert (lines[0]["caption"], lines[0]["detail"]) == ("a plane", "dataset:images/1.png is gone")


def test_all_images_gone_is_an_error_and_leaves_no_folder(run, tmp_path):
    with pytest.raises(DatasetError) as caught:
        export_run(run, tmp_path / "out", read_image=reader(gone=range(9)))
    assert str(caught.value) == (
        "no pair is left to export: 5 image no longer readable, 1 not scored, 1 status: empty_caption, "
        "1 status: missing_image; first problem: dataset:images/0.png is gone "
        "(put the images back where they were when the run was scored)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_nothing_left_is_an_error(run, tmp_path):
    with pytest.raises(DatasetError) as caught:
        export_run(run, tmp_path / "out", drop=TAGS_KNOWN, read_image=reader())
    assert str(caught.value) == (
        "no pair is left to export: 1 not scored, 1 status: empty_caption, 1 status: missing_image, "
        "1 tag: ambiguous, 2 tag: clean, 2 tag: noisy (drop fewer tags, or audit a dataset with usable pairs)"
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_lists_the_known_ones(run, tmp_path):
    with pytest.raises(DatasetError) as caught:
        export_run(run, tmp_path / "out", format="zip", read_image=reader())
    assert str(caught.value) == (
        "unknown export format 'zip' "
        "(known: parquet, imagefolder, webdataset, coco, karpathy, csv, jsonl, datacomp, hf)"
    )


def test_an_unknown_tag_names_the_nearest(run, tmp_path):
    with pytest.raises(DatasetError) as caught:
        export_run(run, tmp_path / "out", drop=["noisey"], read_image=reader())
    assert str(caught.value) == "drop: there is no tag 'noisey' (did you mean noisy?)"


def test_a_run_that_is_not_tagged_cannot_be_exported(run, tmp_path):
    (run.path / "tags.parquet").unlink()
    with pytest.raises(RunError):
        export_run(run, tmp_path / "out", read_image=reader())
    assert not (tmp_path / "out").exists()


PAIRS = st.builds(
    Pair,
    number=st.integers(0, 5),
    caption=st.sampled_from(["a red house", "two planes", "=1+1", ""]),
    split=st.sampled_from([None, "train", "test", "../up"]),
    status=st.sampled_from(["ok", "ok", "ok", *STATUSES]),
    tag=st.sampled_from([None, *TAGS_KNOWN, *TAGS_KNOWN]),
    probability=st.sampled_from([None, 0.0, 0.5, 1.0, float("nan")]),
    rematch_row=st.sampled_from([None, 0, 3, 99]),
    rematch_probability=st.sampled_from([None, 0.25, float("nan")]),
)


def fate(pairs, pair, drop, options, gone):
    """Why a pair is dropped, written from the documentation; None where it is exported."""
    if pair.status != "ok":
        return f"status: {pair.status}"
    if pair.tag is None or (options["reweight"] and pair.probability not in {0.0, 0.5, 1.0}):
        return "not scored"
    if pair.tag in drop and new_caption(pairs, pair, options) is None:
        return f"tag: {pair.tag}"
    return "image no longer readable" if pair.number in gone else None


def new_caption(pairs, pair, options):
    if not options["rematch"] or pair.rematch_row is None or pair.rematch_row >= len(pairs):
        return None
    caption = pairs[pair.rematch_row].caption
    is_sure = pair.rematch_probability == 0.25 and pair.status == "ok"
    return caption if is_sure and caption not in {"", pair.caption} else None


@settings(max_examples=25)
@given(
    pairs=st.lists(PAIRS, min_size=1, max_size=12),
    drop=st.lists(st.sampled_from(TAGS_KNOWN)),
    options=st.fixed_dictionaries({"reweight": st.booleans(), "rematch": st.booleans()}),
    gone=st.sets(st.integers(0, 5), max_size=2),
)
def test_every_row_is_exported_or_listed_and_the_counts_say_so(tmp_path_factory, pairs, drop, options, gone):
    folder = tmp_path_factory.mktemp("export")
    run, out = make_run(folder / "run", pairs), folder / "out"
    fates = [fate(pairs, pair, drop, options, gone) for pair in pairs]
    if None not in fates:
        with pytest.raises(DatasetError, match="no pair is left to export: "):
            export_run(run, out, drop=drop, read_image=reader(gone=sorted(gone)), **options)
        assert not out.exists()
        return
    result = export_run(run, out, drop=drop, read_image=reader(gone=sorted(gone)), **options)
    rows, lines = exported(out), listed(out / "dropped.csv")
    assert [row["row"] for row in rows] == [row for row, why in enumerate(fates) if why is None]
    assert [(int(line["row"]), line["why"]) for line in lines] == [
        (row, why) for row, why in enumerate(fates) if why is not None
    ]
    assert (result.rows, result.kept) == (len(pairs), len(rows))
    assert result.dropped == dict(sorted(Counter(line["why"] for line in lines).items()))
    marker = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert (marker["rows"], marker["kept"], marker["dropped"]) == (len(pairs), len(rows), result.dropped)
    assert marker["files"] == sorted(result.files)
    for row in rows:
        pair = pairs[row["row"]]
        changed = new_caption(pairs, pair, options)
        assert row["caption"] == (changed or pair.caption)
        assert row.get("original_caption") == (pair.caption if changed else None)
        assert row["image"]["bytes"] == picture(pair.number)
        if options["reweight"]:
            assert row["weight"] == 1 - (0.25 if changed else pair.probability)


def test_lists_hold_no_formulas(tmp_path):
    pairs = [
        Pair(0, "=cmd()", tag="noisy", image="@evil.png", rematch_row=2, rematch_probability=0.1),
        Pair(1, "-2+3", tag="ambiguous", image="\x1b[2J.png"),
        Pair(2, "+1"),
    ]
    out = tmp_path / "out"
    run = make_run(tmp_path / "run", pairs)
    export_run(run, out, drop=["ambiguous"], rematch=True, read_image=reader())
    (line,) = listed(out / "dropped.csv")
    assert (line["caption"], line["image"]) == ("'-2+3", r"\x1b[2J.png")
    (line,) = listed(out / "rematches.csv")
    assert (line["old_caption"], line["new_caption"], line["image"]) == ("'=cmd()", "'+1", "'@evil.png")
    # The data themselves are not for spreadsheets and stay as they are.
    assert exported(out)[0]["original_caption"] == "=cmd()"


def test_the_card_says_what_was_done(run, tmp_path):
    run.manifest["summary"] = {"noise_rate": {"estimate": 0.25, "low": 0.2, "high": 0.3, "level": 0.9}}
    export_run(run, tmp_path / "out", drop=["noisy"], rematch=True, read_image=reader())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith(
        '---\nconfigs:\n- config_name: default\n  data_files:\n  - split: "train"\n    path: "data/train-*"\n'
        "tags:\n- nc-audit\n---\n\n# my\\_scenes, audited for noisy correspondence\n"
    )
    for line in [
        "Of 8 rows, 4 are here and 4 were dropped.",
        "- recipe: self\\_paced (digest 0f0f)",
        "- options: drop noisy, rematch",
        "- estimated noise rate before the export: 25.0 % (90 % interval 20.0 % to 30.0 %)",
        "- captions replaced: 1, each listed in `rematches.csv`",
        "| tag: noisy | 1 |",
        "| missing\\_image | 1 | the image file does not exist where the dataset says |",
        "| noisy | 2 |",
        "| train | 4 |",
        "| `caption` | the caption, replaced where original\\_caption is given, else as the dataset gives it |",
    ]:
        assert f"\n{line}\n" in card, line
    # Every exported column is explained, and where the dataset lay is not told.
    names = pq.read_schema(next((tmp_path / "out" / "data").iterdir())).names
    for name in names:
        assert any(
            line.startswith(f"| `{name}` | ") and len(line) > len(name) + 12 for line in card.splitlines()
        ), name
    assert "secret-place" not in card


def test_a_hostile_dataset_name_stays_text_in_the_card(run, tmp_path):
    run.manifest["dataset"]["path"] = "/data/<script>\n---\n# [x](y)"
    run.manifest["recipe"]["name"] = "`a`|b\nc"
    export_run(run, tmp_path / "out", read_image=reader())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card
    assert [line for line in card.splitlines() if line == "---"] == ["---", "---"]
    assert "- recipe: \\`a\\`\\|b\\\\nc (digest 0f0f)\n" in card


def test_progress_counts_to_the_end(run, tmp_path):
    seen: list[tuple[int, int | None]] = []
    export_run(
        run, tmp_path / "out", read_image=reader(), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(5, 5)]


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    for name in ("one", "two"):
        export_run(run, tmp_path / name, drop=["noisy"], reweight=True, read_image=reader())
    one, two = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert one == two


def test_copies_are_exported_like_their_first(tmp_path):
    run = make_run(tmp_path / "run", [Pair(0), Pair(0, duplicate_of=0), Pair(1)])
    export_run(run, tmp_path / "out", read_image=reader())
    table = pq.read_table(tmp_path / "out" / "data")
    assert pc.value_counts(table["pair_id"]).field("counts").to_pylist() == [2, 1]


def test_the_truth_about_a_caption_does_not_outlive_it(tmp_path):
    pairs = [Pair(0, "a plane", tag="noisy", rematch_row=1, rematch_probability=0.1), Pair(1, "a boat")]
    run = make_run(tmp_path / "run", pairs)
    table = pq.read_table(run.path / "pairs.parquet")
    at = table.schema.get_field_index("known_noise")
    run.write_table("pairs", table.set_column(at, table.schema.field(at), pa.array([True, False])))
    export_run(run, tmp_path / "out", rematch=True, read_image=reader())
    assert [row["known_noise"] for row in exported(tmp_path / "out")] == [None, False]
    export_run(run, tmp_path / "out", read_image=reader())
    assert [row["known_noise"] for row in exported(tmp_path / "out")] == [True, False]
