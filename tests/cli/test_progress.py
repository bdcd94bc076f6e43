"""Progress as people see it: units, time left, and nothing but lines where there is no terminal."""

from __future__ import annotations

import pytest

from nc_audit import console
from nc_audit.console import Pace, Watch, duration, time_line


def test_what_was_there_before_does_not_count_as_speed() -> None:
    pace = Pace("embed images", first=9_000, start=100.0)
    assert pace.state(9_000, 10_000, 100.0) == "9,000 of 10,000"
    assert pace.state(9_100, 10_000, 110.0) == "9,100 of 10,000, 10 images/s, 1 min 30 s left"
    assert pace.state(10_000, 10_000, 200.0) == "10,000 of 10,000, 10 images/s"


@pytest.mark.parametrize(
    ("what", "unit"),
    [
        ("embed images", "images/s"),
        ("embed captions", "captions/s"),
        ("train", "pairs/s"),
        ("train on everything", "pairs/s"),
    ],
)
def test_each_kind_of_work_has_its_unit(what: str, unit: str) -> None:
    assert Pace(what, 0, 0.0).state(5, 10, 2.0) == f"5 of 10, 2.5 {unit}, 2 s left"


def test_work_without_a_unit_says_how_long_it_takes() -> None:
    assert Pace("load", 0, 0.0).state(500, 10_000, 20.0) == "500 of 10,000, 6 min 20 s left"
    assert Pace("fetch", 0, 0.0).state(500, None, 20.0) == "500"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3_599, 7_384)] == [
        "0 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 03 min",
    ]


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with Watch() as watch:
        for done in range(0, 1_001, 10):
            now = done / 10
            watch.progress("embed images", done, 1_000)
        watch.progress("train", 0, 10)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "· embed images: 300 of 1,000, 10 images/s, 1 min 10 s left",
        "· embed images: 600 of 1,000, 10 images/s, 40 s left",
        "· embed images: 900 of 1,000, 10 images/s, 10 s left",
        "· embed images: 1,000 of 1,000, 10 images/s",
    ]


def test_a_quiet_watch_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_LOG_EVERY", 0.0)
    with Watch(quiet=True) as watch:
        watch.progress("embed images", 0, 10)
        watch.progress("embed images", 10, 10)
    assert capsys.readouterr() == ("", "")


def test_the_summary_says_where_the_time_of_embedding_went() -> None:
    seconds = {"load": 0.54, "embed": 18.4, "train": 7.1, "score": 0.4, "tag": 0.0}
    summary = {"seconds": seconds, "embed_seconds": {"learn": 0.0, "decode": 3.12, "encode": 12.0}}
    assert time_line(summary) == (
        "time: 26.4 s (load 0.5, embed 18.4: decode 3.1, encode 12.0; train 7.1, score 0.4, tag 0.0)"
    )
    again = summary | {"did": ["train", "tag"]}
    assert time_line(again) == "time: 7.1 s (train 7.1, tag 0.0; load, embed, score done before)"
    assert (
        time_line({"seconds": {"load": 1.0, "embed": 2.0}, "did": []}) == "time: 3.0 s (load 1.0, embed 2.0)"
    )
