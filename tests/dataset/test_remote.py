"""Datasets in buckets, against a real S3 server on the loopback."""

from __future__ import annotations

import errno
import importlib
import io
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_checks import column, load
from PIL import Image

from nc_audit.dataset import ImageStore, find_dataset, remote
from nc_audit.errors import DatasetError, DiskError

# moto and botocore warn of their own futures.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def picture(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(**captions: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, (key, caption) in enumerate(captions.items()):
            for ending, data in (("png", picture(number)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()
    running._server.server_close()  # or its socket is left to the garbage collector


@pytest.fixture(scope="module")
def client(server):
    import botocore.session

    made = botocore.session.get_session().create_client(
        "s3", "us-east-1", endpoint_url=server, aws_access_key_id="key", aws_secret_access_key="secret"
    )
    yield made
    made.close()


@pytest.fixture
def bucket(server, client, tmp_path, monkeypatch):
    """Puts objects into a bucket of the test's own; the mirror lies in its folder."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    with urllib.request.urlopen(
        urllib.request.Request(f"{server}/moto-api/reset", data=b"", method="POST"), timeout=10
    ):
        pass
    client.create_bucket(Bucket="box")

    def put(**objects: bytes) -> None:
        for key, data in objects.items():
            client.put_object(Bucket="box", Key=key, Body=data)

    put.client = client
    return put


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def found(spec: str):
    place = find_dataset(spec, allow_network=True)
    return place, load(place.path)


def error_of(spec: str) -> DatasetError:
    with pytest.raises(DatasetError) as error:
        find_dataset(spec, allow_network=True)
    return error.value


def test_a_csv_has_its_images_beside_it(bucket):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\nb/c.png,y\ngone.png,z\n", "d/a.png": picture(1),
              "d/b/c.png": picture(2), "d/other.parquet": b"?", "e/f.png": picture(3)})  # fmt: skip
    place, loaded = found("s3://box/d/p.csv")
    assert (place.name, place.path.name) == ("p", "p.csv")
    assert files_of(place.path.parent) == ["a.png", "b/c.png", "p.csv"]
    size = sum(path.stat().st_size for path in place.path.parent.rglob("*.*"))
    assert place.notes == (f"s3://box/d/p.csv is mirrored in {place.path.parent}: 3 files, {size} bytes",)
    assert column(loaded, "status") == ["ok", "ok", "missing_image"]
    assert ImageStore(loaded.roots).read(column(loaded, "image_uri")[1]) == picture(2)


def test_a_folder_is_read_with_everything_in_it(bucket):
    bucket(**{"d/train/metadata.csv": b"file_name,text\n1.png,x\nn/2.png,y\n", "d/train/1.png": picture(1),
              "d/train/n/2.png": picture(2), "d/": b"", "dd/metadata.csv": b"file_name,text\n"})  # fmt: skip
    for spec in ("s3://box/d", "s3://box/d/"):
        place, loaded = found(spec)
        assert place.name == "d"
        assert column(loaded, "status") == ["ok", "ok"]
        assert column(loaded, "split") == ["train", "train"]


def test_a_pattern_takes_the_shards_that_fit(bucket):
    bucket(**{"s/t-0.tar": shard(a="x", b="y"), "s/t-1.tar": shard(c="z"), "s/v-0.tar": shard(d="w"),
              "s/t-0.txt": b"", "s/deep/t-2.tar": shard(e="v")})  # fmt: skip
    place, loaded = found("s3://box/s/t-*.tar")
    assert place.name == "s"
    assert column(loaded, "caption") == ["x", "y", "z"]
    assert column(found("s3://box/s/**/t-*.tar")[1], "caption") == ["v", "x", "y", "z"]
    assert column(found("s3://box/s/[v]-?.tar")[1], "caption") == ["w"]
    error = error_of("s3://box/s/q-*.tar")
    assert (error.message, error.hint) == (
        "no file fits the pattern s3://box/s/q-*.tar",
        "5 objects lie below box/s",
    )


def test_a_shard_comes_with_what_img2dataset_says_about_it(bucket):
    said = io.BytesIO()
    pq.write_table(
        pa.table({"key": ["a", "b"], "status": ["success", "failed_to_download"], "caption": ["x", "y"],
                  "url": ["u", "v"]}), said)  # fmt: skip
    bucket(**{"s/0.tar": shard(a="x"), "s/0.parquet": said.getvalue(), "s/1.parquet": said.getvalue()})
    for spec in ("s3://box/s/0.tar", "s3://box/s/*.tar"):
        place, loaded = found(spec)
        assert column(loaded, "status") == ["ok", "missing_image"]
        assert files_of(place.path.parent) == ["0.parquet", "0.tar"]


def test_parquet_with_images_inside_comes_alone(bucket):
    inside, beside = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table({"image": [picture(1)], "caption": ["x"]}), inside)
    pq.write_table(pa.table({"image": ["a.png"], "caption": ["x"]}), beside)
    bucket(**{"d/i.parquet": inside.getvalue(), "d/o.parquet": beside.getvalue(), "d/a.png": picture(1)})
    place, loaded = found("s3://box/d/i.parquet")
    assert (files_of(place.path.parent), column(loaded, "status")) == (["i.parquet"], ["ok"])
    place, loaded = found("s3://box/d/o.parquet")
    assert (files_of(place.path.parent), column(loaded, "status")) == (["a.png", "o.parquet"], ["ok"])


def test_what_is_here_is_not_fetched_again_and_a_new_version_is(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\n", "d/a.png": picture(1)})
    fetched, download = [], remote._download

    def counted(bucket, one, partial):
        fetched.append(one.relative)
        download(bucket, one, partial)

    monkeypatch.setattr(remote, "_download", counted)
    first, _ = found("s3://box/d/p.csv")
    again, _ = found("s3://box/d/p.csv")
    assert (sorted(fetched), again.path) == (["a.png", "p.csv"], first.path)
    bucket(**{"d/a.png": picture(2)})
    assert len(picture(1)) == len(picture(2))  # only its ETag tells
    third, loaded = found("s3://box/d/p.csv")
    assert (fetched[2:], third.path != first.path) == (["a.png"], True)
    assert ImageStore(loaded.roots).read(column(loaded, "image_uri")[0]) == picture(2)
    assert (first.path.parent / "a.png").read_bytes() == picture(1)
    assert not [name for name in files_of(remote.cache_folder()) if name.endswith(".partial")]


def test_an_image_that_vanishes_is_a_row_and_a_table_an_error(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\nb.png,y\n", "d/a.png": picture(1), "d/b.png": picture(2)})
    listed = remote._listed

    def listed_then_deleted(name):
        def patched(*args):
            result = listed(*args)
            bucket.client.delete_object(Bucket="box", Key=name)
            return result

        return patched

    monkeypatch.setattr(remote, "_listed", listed_then_deleted("d/b.png"))
    place, loaded = found("s3://box/d/p.csv")
    assert column(loaded, "status") == ["ok", "missing_image"]
    assert place.notes[1] == (
        "1 file of s3://box/d/p.csv could not be fetched, such as 'b.png': it is no longer there"
    )
    bucket(**{"d/p.csv": b"image,caption\na.png,changed\n"})
    monkeypatch.setattr(remote, "_listed", listed_then_deleted("d/p.csv"))
    assert error_of("s3://box/d").message == "s3://box/d: 'p.csv' cannot be fetched: it is no longer there"


def test_keys_lead_nowhere_but_below_the_snapshot(bucket, tmp_path):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\n../../evil.png,y\n", "d/a.png": picture(1),
              "d/../../evil.png": picture(2), "d//abs.png": picture(3), "d/./dot.png": picture(3),
              f"d/{'n' * 300}.png": picture(4)})  # fmt: skip
    place, loaded = found("s3://box/d/p.csv")
    assert column(loaded, "status") == ["ok", "outside_root"]
    assert place.notes[1] == (
        "4 files of s3://box/d/p.csv could not be fetched, such as '../../evil.png': "
        "its key is no path below the dataset"
    )
    assert files_of(place.path.parent) == ["a.png", "p.csv"]
    assert not list(tmp_path.rglob("evil.png"))
    bucket(**{"d/../q.csv": b"image,caption\n"})
    assert error_of("s3://box/d").message == (
        "s3://box/d: '../q.csv' cannot be fetched: its key is no path below the dataset"
    )


def test_a_key_that_is_a_file_and_a_folder_is_told(bucket):
    bucket(**{"d/p.csv": b"image,caption\na,x\n", "d/a": picture(1), "d/a/b.png": picture(2)})
    assert "is a file and a folder at once" in error_of("s3://box/d").message
    assert not list((remote.cache_folder() / "snapshots").iterdir())


def test_a_listing_has_a_limit(bucket, monkeypatch):
    bucket(**{f"d/{number}.png": b"?" for number in range(5)})
    monkeypatch.setattr(remote, "MAX_OBJECTS", 4)
    error = error_of("s3://box/d")
    assert (error.message, error.hint) == (
        "s3://box/d: more than 4 objects lie below box/d",
        "name a folder below it",
    )


def test_what_the_disk_cannot_hold_is_refused_first(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\n"})
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: type("", (), {"free": 7}))
    assert " needs 22 bytes, and " in error_of("s3://box/d").message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("s3://box/none.csv", "s3://box/none.csv does not exist"),
        ("s3://box/none/", "s3://box/none/ does not exist"),
        ("s3://nobody/x", "s3://nobody/x does not exist"),
        ("s3://*/x", "s3://*/x: a pattern needs a bucket"),
        ("s3://box/../x", "'s3://box/../x' names no bucket"),
    ],
)
def test_what_is_not_there_is_one_line(bucket, spec, message):
    assert error_of(spec).message == message


def test_without_leave_nothing_is_asked(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(DatasetError) as error:
        find_dataset("s3://box/p.csv")
    assert (error.value.message, error.value.hint) == (
        "s3://box/p.csv lies behind the network",
        "--allow-network fetches it",
    )


@pytest.mark.parametrize(
    ("spec", "package", "extra"), [("s3://box/x", "s3fs", "s3"), ("gs://box/x", "gcsfs", "gs")]
)
def test_an_absent_package_is_named_with_its_extra(monkeypatch, spec, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, spec[:2], raising=False)
    error = error_of(spec)
    assert (error.message, error.hint) == (
        f"{spec} needs the package {package}",
        f"pip install 'nc-audit[{extra}]'",
    )


def test_no_credentials_are_one_line(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\n", "d/a.png": picture(1)})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = error_of("s3://box/d/p.csv")
    assert error.message == "s3://box/d/p.csv: no credentials were found"
    assert "FSSPEC_S3_ANON=true" in error.hint


def test_a_server_that_is_gone_is_given_up_soon(bucket, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    error = error_of("s3://box/p.csv")
    assert error.message.startswith("s3://box/p.csv cannot be read: Could not connect to the endpoint URL")
    assert time.monotonic() - start < 8


def test_a_network_that_breaks_while_fetching_is_an_error_not_a_row(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\nb.png,y\n", "d/a.png": picture(1), "d/b.png": picture(2)})
    download, tries = remote._download, []

    def broken(bucket, one, partial):
        if one.relative == "b.png":
            tries.append(one)
            raise ConnectionError("reset by peer")
        download(bucket, one, partial)

    monkeypatch.setattr(remote, "_download", broken)
    error = error_of("s3://box/d/p.csv")
    assert error.message == (
        "s3://box/d/p.csv: 'b.png' could not be reached: reset by peer; 1 of 2 files are here"
    )
    assert len(tries) == 3
    monkeypatch.setattr(remote, "_download", download)
    assert column(found("s3://box/d/p.csv")[1], "status") == ["ok", "ok"]


def test_a_full_disk_and_a_folder_of_others_are_told_as_such(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\n", "d/a.png": picture(1)})

    def full(bucket, one, partial):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_download", full)
        with pytest.raises(DiskError, match=r"the disk is full: .* could not be written"):
            find_dataset("s3://box/d/p.csv", allow_network=True)
    blobs = remote.cache_folder() / "blobs"
    if blobs.exists():
        shutil.rmtree(blobs)
    blobs.write_text("a file where a folder should be")
    assert "cannot be written: " in error_of("s3://box/d/p.csv").message


def test_an_answer_that_never_ends_is_given_up(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\n", "d/a.png": picture(1)})
    monkeypatch.setattr(remote, "_GRACE", 0.0)
    monkeypatch.setattr(remote, "_SLOWEST", 1e12)
    message = error_of("s3://box/d/p.csv").message
    assert "'p.csv' could not be reached: 22 bytes came in 0 s" in message


def test_an_object_that_is_not_as_long_as_listed_is_not_taken(bucket, monkeypatch):
    bucket(**{"d/p.csv": b"image,caption\na.png,x\nb.png,y\n", "d/a.png": picture(1), "d/b.png": picture(2)})
    pages = remote._pages
    lie = {"box/d/b.png": 10}
    monkeypatch.setattr(
        remote, "_pages",
        lambda *args: ({**one, "size": lie.get(one["name"], one["size"])} for one in pages(*args)),
    )  # fmt: skip
    place, loaded = found("s3://box/d/p.csv")
    assert column(loaded, "status") == ["ok", "missing_image"]
    assert place.notes[1].endswith("'b.png': it is longer than the 10 bytes of its listing")
    lie["box/d/b.png"] = 10**6
    assert (
        found("s3://box/d/p.csv")[0]
        .notes[1]
        .endswith(f"'b.png': it has {len(picture(2))} bytes, its listing says 1,000,000")
    )


def test_the_command_says_in_one_line_that_the_network_is_not_allowed(tmp_path):
    for command in ("score", "bench"):
        done = subprocess.run(
            [sys.executable, "-m", "nc_audit", command, "s3://bucket/p.csv"],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "s3://bucket/p.csv lies behind the network" in " ".join(done.stderr.split())
        assert not list(tmp_path.iterdir())
