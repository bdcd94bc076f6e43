"""What holds for every loaded dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nc_audit.dataset import ImageStore, LoadedDataset, LoadOptions, content_id, load_pairs
from nc_audit.schema import check_table


def load(path: Path, **options: Any) -> LoadedDataset:
    """Loads, and checks what holds for every dataset."""
    loaded = load_pairs(path, LoadOptions(**options))
    pairs = check_table("pairs", loaded.pairs)
    assert pairs["row"].to_pylist() == list(range(len(pairs)))
    assert sum(loaded.counts.values()) == len(pairs)
    rows = pairs.to_pylist()
    first: dict[str, int] = {}
    for row in rows:
        expected = first.setdefault(row["pair_id"], row["row"])
        assert row["duplicate_of"] == (None if expected == row["row"] else expected)
        assert (row["status_detail"] is None) == (row["status"] == "ok")
        if row["status"] == "ok":
            assert row["image_id"]
            assert row["caption_id"]
            assert row["image_uri"]
    return loaded


def check_images(loaded: LoadedDataset) -> None:
    """Every image is read again from where its row says, and has the row's content hash."""
    store = ImageStore(loaded.roots)
    for uri, image_id in zip(column(loaded, "image_uri"), column(loaded, "image_id"), strict=True):
        assert content_id(store.read(uri)) == image_id


def column(loaded: LoadedDataset, name: str) -> list[Any]:
    return loaded.pairs[name].to_pylist()
