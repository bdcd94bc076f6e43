from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

from nc_audit.dataset import load
from nc_audit.dataset.images import fingerprint


@pytest.fixture
def paths(tmp_path):
    made = []
    for number in range(40):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
        made.append(str(path))
    (tmp_path / "broken.png").write_bytes(b"no image")
    return [*made, str(tmp_path / "broken.png")]


@pytest.mark.parametrize(("slow", "alone"), [(0.0, False), (1e9, True)])
def test_files_are_read_by_threads_where_they_are_slow_and_all_are_told(paths, monkeypatch, slow, alone):
    seen = set()

    def noted(path):
        seen.add(threading.get_ident())
        return fingerprint(path)

    monkeypatch.setattr(load, "_FILES_AT_ONCE", 3)
    monkeypatch.setattr(load, "_SLOW", slow)
    monkeypatch.setattr(load, "fingerprint", noted)
    told = []
    prints = load._fingerprints(paths, lambda done, total: told.append((done, total)))
    assert list(prints) == paths
    assert prints == {path: fingerprint(path) for path in paths}
    assert (seen == {threading.get_ident()}) is alone
    assert told[-1] == (41, 41)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
