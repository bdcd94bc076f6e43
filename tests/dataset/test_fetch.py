"""Images given by URL, against a real server on the loopback that is slow, fails, redirects and lies."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from dataset_checks import column, load
from PIL import Image

from nc_audit.dataset import ImageStore
from nc_audit.dataset.fetch import Limits, fetch_images

QUICK = Limits(max_bytes=20_000, silence=0.4, seconds=0.8, tries=2, redirects=3, pause=0.01)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


class _Answers(BaseHTTPRequestHandler):
    asked: Counter[str]

    def log_message(self, *_):
        pass

    def send(self, code, data=b"", length=None, kind="image/png", **headers):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.asked[self.path] += 1
        first = self.asked[self.path] == 1
        match self.path:
            case "/a.png" | "/a%20b/%C3%A9.png?x=1":
                self.send(200, picture())
            case "/silent.png":
                time.sleep(0.7)
            case "/drip.png":
                self.send(200, b"", length=10_000)
                for _ in range(8):
                    time.sleep(0.2)
                    self.wfile.write(b"x")
            case "/busy.png":
                self.send(503 if first else 200, b"" if first else picture())
            case "/broken.png":
                self.send(500)
            case "/hop.png":
                self.send(302, Location="/a.png")
            case "/loop.png":
                self.send(302, Location="/loop.png")
            case "/file.png":
                self.send(302, Location="file:///etc/passwd")
            case "/short.png":
                self.send(200, picture(), length=10_000)
            case "/huge.png":
                self.send(200, b"", length=10**12)
            case "/endless.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(bytes(60_000))
            case "/page.png":
                self.send(200, b"<html>", kind="text/html")
            case "/nothing.png":
                self.send(200)
            case _:
                self.send(404)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Answers(_Answers):
        asked: Counter[str] = Counter()  # noqa: RUF012

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            """A client that gives up is what the tests want."""

    served = Server(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", Answers.asked
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("path", "status", "detail", "times"),
    [
        ("/a.png", "ok", None, 1),
        ("/a b/é.png?x=1#part", "ok", None, 1),
        ("/busy.png", "ok", None, 2),
        ("/hop.png", "ok", None, 1),
        ("/gone.png", "missing_image", "HTTP 404", 1),
        ("/broken.png", "missing_image", "HTTP 500, 2 times", 2),
        ("/silent.png", "missing_image", "timed out, 2 times", 2),
        ("/loop.png", "missing_image", "more than 3 redirects", 4),
        ("/file.png", "missing_image", "HTTP 302, which leads to something other than http and https", 1),
        ("/huge.png", "missing_image", "larger than 20,000 bytes", 1),
        ("/endless.png", "missing_image", "larger than 20,000 bytes", 1),
        ("/page.png", "corrupt_image", "the answer is no image (6 bytes, sent as text/html)", 1),
        ("/nothing.png", "corrupt_image", "the answer is no image (0 bytes, sent as image/png)", 1),
    ],
)
def test_every_answer_has_its_status(tmp_path, server, path, status, detail, times):
    address, asked = server
    found = fetch_images([address + path], tmp_path, QUICK)[address + path]
    assert (found.status, found.detail) == (status, detail)
    assert max(asked.values()) == times
    assert sum(one.is_file() for one in tmp_path.rglob("*")) == (status == "ok")


def test_an_answer_that_drips_is_ended(tmp_path, server):
    found = fetch_images([f"{server[0]}/drip.png"], tmp_path, QUICK)
    assert found[f"{server[0]}/drip.png"].detail.startswith("timed out after ")


def test_an_answer_shorter_than_it_says_is_no_image(tmp_path, server):
    detail = fetch_images([f"{server[0]}/short.png"], tmp_path, QUICK)[f"{server[0]}/short.png"].detail
    assert detail == f"the answer breaks off {10_000 - len(picture()):,} bytes early, 2 times"


def test_a_private_network_is_not_asked(tmp_path, server):
    # Linux connects 0.0.0.0 to the loopback, which the URL does not name.
    url = f"http://0.0.0.0:{server[0].rpartition(':')[2]}/a.png"
    assert fetch_images([url], tmp_path, QUICK)[url].detail == "0.0.0.0 is an address of a private network"
    assert not server[1]


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a:x/b.png", "http://nowhere.invalid/a.png"])
def test_a_url_that_leads_nowhere_is_a_status(tmp_path, url, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = fetch_images([url], tmp_path, QUICK)[url]
    assert found.status == "missing_image"
    assert "cannot be" in found.detail or "timed out" in found.detail


def test_rows_with_urls_are_fetched_once_and_kept(tmp_path, server):
    address, asked = server
    rows = [
        f"{address}/a.png,a pond",
        f"{address}/a.png,a lake",
        f"{address}/gone.png,gone",
        "s3://b/c.png,far",
    ]
    (tmp_path / "pairs.csv").write_text("url,caption\n" + "\n".join(rows) + "\n")
    assert column(load(tmp_path, limit=None, downloads=tmp_path / "run"), "status") == [
        "ok", "ok", "missing_image", "remote_image",
    ]  # fmt: skip
    loaded = load(tmp_path, downloads=tmp_path / "run")
    assert asked["/a.png"] == 1
    assert asked["/gone.png"] == 2  # what failed is asked for again
    assert column(loaded, "status_detail")[2:] == [
        "HTTP 404", "the image is a URL; only http and https are fetched",
    ]  # fmt: skip
    assert column(loaded, "resolved_by")[:2] == ["downloaded"] * 2
    assert "2 rows with an image fetched by its URL" in loaded.notes
    assert not any("--image-root" in note for note in loaded.notes)
    assert ImageStore(loaded.roots).read(column(loaded, "image_uri")[0]) == picture()


def test_nothing_is_fetched_unless_asked(tmp_path, server):
    address, asked = server
    Image.new("RGB", (4, 3)).save(tmp_path / "b.png")
    (tmp_path / "pairs.csv").write_text(f"url,caption\n{address}/a.png,a pond\nb.png,here\n")
    assert column(load(tmp_path), "status") == ["remote_image", "ok"]
    assert not asked
