"""`train.towers = "full"` through the pipeline, on a small untrained open_clip model; pretrained ones and GPUs are not
at hand."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from nc_audit.errors import RecipeError
from nc_audit.pipeline import score_dataset
from nc_audit.recipe import build_recipe
from nc_audit.run import file_digest


def recipe(weights: Path, **changes: str):
    settings = {
        "train.towers": '"full"',
        "train.tower.epochs": "12",
        "train.tower.batch": "20",
        "train.tower.lr": "2e-3",
        "train.tower.weight_decay": "0.1",
        "train.tower.checkpoint_every": "7",
        "score.candidates": "100",
    } | changes
    encoder = f"open_clip:whole-towers@{weights}"
    return build_recipe(
        ["rrsitr"],
        [f"{key}={value}" for key, value in settings.items()],
        {"image": {"encoder": encoder}, "text": {"encoder": encoder}},
    )


class _Killed(BaseException):
    pass


class KilledAt:
    """A watcher under which tuning dies at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def note(self, text: str) -> None:
        pass

    warn = note

    def progress(self, what: str, done: int, total: int | None) -> None:
        if "tune" in what and done == self.step:
            raise _Killed


@pytest.mark.slow
def test_tuned_towers_score_the_pairs_and_a_killed_tuning_ends_with_the_same_bytes(
    weights, dataset, tmp_path
):
    summary = score_dataset(dataset, tmp_path / "run", recipe(weights), device="cpu", precision="fp32")
    assert summary["pairs"] == 120
    scores = pq.read_table(tmp_path / "run" / "scores.parquet")
    truth = pq.read_table(tmp_path / "run" / "pairs.parquet")["known_noise"].to_pylist()
    assert roc_auc_score(truth, scores["noise_score"].to_numpy()) > 0.85
    frozen = recipe(weights, **{"train.towers": '"frozen"', "train.steps": "12", "train.epochs": "4"})
    score_dataset(dataset, tmp_path / "frozen", frozen, device="cpu", precision="fp32")
    untuned = pq.read_table(tmp_path / "frozen" / "scores.parquet")
    assert not untuned["similarity"].equals(scores["similarity"])
    with pytest.raises(_Killed):
        score_dataset(
            dataset, tmp_path / "killed", recipe(weights), device="cpu", precision="fp32", watch=KilledAt(20)
        )
    assert not (tmp_path / "killed" / "scores.parquet").exists()
    score_dataset(dataset, tmp_path / "killed", recipe(weights), device="cpu", precision="fp32")
    for name in ("pairs.parquet", "scores.parquet", "tags.parquet", "model/towers.safetensors"):
        assert file_digest(tmp_path / "run" / name) == file_digest(tmp_path / "killed" / name), name


def test_towers_that_are_not_aligned_are_refused(weights, dataset, tmp_path):
    mixed = recipe(weights)
    mixed = mixed.model_copy(update={"text": mixed.text.model_copy(update={"encoder": "tfidf"})})
    with pytest.raises(RecipeError) as caught:
        score_dataset(dataset, tmp_path / "run", mixed, device="cpu", precision="fp32")
    assert caught.value.message.startswith('train.towers = "full" tunes an open_clip model, not open_clip:')


def test_other_methods_do_not_tune_towers(weights):
    with pytest.raises(RecipeError) as caught:
        recipe(weights, **{"train.method": '"ncr"'})
    assert 'towers = "full" goes with method = "rrsitr" only' in caught.value.message
