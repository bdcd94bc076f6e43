"""Datasets of the hub, fetched from a server on the loopback that speaks its endpoints; and caches with gaps."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import urllib.parse

import pytest

from nc_audit.dataset import find_dataset, places
from nc_audit.errors import DatasetError

COMMIT = "c" * 40
FILES = {
    "README.md": b"# card",
    "train/metadata.csv": b"file_name,text\n1.png,one\n2.png,two\n",
    "train/1.png": b"\x89PNG 1",
    "train/2.png": b"\x89PNG 2",
}

# Fetched in a process of its own: the hub's client reads its settings once, when it is imported.
PROGRAM = """
import sys
from nc_audit.dataset import find_dataset
from nc_audit.errors import DatasetError
try:
    place = find_dataset(sys.argv[1], allow_network=sys.argv[2] == "yes")
    print(place.path, *place.notes, sep="\\n")
except DatasetError as error:
    print("error", error.message, error.hint, sep="\\n")
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """`/api/datasets/...`, its revisions and trees, and `/datasets/.../resolve/...`, of one dataset."""

    protocol_version = "HTTP/1.1"
    gone: frozenset[str] = frozenset()
    claimed: int | None = None  # the size of every file by the listing; None for the true one

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, *, with_body):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api, resolve = "/api/datasets/owner/name", "/datasets/owner/name/resolve/"
        headers = {"X-Repo-Commit": COMMIT}
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode(),
                       {"Content-Type": "application/json"}, with_body)  # fmt: skip
        elif path.startswith(f"{api}/tree/"):
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "oid": hashlib.sha1(data).hexdigest(),
                    "size": len(data) if type(self).claimed is None else type(self).claimed,
                }
                for name, data in FILES.items()
            ]
            self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, with_body)
        elif path.startswith(resolve):
            name = path.removeprefix(resolve).partition("/")[2]
            if name in FILES and name not in type(self).gone:
                data = FILES[name]
                self.reply(200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, with_body)
            else:
                self.reply(404, b"", {**headers, "X-Error-Code": "EntryNotFound"}, with_body)
        else:
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound"}, with_body)

    def reply(self, code, data, headers, with_body):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    class Own(Hub):
        gone = frozenset()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Own.url = f"http://127.0.0.1:{server.server_port}"
    yield Own
    server.shutdown()
    thread.join()
    server.server_close()


def ask(tmp_path, endpoint, spec="hf:owner/name", allow="yes"):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, spec, allow],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={
            "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path),
            "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_hub_is_asked_only_with_leave_and_then_once(hub, tmp_path):
    refused = ask(tmp_path, hub.url, allow="no")
    assert refused == [
        "error",
        "hf:owner/name is not in the hub's cache, and --allow-network is not given",
        "--allow-network fetches it; or fetch it where there is a network: "
        "hf download --repo-type dataset owner/name",
    ]
    path, note = ask(tmp_path, hub.url)
    size = sum(len(data) for data in FILES.values())
    assert note == f"hf:owner/name was fetched from the hub, commit {COMMIT[:12]}: {size:,} bytes came"
    snapshot = tmp_path / "hf" / "hub" / "datasets--owner--name" / "snapshots" / COMMIT
    assert path == str(snapshot)
    assert {name: (snapshot / name).read_bytes() for name in FILES} == FILES
    # Now in the cache: read without the server.
    assert ask(tmp_path, "http://127.0.0.1:1", allow="no")[0] == path
    assert ask(tmp_path, "http://127.0.0.1:1")[0] == path
    # A file that went missing is told by the client's own list of the commit, and fetched again with leave.
    (snapshot / "train" / "2.png").unlink()
    refused = ask(tmp_path, hub.url, allow="no")
    assert refused[1] == (
        "hf:owner/name is in the hub's cache only in part (1 file not there, such as train/2.png), "
        "and --allow-network is not given"
    )
    assert refused[2].endswith(f"; or name {snapshot} itself to read what is there")
    assert ask(tmp_path, hub.url) == [
        path, f"hf:owner/name is read from the hub's cache, complete, commit {COMMIT[:12]}: 0 bytes came"
    ]  # fmt: skip
    assert (snapshot / "train" / "2.png").read_bytes() == FILES["train/2.png"]


def test_a_file_the_hub_does_not_serve_and_a_dataset_it_does_not_know_are_one_line(hub, tmp_path):
    hub.gone = frozenset({"train/1.png"})
    said = ask(tmp_path, hub.url)
    assert said[0] == "error"
    assert said[1].startswith("hf:owner/name cannot be fetched: ")
    said = ask(tmp_path, hub.url, "hf:owner/unknown")
    assert said[1] == "hf:owner/unknown is not in the hub's cache, and the hub answers 401 for owner/unknown"
    said = ask(tmp_path, "http://127.0.0.1:1", "hf:owner/unknown")
    assert said[1] == "hf:owner/unknown is not in the hub's cache, and the hub cannot be reached"


def test_a_dataset_larger_than_the_disk_is_refused_before_its_first_byte(hub, tmp_path):
    hub.claimed = 1 << 60
    said = ask(tmp_path, hub.url)
    needed = (1 << 60) * len(FILES)
    assert said[1].startswith(f"hf:owner/name needs {needed:,} bytes, and {tmp_path} has ")
    assert said[2] == "set HF_HUB_CACHE to a folder on a larger disk"
    assert not list(tmp_path.rglob("metadata.csv"))


@pytest.mark.parametrize(
    ("damage", "gap"),
    [
        (lambda top: (top / "snapshots" / COMMIT / "b.csv").symlink_to("../../blobs/none"),
         "1 file not there, such as b.csv"),
        (lambda top: (top / "snapshots" / COMMIT / "t-00001-of-00003.parquet").write_bytes(b""),
         "1 of 3 shards t-*"),
        (lambda top: ((top / "trees").mkdir(), (top / "trees" / f"{COMMIT}.json").write_text(
            '{"format_version": 1, "files": {"a.csv": {}, "x/1.png": {}, "README.md": {}, ".gitattributes": {}}}')),
         "1 file not there, such as x/1.png"),
    ],
)  # fmt: skip
def test_a_cache_with_gaps_is_told(tmp_path, monkeypatch, damage, gap):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    top = tmp_path / "datasets--owner--name"
    snapshot = top / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "a.csv").write_bytes(b"image,caption\n")
    assert find_dataset("hf:owner/name").path == snapshot
    damage(top)
    with pytest.raises(DatasetError) as error:
        find_dataset("hf:owner/name", allow_network=True)
    assert error.value.message == (
        f"hf:owner/name is in the hub's cache only in part ({gap}), and HF_HUB_OFFLINE is set"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": ["a\\u0000b"]}', "[" * 100_000])
def test_a_broken_list_of_a_commit_says_nothing(tmp_path, text):
    snapshot = tmp_path / "snapshots" / COMMIT
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / f"{COMMIT}.json").write_text(text)
    snapshot.mkdir(parents=True)
    assert places._gap(snapshot) is None
