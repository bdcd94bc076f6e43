"""The review server answers the page it printed the address of, and nobody else."""

from __future__ import annotations

import io
import socket

import pytest
from PIL import Image
from review_runs import ask, ids_of, lines_of, review_of, run_of, served

from nc_audit.errors import DatasetError
from nc_audit.review import ReviewServer
from nc_audit.review.server import MAX_BODY

KEEP = {"pair_id": ids_of(1)[0], "decision": "keep"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """For tests that write nothing."""
    return run_of(tmp_path_factory.mktemp("review") / "run")


@pytest.fixture(scope="module")
def server(run):
    with served(review_of(run)) as started:
        yield started


@pytest.fixture
def own_run(tmp_path):
    return run_of(tmp_path / "run")


@pytest.fixture
def own(own_run):
    with served(review_of(own_run)) as started:
        yield started


def test_it_listens_on_this_machine_only_with_a_long_random_token(server, run):
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 32
    with served(review_of(run)) as other:
        assert other.token != server.token
    assert server.url == f"http://127.0.0.1:{server.server_port}/{server.token}/"


def test_the_page_comes_with_a_strict_policy_and_asks_nothing_of_others(server):
    for path in ("", "review.js", "review.css", "icon.svg"):
        status, content, headers = ask(server, path)
        assert status == 200
        assert b"//" not in content.replace(b"http://www.w3.org/2000/svg", b"").replace(b"// ", b"")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
        assert headers["server"].strip() == "nc-audit"


@pytest.mark.parametrize("token", ["", "x", "x" * 32, "%C3%A9", "%00", ".."])
@pytest.mark.parametrize("path", ["", "api/state", "review.js"])
def test_without_the_token_there_is_nothing(server, token, path):
    status, content, _ = ask(server, path, token=token)
    assert status == 403
    assert content == {"error": "the address lacks the token; take the one that nc-audit printed"}


def test_part_of_the_token_is_no_token(server):
    assert ask(server, "api/state", token=server.token[:-1])[0] == 403
    assert ask(server, "api/state", token=server.token + "x")[0] == 403
    assert ask(server, "api/decide", KEEP, token=server.token[:-1])[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", None]
)
def test_another_host_name_is_refused_though_it_leads_here(server, host):
    host = host and host.format(port=server.server_port)
    status, content, _ = ask(server, "api/state", headers={"Host": host})
    assert status == 421
    assert content == {"error": "this server answers to its own address only"}


def test_localhost_is_this_server_too(server):
    assert ask(server, "api/state", headers={"Host": f"localhost:{server.server_port}"})[0] == 200


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1:1"]
)
def test_another_origin_may_not_decide(server, run, origin):
    origin = origin and origin.format(port=server.server_port)
    status, content, _ = ask(server, "api/decide", KEEP, headers={"Origin": origin})
    assert (status, content) == (403, {"error": "requests of other pages are refused"})
    assert not (run.path / "decisions.jsonl").exists()


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_says_the_request_is_another_pages_is_refused(server, site):
    assert ask(server, "api/state", headers={"Sec-Fetch-Site": site})[0] == 403
    assert ask(server, "image/image0000", headers={"Sec-Fetch-Site": site})[0] == 403


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_what_is_not_json_by_name_is_refused(server, run, kind):
    assert ask(server, "api/decide", KEEP, headers={"Content-Type": kind})[0] == 415
    assert not (run.path / "decisions.jsonl").exists()


@pytest.mark.parametrize(
    "body",
    [b"", b"keep", b"[]", b'"x"', b'{"pair_id": ', b"\xff\xfe", b"[" * 50_000, b'{"caption": "\\ud800"}'],
)
def test_what_is_not_a_json_object_is_refused(server, body):
    status, content, _ = ask(server, "api/decide", raw=body)
    assert status == 400
    assert content["error"].startswith("the body is no")


def test_a_body_too_large_is_refused_before_it_is_read(server):
    status, content, headers = ask(
        server, "api/decide", raw=b"{}", headers={"Content-Length": str(MAX_BODY + 1)}
    )
    assert (status, content) == (413, {"error": "at most 65,536 bytes are taken"})
    assert headers["connection"] == "close"
    assert ask(server, "api/decide", raw=b"{}", headers={"Content-Length": "9" * 40})[0] == 413


@pytest.mark.parametrize("length", ["-1", "x", "", "1e3", None])
def test_a_body_of_unknown_length_is_refused(server, length):
    assert ask(server, "api/decide", raw=b"", headers={"Content-Length": length})[0] == 411


def test_a_chunked_body_is_refused(server):
    headers = {"Transfer-Encoding": "chunked", "Content-Length": None}
    assert ask(server, "api/decide", raw=b"2\r\n{}\r\n0\r\n\r\n", headers=headers)[0] == 411


