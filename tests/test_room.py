from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from nc_audit import room
from nc_audit.embed import EmbeddingStore
from nc_audit.errors import DiskError
from nc_audit.methods.heads import Heads
from nc_audit.methods.projections import principal_projection
from nc_audit.room import room_for

MIB = 2**20


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def mapped(folder: Path) -> list[str]:
    """Files of a folder that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")


@needs_proc
def test_what_is_small_beside_the_memory_lies_in_it(temporary, monkeypatch):
    monkeypatch.setattr(room, "memory_limit", lambda: 8 * MIB)
    made = room_for(1024, 256)  # 1 MiB
    assert (made.shape, made.dtype) == ((1024, 256), torch.float32)
    assert not mapped(temporary)


@needs_proc
def test_what_would_take_much_of_the_memory_lies_in_a_nameless_file_that_ends_with_it(temporary, monkeypatch):
    monkeypatch.setattr(room, "memory_limit", lambda: 8 * MIB)
    made = room_for(1025, 256)
    assert (made.shape, made.dtype) == ((1025, 256), torch.float32)
    assert mapped(temporary)
    assert not list(temporary.iterdir())
    made.normal_()
    part, total = made[7:9].clone(), made.sum()
    assert torch.equal(made[7:9], part)
    assert made.sum() == total
    del made, part
    gc.collect()
    assert not mapped(temporary)


def test_a_full_disk_is_told_before_anything_is_written(temporary, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "memory_limit", lambda: 8 * MIB)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DiskError, match=f"disk is full: {temporary}"):
        room_for(1025, 256)
    assert not list(temporary.iterdir())


def test_results_are_those_of_memory(temporary, tmp_path, monkeypatch):
    torch.manual_seed(0)
    vectors = torch.randn(300, 20)
    store, names = EmbeddingStore(tmp_path / "store"), [f"{i:03d}" for i in range(300)]
    store.folder.mkdir()
    store.write("image", "0" * 16, names[:200], vectors[:200], [None] * 199 + ["broken"])
    heads = Heads(12, 20, 8, 16)

    def all_of_it() -> list[torch.Tensor]:
        read, known, _ = store.read("image", "0" * 16, names, 20)
        projection = principal_projection(vectors, 12, whitening=0.5)
        return [torch.from_numpy(read), torch.from_numpy(known), *heads.embed(projection(vectors), vectors)]

    usual = all_of_it()
    monkeypatch.setattr(room, "memory_limit", lambda: 0)
    for ours, expected in zip(all_of_it(), usual, strict=True):
        assert torch.equal(ours.nan_to_num(-1), expected.nan_to_num(-1))


def test_the_limit_is_that_of_the_machine_or_of_a_control_group(tmp_path, monkeypatch):
    membership, mounted = tmp_path / "cgroup", tmp_path / "fs"
    (mounted / "user" / "job").mkdir(parents=True)
    (mounted / "memory" / "old").mkdir(parents=True)
    (mounted / "user" / "memory.max").write_text("3000\n")
    (mounted / "user" / "job" / "memory.max").write_text("max\n")
    (mounted / "memory" / "old" / "memory.limit_in_bytes").write_text("4000\n")
    membership.write_text("0::/user/job\n")
    assert room._group_limits(membership, mounted) == [3000]
    membership.write_text("5:cpu,memory:/old\n3:pids:/\n")
    assert room._group_limits(membership, mounted) == [4000]
    assert room._group_limits(tmp_path / "nowhere", mounted) == []
    monkeypatch.setattr(room, "_group_limits", lambda *_: [MIB])
    assert room.memory_limit() == MIB
    monkeypatch.setattr(room, "_group_limits", lambda *_: [])
    assert room.memory_limit() > MIB
