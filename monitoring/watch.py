"""A run's live page: a server on this machine's loopback that follows the run directory and sends what changed.

It answers GET and HEAD alone, to whoever has the token: other people of a login node reach its loopback as well. A page
elsewhere that makes a name of its own point here (DNS rebinding) is told by the name that it asks for.
"""

from __future__ import annotations

import gzip
import html
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from string import Template
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import orjson

from monitoring.figures import Panel, panels
from monitoring.page import asset, checksum, panel_html, panels_html, plotly_script
from monitoring.reading.run_reader import RunReader
from monitoring.reading.runview import RunView
from monitoring.report import details_html, summary_html
from monitoring.runlog import RunLogError
from monitoring.standing import Standing, standing

_READ_BYTES = 16 << 20
_LOOK_SECONDS = 1.0
_IDLE_LOOK_SECONDS = 10.0
_IDLE_SECONDS = 60.0
_REDRAW_SECONDS = 15.0  # ages and shares of time move although nothing was logged
_DRAWING_SHARE = 0.25
_CONNECTION_SECONDS = 30.0
_HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")  # of any port: a tunnel may begin at another


class WatchError(ValueError):
    """The page cannot be served; the message says why and what to do."""


class _Part(NamedTuple):
    """One piece of the page, and the version of the page in which it last changed."""

    version: int
    body: bytes


