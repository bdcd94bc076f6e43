"""The `datasets` library for tests: offline, its cache in a folder of the test."""

from __future__ import annotations

import pytest


def offline_library(cache, monkeypatch):
    """The library; the test is skipped where it cannot be imported."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library
