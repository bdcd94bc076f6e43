"""The public remote-sensing sets, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from dataset_checks import column, load

from nc_audit.dataset import ImageStore, decode_image, fold

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def folder(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is not at hand")
    return path


def test_ucm_captions():
    loaded = load(folder("ucm_captions"))
    assert loaded.counts == {"ok": 10_500}
    folded = fold(loaded.pairs)
    assert (len(folded.image_ids), len(folded.captions), len(folded.pair_ids)) == (2099, 2030, 9981)
    store = ImageStore(loaded.roots)
    assert decode_image(store.read(folded.image_uris[0])).size == (256, 256)


def test_rsicd():
    loaded = load(folder("rsicd"))
    assert loaded.counts == {"ok": 49_997, "empty_caption": 3}
    assert "copies of an earlier pair, each scored once: 29,709 of 50,000 rows" in loaded.notes


def test_a_csv_with_paths_of_another_machine():
    loaded = load(folder("rsicd_rrsitr_csv/rsicd_test.csv"), image_root=folder("rsicd/images"))
    assert loaded.counts == {"ok": 5135, "missing_image": 330}
    assert set(column(loaded, "split")) == {"test"}
    assert (
        "5,135 rows with an image whose path does not exist here, found by its base name, which is unique"
        in loaded.notes
    )