class Watcher:
    """Follows a run in a thread of its own, and keeps drawn what was read of it so far.

    Raises:
        RunLogError: there is no such run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._reader = RunReader(run_dir)
        self._turn = threading.Lock()  # a view is good until the next poll
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watcher", daemon=True)
        self._instance = secrets.token_hex(4)
        self._version = 0
        self._parts: dict[str, _Part] = {}
        view = self._reader.view(time.time())
        self._standing = standing(run_dir, view, time.time())
        self._sections = panels_html(panels([view]))
        self._axes: dict[str, str] = {}
        self._reading: tuple[int, int] | None = (0, 0)
        self._read = -1
        self._problem: str | None = None
        self._stale = True
        self._drawn, self._cost = 0.0, 0.0
        self._asked = time.monotonic()

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Read no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def shell(self) -> tuple[Standing, str]:
        """Return what is known at once: how the run stands, and the HTML of its panels without their plots."""
        return self._standing, self._sections

    def changes(self, have: str) -> bytes:
        """Return as JSON how the run stands, and those parts of the page that changed since version `have`."""
        self._asked = time.monotonic()
        instance, _, number = have.partition("-")
        since = int(number) if instance == self._instance and number.isdecimal() else 0
        version = self._version  # before the parts: what comes meanwhile is then sent twice, and not never
        parts = self._parts
        head = {
            "version": f"{self._instance}-{version}",
            "now": time.time(),
            "standing": self._standing.to_dict(),
            "reading": self._reading,
            "problem": self._problem,
        }
        changed = b",".join(part.body for part in parts.values() if part.version > since)
        return orjson.dumps(head)[:-1] + b',"parts":[' + changed + b"]}"

    def zoomed(self, key: str, low: float, high: float) -> bytes | None:
        """Return as JSON one panel of the steps whose x lies between `low` and `high`; None if it has no such x."""
        axis = self._axes.get(key)
        if not axis:
            return None
        with self._turn:
            view = self._reader.view(time.time())
            found = panels([view.between(axis, low, high)])
        return next(_encode(panel) for panel in found if panel.key == key)

    def _follow(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            try:
                pause = self._look()
                self._problem = None
            except (RunLogError, OSError) as error:
                self._problem, pause = str(error), _LOOK_SECONDS
            except Exception as error:  # a page that stands still and does not say so would be worse
                self._problem, pause = f"The run cannot be drawn: {type(error).__name__}: {error}", _LOOK_SECONDS

    def _look(self) -> float:
        """Read some, draw what is due; return the seconds until the next look."""
        with self._turn:
            progress = self._reader.poll(_READ_BYTES)
            view = self._reader.view(time.time())
            self._standing = standing(self._run_dir, view, time.time())
            behind = self._read < progress.read < progress.total  # a torn last line stays unread
            self._read = progress.read
            self._reading = (progress.read, progress.total) if behind else None
            self._stale |= progress.changed
            waited = time.monotonic() - self._drawn
            due = waited >= max(_LOOK_SECONDS, self._cost / _DRAWING_SHARE)
            if (self._stale and due) or waited >= max(_REDRAW_SECONDS, self._cost / _DRAWING_SHARE):
                self._draw(view)
        if behind:
            return 0.005  # others want their turn
        return _IDLE_LOOK_SECONDS if time.monotonic() - self._asked > _IDLE_SECONDS else _LOOK_SECONDS

    def _draw(self, view: RunView) -> None:
        began = time.monotonic()
        found = panels([view])
        bodies = {panel.key: _encode(panel) for panel in found}
        for name, text in (("summary", summary_html([view])), ("details", details_html([view]))):
            bodies[f"#{name}"] = orjson.dumps({"key": name, "html": text})
        version, old = self._version + 1, self._parts
        same = {key for key, body in bodies.items() if key in old and old[key].body == body}
        if len(same) < len(bodies):
            self._parts = {key: old[key] if key in same else _Part(version, body) for key, body in bodies.items()}
            self._sections = panels_html(found)
            self._axes = {panel.key: panel.axis for panel in found}
            self._version = version
        self._drawn = time.monotonic()
        self._cost = self._drawn - began
        self._stale = False


class WatchServer(ThreadingHTTPServer):
    """Serves the page of one run; use as a context manager.

    Args:
        run_dir: the run's directory.
        port: to listen on; 0 for any free one.

    Attributes:
        token: what a request must bring.
        port: on which it listens.

    Raises:
        RunLogError: there is no such run directory.
        WatchError: the port is taken, or may not be used.
    """

    allow_reuse_port = False  # two pages on one port would answer by turns
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, run_dir: Path, port: int = 0) -> None:
        self.watcher = Watcher(run_dir)
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise WatchError(
                f"cannot listen on port {port}: {reason}; try --port {_free_port()}, which is free, or leave --port out"
            ) from error
        self.port: int = self.server_address[1]

    @property
    def url(self) -> str:
        """The page's address on this machine, and at the other end of a tunnel of the same port."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    def __enter__(self) -> WatchServer:
        threading.Thread(target=_prepare, daemon=True).start()
        self.watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server_close()
        self.watcher.close()

    def server_bind(self) -> None:
        """Bind without asking for this machine's name, which takes seconds where no name server answers."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a browser that goes away in the middle of an answer is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    timeout = _CONNECTION_SECONDS

    def do_GET(self) -> None:
        """Answer, or refuse."""
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if not _HERE.fullmatch(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.FORBIDDEN, "This page is served to 127.0.0.1 and localhost only.")
        elif not secrets.compare_digest(query.get("token", "").encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "Wrong token: open the address that `rookery watch` printed.")
        else:
            answer = _ANSWERS.get(url.path)
            found = None if answer is None else answer(self.server.watcher, query)
            if found is None:
                self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")
            else:
                self._send(HTTPStatus.OK, *found)

    def do_HEAD(self) -> None:
        """Answer as to GET, without the body."""
        self.do_GET()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what the base class cannot read, and methods that it finds no function for."""
        self.close_connection = True  # whatever else it brings stays unread
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "This server only shows: GET and HEAD.")
        else:
            self._refuse(HTTPStatus(code), message or "")

    def version_string(self) -> str:
        """Return what the `Server` header says: no versions to whoever knocks."""
        return "rookery"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Log nothing: the address holds the token."""

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, "text/plain; charset=utf-8", reason.encode() + b"\n")

    def _send(self, status: HTTPStatus, kind: str, body: bytes, packed: bytes | None = None) -> None:
        headers = getattr(self, "headers", None)  # there are none if the request could not be read
        pack = len(body) > 1000 and headers is not None and "gzip" in headers.get("Accept-Encoding", "")
        if pack:
            body = gzip.compress(body, 1, mtime=0) if packed is None else packed
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", _policy() if kind.startswith("text/html") else "default-src 'none'")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if pack:
            self.send_header("Content-Encoding", "gzip")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_Found = tuple[str, bytes] | tuple[str, bytes, bytes] | None
_JSON = "application/json"


def _page(watcher: Watcher, query: dict[str, str]) -> _Found:
    now, sections = watcher.shell()
    text = Template(asset("watch.html")).substitute(
        title=html.escape(f"{now.run} - Rookery"),
        heading=html.escape(now.run),
        state=html.escape(now.state),
        style=asset("report.css") + asset("watch.css"),
        sections=sections,
        script=_script(),
    )
    return "text/html; charset=utf-8", text.encode()


def _changes(watcher: Watcher, query: dict[str, str]) -> _Found:
    return _JSON, watcher.changes(query.get("have", ""))


def _zoomed(watcher: Watcher, query: dict[str, str]) -> _Found:
    try:
        low, high = float(query["low"]), float(query["high"])
    except (KeyError, ValueError):
        return None
    body = watcher.zoomed(query.get("key", ""), low, high)
    return None if body is None else (_JSON, body)


@cache
def _plotly() -> tuple[str, bytes, bytes]:
    script = plotly_script().encode()
    return "text/javascript; charset=utf-8", script, gzip.compress(script, 6, mtime=0)


_ANSWERS: dict[str, Callable[[Watcher, dict[str, str]], _Found]] = {
    "/": _page,
    "/changes": _changes,
    "/zoomed": _zoomed,
    "/plotly.js": lambda watcher, query: _plotly(),
}


def _prepare() -> None:
    """Do what the first request would otherwise wait for."""
    _policy()
    _plotly()


@cache
def _script() -> str:
    return asset("plots.js") + asset("watch.js")


@cache
def _policy() -> str:
    """Return the page's rules: two scripts, known by their checksums, that may ask nobody but this server."""
    return (
        f"default-src 'none'; script-src {checksum(_script())} {checksum(plotly_script())}; style-src 'unsafe-inline';"
        " img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _encode(panel: Panel) -> bytes:
    content = {
        "key": panel.key,
        "html": panel_html(panel),
        "traces": panel.traces,
        "layout": panel.layout,
        "axis": panel.axis,
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
