"""A run whose pairs are embedded is scored anew without loading an encoder, to the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nc_audit.pipeline import score_dataset
from nc_audit.recipe import build_recipe
from nc_audit.run import file_digest

WORDS = " with many more words than any encoder of images and captions reads" * 9


@pytest.fixture
def grown(dataset, tmp_path) -> Path:
    """The set with captions that are too long for the encoder, and an image that cannot be decoded."""
    folder = shutil.copytree(dataset, tmp_path / "grown")
    (folder / "broken.png").write_bytes(b"no image")
    with (folder / "captions.csv").open("a") as file:
        file.write(f"\n3.png,first{WORDS},False\n5.png,second{WORDS},False\nbroken.png,red above red,False\n")
    return folder


def scored(weights: Path, dataset: Path, out: Path, epochs: int) -> list[str]:
    """Score with so many epochs; the stages that this took."""
    encoder = {"encoder": f"open_clip:whole-towers@{weights}"}
    brief = [
        f"train.epochs={epochs}",
        "train.steps=12",
        "train.draws=1",
        "train.pace_from=1",
        "score.candidates=100",
    ]
    recipe = build_recipe([], brief, {"image": encoder, "text": encoder})
    return score_dataset(dataset, out, recipe, device="cpu", precision="fp32")["did"]


def test_embeddings_are_read_again_without_an_encoder(weights, grown, tmp_path, monkeypatch):
    scored(weights, grown, tmp_path / "fresh", 4)
    scored(weights, grown, tmp_path / "again", 3)

    def loaded(_plan):
        raise AssertionError("an encoder is loaded")

    monkeypatch.setattr("nc_audit.encoders.load_encoders", loaded)
    assert scored(weights, grown, tmp_path / "again", 4) == ["train", "score", "tag"]
    assert scored(weights, grown, tmp_path / "again", 4) == []
    for name in ("pairs", "scores", "tags", "findings", "model/trajectory"):
        assert file_digest(tmp_path / "again" / f"{name}.parquet") == file_digest(
            tmp_path / "fresh" / f"{name}.parquet"
        ), name
    findings = pq.read_table(tmp_path / "again" / "findings.parquet")
    assert sum(pc.equal(findings["kind"], "cut_caption").to_pylist()) == 2
    # Vectors that are gone are made again.
    for path in (tmp_path / "again" / "embeddings").glob("caption-*"):
        path.unlink()
    with pytest.raises(AssertionError, match="an encoder is loaded"):
        scored(weights, grown, tmp_path / "again", 5)
