"""Images given by URL, fetched for `--allow-network`: many at a time, each within limits of size, time and redirects.

Only http and https. An address inside a private network is refused, whatever name leads to it, but for loopback
where the dataset's own URL names loopback: a dataset must not make the auditing machine ask its neighbours. Behind a
proxy the proxy decides. What was fetched is kept under the hash of its URL and not fetched again.
"""

from __future__ import annotations

import http.client
import ipaddress
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit, urlunsplit

from nc_audit import __version__
from nc_audit.dataset.ids import content_id
from nc_audit.dataset.images import Found, header_problem
from nc_audit.errors import AuditError
from nc_audit.run import replacing

_CHUNK = 1 << 16
_REPEAT = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Limits:
    """What a fetch may cost.

    Attributes:
        max_bytes: a larger answer is refused.
        silence: seconds without a byte until a try ends.
        seconds: of one try.
        tries: of one URL; only what may pass is tried again.
        redirects: followed from one URL.
        at_once: URLs fetched at a time.
        pause: seconds before the second try; doubled before each further one.
    """

    max_bytes: int = 64 << 20
    silence: float = 10.0
    seconds: float = 60.0
    tries: int = 3
    redirects: int = 5
    at_once: int = 16
    pause: float = 0.5


class _RefusedError(Exception):
    """A URL that no further try would fetch."""


class _PassingError(Exception):
    """A failure that another try may mend."""


def is_fetchable(url: str) -> bool:
    """Whether a URL is one of http or https."""
    return url.lstrip().lower().startswith(("http://", "https://"))


def fetch_images(
    urls: Sequence[str],
    folder: Path,
    limits: Limits | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Found]:
    """Each URL's image in `folder`, or why it is not there.

    Args:
        urls: of http or https, each once.
        folder: made when it is not there; what it holds from before is not fetched again.
        limits: what a fetch may cost.
        progress: told the URLs done and their number.

    Returns:
        By URL: `ok` with a path and a `downloads:` URI; `corrupt_image` where the answer is no image;
        `missing_image` with the reason, such as "HTTP 404".
    """
    allowed = limits or Limits()
    found: dict[str, Found] = {}
    pool = ThreadPoolExecutor(allowed.at_once)
    try:
        for url, one in zip(urls, pool.map(lambda url: _image(url, folder, allowed), urls), strict=True):
            found[url] = one
            if progress:
                progress(len(found), len(urls))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt waits for what is under way, not for the rest
    return found


def _image(url: str, folder: Path, limits: Limits) -> Found:
    name = content_id(url)
    relative = f"{name[:2]}/{name}"
    path = folder / relative
    ok = Found("ok", None, f"downloads:{relative}", str(path.resolve()), "downloaded", "downloaded")
    if path.is_file():
        return ok
    try:
        data, kind = _answer(url, limits)
    except _RefusedError as problem:
        return Found("missing_image", str(problem), how="refused")
    if header_problem(data) is not None:
        about = f", sent as {kind}" if kind else ""
        return Found("corrupt_image", f"the answer is no image ({len(data):,} bytes{about})", how="refused")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(data)
    return ok


def _answer(url: str, limits: Limits) -> tuple[bytes, str]:
    """The bytes behind a URL and what the server calls them, after as many tries as allowed."""
    for number in range(1, limits.tries + 1):
        try:
            return _one_try(url, limits)
        except _PassingError as problem:
            if number == limits.tries:
                times = f", {number} times" if number > 1 else ""
                raise _RefusedError(f"{problem}{times}") from problem
            time.sleep(limits.pause * 2 ** (number - 1) * random.uniform(0.75, 1.25))
    raise AuditError("no try is allowed", "limits.tries must be 1 or more")


