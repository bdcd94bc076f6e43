"""Third-party readers, offline."""

from __future__ import annotations

import pytest


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, offline, with its cache in the test's own folder."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library
