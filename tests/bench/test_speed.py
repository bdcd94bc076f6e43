"""The benchmark of the whole audit against a plain loop: what it takes, refuses and states."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from nc_audit.bench.speed import _take, measure_speed
from nc_audit.dataset import LoadOptions
from nc_audit.demo import draw_demo
from nc_audit.errors import EncoderError


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            "builtin",
            "the speed of builtin has no plain loop to be set against (give --encoder open_clip:ViT-B-32)",
        ),
        ("open_clip:ViT-B-32@gone.pt", "there is no file gone.pt (give open_clip:MODEL for random weights)"),
    ],
)
def test_encoders_without_a_plain_loop_are_refused(tmp_path: Path, encoder: str, message: str) -> None:
    with pytest.raises(EncoderError) as caught:
        measure_speed(tmp_path, encoder)
    assert str(caught.value) == message


def test_images_are_taken_evenly_with_all_their_captions(tmp_path: Path) -> None:
    draw_demo(tmp_path / "drawn", num_images=20)
    counts = _take(tmp_path / "drawn", 5, tmp_path / "some", LoadOptions())
    with (tmp_path / "some/captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert counts == {"images": 5, "rows": len(rows)}
    assert {row["image"] for row in rows} == {
        path.relative_to(tmp_path / "some").as_posix() for path in (tmp_path / "some/images").iterdir()
    }
    with (tmp_path / "drawn/metadata.csv").open(newline="", encoding="utf-8") as file:
        whole = {row["caption"] for row in csv.DictReader(file)}
    assert {row["caption"] for row in rows} < whole


@pytest.mark.slow
def test_both_sides_are_timed(tmp_path: Path) -> None:
    draw_demo(tmp_path / "drawn", num_images=40)
    found = measure_speed(tmp_path / "drawn", "open_clip:ViT-S-32", num_images=20)
    assert found["images"] == 20
    assert found["ratio"] == pytest.approx(found["audit_s"] / found["plain_s"])
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["encode"] > 0
    assert found["encoder"] == "open_clip:ViT-S-32, random weights"
