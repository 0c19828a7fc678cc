"""The live page of a long run in a headless browser: from opening it to its first paint, and to its curves.

The server has just begun to read ("cold"), or has read all before ("warm"). Needs Debian's chromium.
    python -m benchmarks.watch --steps 100000
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments, machine, median, publish
from monitoring.watch import WatchServer
from tests.monitoring.browser import Browser
from tests.monitoring.sample_run import build_long_run

PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
CURVES = "performance.getEntriesByName('curves')[0]?.startTime ?? 0"
READ = "document.getElementById('reading').hidden"
COLUMNS = ("first paint", "first curves", "log read and drawn")


def main() -> None:
    options = arguments(__doc__ or "", steps=100_000, rounds=5)
    chromium = shutil.which("chromium")
    assert chromium is not None, "no chromium on PATH (Debian: apt-get install chromium)"
    found: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        run = build_long_run(Path(name) / "run", steps=options.steps)
        size = sum(path.stat().st_size for path in (run / "metrics").iterdir())
        browser = Browser(chromium, Path(name) / "profile")
        for _ in range(options.rounds):
            with WatchServer(run) as server:
                thread = threading.Thread(target=server.serve_forever, args=(0.02,))
                thread.start()
                found["cold"].append(measure(browser, server))
                found["warm"].append(measure(browser, server))
                browser.open("about:blank")
                server.shutdown()
                thread.join()
        browser.close()
    columns = {case: zip(*rounds, strict=True) for case, rounds in found.items()}
    rows = [[case, *(f"{median(column):.2f}" for column in each)] for case, each in columns.items()]
    record: dict[str, Any] = {"steps": options.steps, "log_mb": round(size / 1e6), "seconds": found}
    title = f"Seconds on the live page of a run of {options.steps:,} steps ({size / 1e6:.0f} MB of log)"
    publish(options.out, title, ["server", *COLUMNS], rows, record | {"machine": machine("plotly")})


def measure(browser: Browser, server: WatchServer) -> list[float]:
    """Return the seconds from opening the page to each of COLUMNS."""
    began = time.monotonic()
    browser.open(server.url)
    browser.wait_for(f"({PAINT}) > 0 && ({CURVES}) > 0 && {READ}")
    read = time.monotonic() - began
    return [browser.evaluate(PAINT) / 1e3, browser.evaluate(CURVES) / 1e3, read]


if __name__ == "__main__":
    main()
