"""What may be given as DATASET: paths, patterns, datasets in the hub's cache."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_checks import column, load
from huggingface_hub import constants
from PIL import Image

from nc_audit.dataset import ImageStore, find_dataset
from nc_audit.errors import DatasetError


def picture(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    images = [{"bytes": picture(1), "path": "1.png"}, {"bytes": picture(2), "path": "2.png"}]
    pq.write_table(pa.table({"image": images, "caption": ["one", "two"]}), buffer)
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache in a folder of the test, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache, files, commit="a" * 40, ref="main", repository="owner--name"):
    """A dataset as the hub's cache has it: a snapshot of links to blobs."""
    folder = cache / f"datasets--{repository}"
    for number, (name, data) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:064x}{commit[0]}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


@pytest.mark.parametrize(
    "files",
    [
        {"data/train-00000-of-00001.parquet": parquet(), "README.md": b"# card"},
        {
            "train/metadata.csv": b"file_name,text\n1.png,one\nb/2.png,two\n",
            "train/1.png": picture(1),
            "train/b/2.png": picture(2),
        },
    ],
)
def test_a_cached_dataset_is_read_through_its_links(cache, files):
    snapshot = cached(cache, files)
    place = find_dataset("hf:owner/name")
    assert (place.path, place.name) == (snapshot, "name")
    assert place.notes == ("hf:owner/name is read from the hub's cache, commit aaaaaaaaaaaa",)
    loaded = load(place.path)
    assert column(loaded, "caption") == ["one", "two"]
    assert loaded.counts == {"ok": 2}
    store = ImageStore(loaded.roots)
    assert [store.read(uri) for uri in column(loaded, "image_uri")] == [picture(1), picture(2)]


def test_links_of_a_cached_dataset_lead_no_further_than_its_blobs(cache, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(9))
    snapshot = cached(cache, {"metadata.csv": b"file_name,text\n1.png,one\n2.png,two\n", "1.png": picture(1)})
    (snapshot / "2.png").symlink_to(tmp_path / "secret.png")
    assert column(load(snapshot), "status") == ["ok", "outside_root"]


def test_a_revision_is_a_branch_or_a_commit_in_the_cache(cache):
    main = cached(cache, {"a.csv": b"image,caption\n"})
    other = cached(
        cache, {"a.csv": b"image,caption\n"}, commit="b" * 40, ref="refs/convert/x".replace("/", "-")
    )
    assert find_dataset("hf:owner/name").path == main
    assert find_dataset("hf:owner/name@refs-convert-x").path == other
    assert find_dataset(f"hf:owner/name@{'b' * 40}").path == other
    with pytest.raises(
        DatasetError, match="hf:owner/name@gone is not in the hub's cache, and HF_HUB_OFFLINE"
    ):
        find_dataset("hf:owner/name@gone")
    (cache / "datasets--owner--name" / "refs" / "main").unlink()
    assert find_dataset("hf:owner/name").path in (main, other)


def test_a_dataset_that_is_not_cached_is_one_line_offline(cache):
    with pytest.raises(DatasetError) as error:
        find_dataset("hf:owner/other")
    assert error.value.message == "hf:owner/other is not in the hub's cache, and HF_HUB_OFFLINE is set"
    assert error.value.hint == (
        "fetch it where there is a network: hf download --repo-type dataset owner/other"
    )


def test_a_hub_that_does_not_answer_is_given_up_soon(cache, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start = time.monotonic()
    with pytest.raises(DatasetError, match=r"the hub (cannot be reached|does not answer)"):
        find_dataset("hf:owner/other", allow_network=True)
    assert time.monotonic() - start < 2
    silent.close()


@pytest.mark.parametrize("spec", ["hf:", "hf:../x", "hf:a/b/c", "hf:a/..", "hf:a/b@../../x", "hf:a b"])
def test_what_names_no_dataset_of_the_hub_is_refused(cache, spec):
    with pytest.raises(DatasetError) as error:
        find_dataset(spec)
    assert error.value.message == f"{spec} names no dataset of the hub"


@pytest.mark.parametrize("spec", ["az://bucket/x", "gcs://bucket/x", "https://example.org/x.csv"])
def test_other_networks_are_refused_in_one_line(spec):
    scheme = spec.partition(":")[0]
    with pytest.raises(DatasetError) as error:
        find_dataset(spec, allow_network=True)
    assert error.value.message == f"{spec}: datasets behind {scheme}:// are not read"


def test_a_pattern_reads_the_files_that_fit(tmp_path, monkeypatch):
    for name in ("a/x-0.parquet", "a/x-1.parquet", "b/y-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(parquet())
    for pattern, num_rows, name in (
        ("a/x-*.parquet", 4, "a"),
        ("*/*-0.parquet", 4, tmp_path.name),
        ("**/*.parquet", 6, tmp_path.name),
        ("b/[xy]-?.parquet", 2, "b"),
    ):
        place = find_dataset(str(tmp_path / pattern))
        assert place.name == name
        loaded = load(place.path)
        assert loaded.counts == {"ok": num_rows}
        assert ImageStore(loaded.roots).read(column(loaded, "image_uri")[0]) == picture(1)
    monkeypatch.chdir(tmp_path / "a")
    assert find_dataset("x-*.parquet").name == "a"
    assert len(load(find_dataset("*.parquet").path).pairs) == 4
    with pytest.raises(DatasetError) as error:
        find_dataset("z-*.parquet")
    assert error.value.message == "no file fits the pattern z-*.parquet"


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path):
    folder = tmp_path / "set [1]"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet())
    assert find_dataset(str(folder)).path == folder
    assert len(load(folder).pairs) == 2


def test_the_command_says_in_one_line_what_is_not_there(tmp_path):
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "nc_audit", "score", "hf:owner/name"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "hf:owner/name is not in the hub's cache, and HF_HUB_OFFLINE is set" in " ".join(
        done.stderr.split()
    )
    assert not list(tmp_path.iterdir())
