"""Who gets alerts in the tests: a mail server, a web server and a command on this machine."""

import json
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar, cast

SECRET = "s3cret-token"
FINDING: dict[str, Any] = {
    "kind": "finding",
    "step": 7,
    "detector": "collapse",
    "action": "rollback",
    "acted": True,
    "rule": "too alike",
}
_Server = TypeVar("_Server", bound=socketserver.BaseServer)


class MailServer(socketserver.ThreadingTCPServer):
    """Takes mails as a server does that offers neither encryption nor login."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _MailSession)
        self.mails: list[tuple[list[str], EmailMessage]] = []
        self.refuses = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _MailSession(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server, recipients = cast(MailServer, self.server), list[str]()
        self.wfile.write(b"220 here\r\n")
        for line in self.rfile:
            word = line.strip().upper()
            if word.startswith(b"RCPT"):
                recipients.append(line.decode().split("<")[1].split(">")[0])
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = []
                while (text := self.rfile.readline()) != b".\r\n":
                    lines.append(text.removeprefix(b"."))
                message = message_from_bytes(b"".join(lines), policy=policy.default)
                server.mails.append((recipients, message))
            if word == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            refused = server.refuses and word.startswith(b"MAIL")
            self.wfile.write(f"550 {SECRET} is not welcome\r\n".encode() if refused else b"250 ok\r\n")


class WebServer(ThreadingHTTPServer):
    """Keeps what is posted to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _WebSession)
        self.posts: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer = 204
        self.wait = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


class _WebSession(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = cast(WebServer, self.server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(server.wait)
        server.posts.append((self.path, dict(self.headers), json.loads(body)))
        self.send_response(server.answer)
        if server.answer == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *args: object) -> None:
        """Not into the output of the tests."""


@contextmanager
def serving(server: _Server) -> Iterator[_Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def telling(folder: Path) -> list[str]:
    """A program that appends what it is told to a file."""
    script = folder / "tell.py"
    script.write_text(
        "import json, os, sys\n"
        "told = {'stdin': json.load(sys.stdin), 'env': {k: v for k, v in os.environ.items() if k.startswith('ROOK')},"
        " 'args': sys.argv[2:]}\n"
        "open(sys.argv[1], 'a').write(json.dumps(told) + '\\n')\n"
    )
    return [sys.executable, "-I", str(script), str(folder / "told.jsonl"), "; exit 3"]


def told(folder: Path) -> list[dict[str, Any]]:
    path = folder / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