def _one_try(url: str, limits: Limits) -> tuple[bytes, str]:
    end = time.monotonic() + limits.seconds
    headers = {"User-Agent": f"nc-audit/{__version__}", "Accept": "image/*,*/*;q=0.5"}
    try:
        request = urllib.request.Request(_spelt(url), headers=headers)
        with _opener(url, limits).open(request, timeout=limits.silence) as answer:
            stated = answer.headers.get("Content-Length", "")
            if stated.isdigit() and int(stated[:18]) > limits.max_bytes:
                raise _RefusedError(f"larger than {limits.max_bytes:,} bytes")
            data = _body(answer, end, limits)
            return data, "".join(answer.headers.get_content_type().split())[:80]
    except urllib.error.HTTPError as problem:
        problem.close()
        said = f"HTTP {problem.code}"
        target = problem.headers.get("Location") if problem.headers else None
        if 300 <= problem.code < 400 and target:  # the library follows no other scheme
            said += ", which leads to something other than http and https"
        raise (_PassingError(said) if problem.code in _REPEAT else _RefusedError(said)) from problem
    except TimeoutError as problem:
        raise _PassingError("timed out") from problem
    except urllib.error.URLError as problem:
        if isinstance(problem.reason, TimeoutError):
            raise _PassingError("timed out") from problem
        raise _PassingError(f"cannot be reached: {_one_line(problem.reason)}") from problem
    except (http.client.IncompleteRead, ConnectionError, ssl.SSLError) as problem:
        raise _PassingError(f"the answer breaks off: {_one_line(problem)}") from problem
    except (http.client.HTTPException, OSError, ValueError) as problem:
        raise _RefusedError(f"cannot be fetched: {_one_line(problem)}") from problem


def _body(answer: Any, end: float, limits: Limits) -> bytes:
    data = bytearray()
    while chunk := answer.read1(_CHUNK):
        data += chunk
        if len(data) > limits.max_bytes:
            raise _RefusedError(f"larger than {limits.max_bytes:,} bytes")
        if time.monotonic() > end:
            raise _PassingError(f"timed out after {len(data):,} bytes")
    if answer.length:
        raise _PassingError(f"the answer breaks off {answer.length:,} bytes early")
    return bytes(data)


def _spelt(url: str) -> str:
    """A URL with what it may not hold escaped: spaces and other scripts."""
    parts = urlsplit(url.strip())
    host = parts.netloc.encode("idna").decode("ascii") if not parts.netloc.isascii() else parts.netloc
    safe = "%/:=&?~#+!$,;'@()*[]"
    return urlunsplit((parts.scheme, host, quote(parts.path, safe), quote(parts.query, safe), ""))


def _opener(url: str, limits: Limits) -> urllib.request.OpenerDirector:
    """An opener that follows so many redirects to http and https, and refuses addresses of private networks."""
    proxies = urllib.request.getproxies()
    may_loop = _is_loopback(urlsplit(url.strip()).hostname or "")

    def check(connection: http.client.HTTPConnection) -> None:
        host = getattr(connection, "_tunnel_host", None) or connection.host
        if any(host == (urlsplit(proxy).hostname or proxy) for proxy in proxies.values()) or (
            getattr(connection, "_tunnel_host", None)
        ):
            return
        address = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
        plain = getattr(address, "ipv4_mapped", None) or address
        if not plain.is_global and not (may_loop and plain.is_loopback):
            connection.close()
            raise _RefusedError(f"{connection.host} is an address of a private network")

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            check(self)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            check(self)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, req)

    class Redirects(urllib.request.HTTPRedirectHandler):
        num_followed = 0

        def redirect_request(
            self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
        ) -> urllib.request.Request | None:
            self.num_followed += 1
            if self.num_followed > limits.redirects:
                raise _RefusedError(f"more than {limits.redirects} redirects")
            if not is_fetchable(newurl):
                raise _RefusedError("redirected to something other than http and https")
            return super().redirect_request(req, fp, code, msg, headers, _spelt(newurl))

    opener = urllib.request.OpenerDirector()
    opener.addheaders = []
    for handler in (
        urllib.request.ProxyHandler(proxies),
        PlainHandler(),
        SecureHandler(),
        Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())[:120] or type(problem).__name__
