"""A headless Chromium driven over its debugging pipe: no driver program, no port, no third-party client."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1280,2400",
)


class Browser:
    """One page of a browser of its own.

    Attributes:
        requests: URLs that were asked for since the newest `open`, answered or not.
        answers: HTTP status of what was answered since then, by URL.
        complaints: errors, uncaught exceptions and refusals that the browser logged since then.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.requests: list[str] = []
        self.answers: dict[str, int] = {}
        self.complaints: list[str] = []
        commands_in, commands = os.pipe()
        answers, answers_out = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4; high duplicates keep the two apart until exec.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (commands_in, answers_out)]

        def place_descriptors() -> None:
            for target, descriptor in enumerate(theirs, start=3):
                os.dup2(descriptor, target)

        self._process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=place_descriptors,  # noqa: PLW1509 - no thread runs here
        )
        for descriptor in (commands_in, answers_out, *theirs):
            os.close(descriptor)
        self._commands, self._answers = commands, answers
        self._unread = b""
        self._last_id = 0
        self._session: str | None = None
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while True:
            answer = self._next_message(deadline)
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression (of its promise) in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until the expression is true in the page."""
        deadline = time.monotonic() + 30
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} did not become true; the browser says {self.complaints}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Load a page and wait for its load event."""
        self.requests.clear()
        self.answers.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def pretend(self, scheme: str = "light", width: int = 1280, height: int = 2400) -> None:
        """Show pages to somebody who prefers "light" or "dark", on a screen of that many CSS pixels."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        mobile = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place and let it go at another, CSS pixels from the top left of the window."""
        places = {"mouseMoved": start, "mousePressed": start}, {"mouseMoved": end, "mouseReleased": end}
        for kind, (x, y) in (pair for place in places for pair in place.items()):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def picture(self) -> bytes:
        """Return what is on the screen as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse there, CSS pixels from the top left of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _next_message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            chunk = os.read(self._answers, 1 << 20)
            assert chunk, "the browser ended"
            self._unread += chunk
        message, self._unread = self._unread.split(b"\0", 1)
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Network.responseReceived":
            self.answers[params["response"]["url"]] = params["response"]["status"]
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