@pytest.mark.parametrize(
    "path",
    [
        "../run.json",
        "..%2frun.json",
        "image/../../run.json",
        "image/..%2f..%2frun.json",
        "image/dataset:images/0.png",
        "image//etc/passwd",
        "image/",
        "page/index.html",
        "index.html",
        "api/",
        "api/decide",
    ],
)
def test_no_path_leads_to_a_file(server, path):
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE"])
def test_other_methods_are_not_known(server, method):
    status, _, headers = ask(server, "api/state", method=method)
    assert status == 501
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    "values",
    ["from=x&count=1", "from=-1&count=1", "count=1", "from=1&count=9999999999999", "from=%C2%B2&count=1"],
)
def test_numbers_are_numbers(server, values):
    assert ask(server, f"api/pairs?{values}")[0] == 400


def test_a_page_is_small_however_much_is_asked_for(tmp_path):
    with served(review_of(run_of(tmp_path / "run", 70))) as server:
        assert len(ask(server, "api/pairs?from=0&count=70000")[1]["pairs"]) == 50


def test_an_image_is_drawn_anew_as_jpeg(server):
    status, content, headers = ask(server, "image/image0003?size=small")
    assert status == 200
    assert headers["content-type"] == "image/jpeg"
    image = Image.open(io.BytesIO(content))
    assert image.format == "JPEG"
    assert image.size == (8, 8)
    assert ask(server, "image/image0003?size=huge")[0] == 404
    assert ask(server, "image/image9999")[0] == 404


def test_an_image_that_is_gone_or_broken_is_told(run):
    def read(uri: str) -> bytes:
        if uri.endswith("0.png"):
            raise FileNotFoundError(2, "No such file or directory")
        return b"GIF89a<script>alert(1)</script>"

    with served(review_of(run, read_image=read)) as server:
        assert ask(server, "image/image0000")[:2] == (
            422,
            {"error": "dataset:images/0.png cannot be read: No such file or directory", "hint": ""},
        )
        status, content, headers = ask(server, "image/image0001")
        assert status == 422
        assert headers["content-type"] == "application/json"
        assert b"script" not in str(content).encode()


def test_a_decision_is_written_before_it_is_acknowledged(own, own_run):
    status, content, _ = ask(own, "api/decide", KEEP)
    assert status == 200
    assert content["pair"]["mine"]["decision"] == "keep"
    assert (content["decided"], content["total"]) == (1, 6)
    line = lines_of(own_run)[0]
    assert line.pop("time").endswith("Z")
    assert line == KEEP | {"reviewer": "ann", "tag": "noisy", "probability": 0.95}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"decision": "keep"}, 400, "pair_id and decision are needed"),
        ({"pair_id": 3, "decision": "keep"}, 400, "pair_id and decision are needed"),
        ({"pair_id": "nobody", "decision": "keep"}, 422, "this pair is not in the review"),
        (KEEP | {"decision": "undo"}, 422, "there is no such decision"),
        (KEEP | {"decision": "fix"}, 422, "the new caption is empty"),
        (KEEP | {"decision": "fix", "caption": " \n "}, 422, "the new caption is empty"),
        (KEEP | {"decision": "fix", "caption": ["x"]}, 400, "the caption is no text"),
        (KEEP | {"decision": "fix", "caption": "x" * 10_001}, 422, "the new caption has 10,001 characters"),
        (KEEP | {"reviewer": "model"}, 422, "'model' is no name for a reviewer"),
        (KEEP | {"reviewer": "a\u202eb"}, 422, "'a\\\\u202eb' is no name for a reviewer"),
    ],
)
def test_what_is_no_decision_is_refused_and_not_written(server, run, body, status, message):
    found, content, _ = ask(server, "api/decide", body)
    assert (found, content["error"]) == (status, message)
    assert not (run.path / "decisions.jsonl").exists()


def test_a_rematch_takes_the_runs_own_words(own, own_run):
    ask(own, "api/decide", KEEP | {"decision": "rematch", "caption": "something else"})
    assert lines_of(own_run)[0]["caption"] == "a better caption 0"


def test_a_port_that_is_taken_is_told(run):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(DatasetError) as caught:
            ReviewServer(review_of(run), port)
    assert caught.value.message == f"port {port} cannot be used: Address already in use"
    assert caught.value.hint == "--port 0 takes a free one"


def test_a_disk_that_refuses_is_told_and_nothing_is_acknowledged(own, monkeypatch):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nc_audit.review.journal.os.fsync", full)
    status, content, _ = ask(own, "api/decide", KEEP)
    assert (status, content) == (500, {"error": "not saved: No space left on device"})
    monkeypatch.undo()
    assert ask(own, "api/state")[1]["decided"] == 0


def test_finish_ends_the_server(own_run):
    with served(review_of(own_run)) as server:
        assert ask(server, "api/finish", {})[:2] == (200, {"finished": True})
        server.is_finished.wait(5)
    with pytest.raises(ConnectionError):
        ask(server, "api/state")


def test_bytes_that_are_no_request_end_the_connection(server):
    for sent in (
        b"\x00\xff\xfe\r\n\r\n",
        b"GET /\xe9/ HTTP/1.1\r\nHost: \xe9\r\n\r\n",
        b"GET " + b"/" * 70_000,
    ):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
            line.sendall(sent + b"\r\n\r\n")
            assert b"200 OK" not in line.recv(4096)
    assert ask(server, "api/state")[0] == 200
