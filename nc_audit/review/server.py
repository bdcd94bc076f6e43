"""The review page's server: on this machine only, for whoever holds the address, and for no other page.

What a request must show before anything is done: a Host header that names this very server (so that a name that was
bound to 127.0.0.1 by a stranger leads nowhere), the random token in its path, and for a change the page's own Origin
and a JSON body of modest size. Pictures are decoded and written anew; no file is ever sent as it lies on the disk.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from nc_audit.errors import AuditError, DatasetError
from nc_audit.review.audit import figures_json, statement
from nc_audit.review.session import VIEWS, Review, check_reviewer

HOST = "127.0.0.1"
MAX_BODY = 64 << 10
MAX_PAGE = 50
_TIMEOUT = 30

_PAGE_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
    "review.css": ("review.css", "text/css; charset=utf-8"),
    "review.js": ("review.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class ReviewServer(ThreadingHTTPServer):
    """Serves one review until it is finished; `url` is the address with the token.

    Args:
        review: the review.
        port: 0 takes a free one.

    Raises:
        DatasetError: the port is taken, or not one that may be used.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, review: Review, port: int = 0) -> None:
        self.review = review
        self.token = secrets.token_urlsafe(24)
        self.is_finished = threading.Event()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise DatasetError(
                f"port {port} cannot be used: {reason}", "--port 0 takes a free one"
            ) from problem
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.url = f"http://{HOST}:{self.server_port}/{self.token}/"

    def serve_until_finished(self) -> None:
        """Serve until somebody presses Finish or the process is interrupted (KeyboardInterrupt passes through)."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            self.is_finished.wait()
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error of ours."""


class _RefusalError(Exception):
    """A request that is not answered."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "nc-audit"
    sys_version = ""
    timeout = _TIMEOUT

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for people."""

    @property
    def _owner(self) -> ReviewServer:
        return cast(ReviewServer, self.server)

    def _guarded(self, answer: Callable[[str, dict[str, str]], None]) -> None:
        try:
            answer(*self._admitted())
        except _RefusalError as refusal:
            # The body of a refused request is not read, so nothing else can come on this connection.
            self.close_connection = True
            self._send_json({"error": refusal.message}, refusal.status)
        except AuditError as problem:
            self._send_json({"error": problem.message, "hint": problem.hint}, HTTPStatus.UNPROCESSABLE_ENTITY)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except OSError as problem:
            text = f"not saved: {problem.strerror or problem}"
            self._send_json({"error": text}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _admitted(self) -> tuple[str, dict[str, str]]:
        """The path below the token and the query of a request that may be answered."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].strip().lower() not in self._owner.hosts:
            raise _RefusalError(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to its own address only")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise _RefusalError(HTTPStatus.FORBIDDEN, "requests of other pages are refused")
        try:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query, max_num_fields=10).items()}
        except ValueError as problem:
            raise _RefusalError(HTTPStatus.BAD_REQUEST, "the address is malformed") from problem
        token, slash, rest = parts.path.removeprefix("/").partition("/")
        given = token.encode("utf-8", "surrogatepass")
        if not hmac.compare_digest(given, self._owner.token.encode()) or not slash:
            raise _RefusalError(
                HTTPStatus.FORBIDDEN, "the address lacks the token; take the one that nc-audit printed"
            )
        return rest, query

    def _get(self, path: str, query: dict[str, str]) -> None:
        review = self._owner.review
        if path in _PAGE_FILES:
            name, kind = _PAGE_FILES[path]
            self._send(files("nc_audit.review").joinpath("page", name).read_bytes(), kind)
        elif path.startswith("image/"):
            data = review.picture(path.removeprefix("image/"), query.get("size", "large"))
            if data is None:
                raise _RefusalError(HTTPStatus.NOT_FOUND, "there is no such image in this run")
            # The name is the content's hash, so it never changes.
            self._send(data, "image/jpeg", cache="private, max-age=86400, immutable")
        elif path == "api/state":
            self._send_json(review.state(self._reviewer(query)))
        elif path == "api/pairs":
            start, count = self._number(query, "from"), self._number(query, "count")
            self._send_json({"pairs": review.page(start, min(count, MAX_PAGE), self._reviewer(query))})
        elif path == "api/find":
            view, forward = query.get("view", "all"), query.get("step") != "-1"
            if view not in VIEWS:
                raise _RefusalError(HTTPStatus.BAD_REQUEST, "there is no such view")
            at = self._number(query, "at")
            found = review.find(
                at, 1 if forward else -1, view, self._reviewer(query), include=query.get("include") == "1"
            )
            self._send_json({"at": found})
        elif path == "api/figures":
            found_figures = review.figures()
            facts = None if found_figures is None else figures_json(found_figures)
            self._send_json(
                {"figures": facts, "lines": [] if found_figures is None else statement(found_figures)}
            )
        else:
            raise _RefusalError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self, path: str, query: dict[str, str]) -> None:
        owner = self._owner
        if self.headers.get("Origin") not in {f"http://{host}" for host in owner.hosts}:
            raise _RefusalError(HTTPStatus.FORBIDDEN, "requests of other pages are refused")
        if self.headers.get_content_type() != "application/json":
            raise _RefusalError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a JSON body is needed")
        body = self._body()
        reviewer = check_reviewer(str(body.get("reviewer") or owner.review.reviewer))
        if path == "api/decide":
            pair_id, decision, caption = (body.get(name) for name in ("pair_id", "decision", "caption"))
            if not isinstance(pair_id, str) or not isinstance(decision, str):
                raise _RefusalError(HTTPStatus.BAD_REQUEST, "pair_id and decision are needed")
            if caption is not None and not isinstance(caption, str):
                raise _RefusalError(HTTPStatus.BAD_REQUEST, "the caption is no text")
            self._send_json(owner.review.decide(pair_id, decision, caption, reviewer))
        elif path == "api/undo":
            self._send_json(owner.review.undo(reviewer))
        elif path == "api/finish":
            self.close_connection = True
            self._send_json({"finished": True})
            owner.is_finished.set()
        else:
            raise _RefusalError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise _RefusalError(HTTPStatus.LENGTH_REQUIRED, "the length of the body is needed")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise _RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY:,} bytes are taken")
        data = self.rfile.read(int(length))
        try:
            body = json.loads(data)
            # Half a surrogate pair is valid JSON and no text.
            json.dumps(body, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as problem:
            raise _RefusalError(HTTPStatus.BAD_REQUEST, "the body is not JSON") from problem
        if len(data) != int(length) or not isinstance(body, dict):
            raise _RefusalError(HTTPStatus.BAD_REQUEST, "the body is no JSON object")
        return body

    def _reviewer(self, query: dict[str, str]) -> str:
        return check_reviewer(query.get("reviewer") or self._owner.review.reviewer)

    def _number(self, query: dict[str, str], name: str) -> int:
        text = query.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 12):
            raise _RefusalError(HTTPStatus.BAD_REQUEST, f"{name} must be a number")
        return int(text)

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        data = json.dumps(value, ensure_ascii=True, allow_nan=False).encode("ascii")
        self._send(data, "application/json", status)

    def _send(
        self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, *, cache: str = "no-store"
    ) -> None:
        with suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", cache)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
