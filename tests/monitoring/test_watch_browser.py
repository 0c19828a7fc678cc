"""The live page in a real browser: it draws, it grows, it asks nobody but its server, it says what it lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring.runlog import RunLog
from monitoring.watch import WatchServer
from tests.monitoring.browser import Browser
from tests.monitoring.sample_run import build_run, step_record
from tests.monitoring.test_watch import serving, write_steps

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")

HOSTILE = "<img src=x onerror='document.documentElement.dataset.owned=1'>"
DRAWN = "document.documentElement.dataset.plots === 'drawn'"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    started.pretend(height=700)
    started.point_at(0, 0)
    yield started
    started.open("about:blank")  # so that no page goes on asking


def shown(browser: Browser, id_: str) -> str:
    return str(browser.evaluate(f"(e => e && !e.hidden ? e.innerText : '')(document.getElementById('{id_}'))"))


def marks(browser: Browser, panel: str) -> int:
    count = browser.evaluate(f"document.querySelectorAll('#plot-{panel} .trace path').length")
    assert isinstance(count, int)
    return count


def origin(server: WatchServer) -> str:
    return f"http://127.0.0.1:{server.port}/"


def test_a_run_that_begins_is_drawn_and_grows_without_a_reload(browser: Browser, tmp_path: Path) -> None:
    run = tmp_path / f"run {HOSTILE}"
    (run / "attempts").mkdir(parents=True)
    with serving(run) as server:
        browser.open(server.url)
        browser.evaluate("window.stillTheSamePage = true")
        browser.wait_for("document.getElementById('standing').innerText.includes('empty')")
        browser.wait_for("document.getElementById('panel-loss').innerText.includes('No training step logged yet')")

        log = RunLog.open(run)
        for step in range(1, 100):
            log.step(step_record(step))
        browser.wait_for("document.querySelectorAll('#plot-loss .trace path').length > 0")
        before = marks(browser, "loss")
        log.step(step_record(100) | {"loss": 3.25})
        browser.wait_for("document.getElementById('standing').innerText.includes('3.2500')")
        browser.wait_for(f"document.querySelectorAll('#plot-loss .trace path').length > {before}")

        assert marks(browser, "throughput") == 0  # plots below the screen wait
        browser.evaluate("document.getElementById('plot-throughput').scrollIntoView()")
        browser.wait_for("document.querySelectorAll('#plot-throughput .trace path').length > 0")

        assert browser.evaluate("window.stillTheSamePage")
        assert (shown(browser, "failure"), shown(browser, "lost"), browser.complaints) == ("", "", [])
        assert all(url.startswith(origin(server)) for url in browser.requests), browser.requests
        assert browser.evaluate("document.documentElement.dataset.owned") is None
        assert browser.evaluate("document.querySelectorAll('img').length") == 0
        assert HOSTILE in browser.evaluate("document.querySelector('h1').textContent")
        log.close()


def test_the_browser_itself_forbids_the_page_any_other_request(browser: Browser, tmp_path: Path) -> None:
    with serving(build_run(tmp_path / "run")) as server:
        browser.open(server.url)
        outside = "http://127.0.0.1:9/outside"
        assert browser.evaluate(f"fetch('{outside}').then(() => 'sent', () => 'refused')") == "refused"
        assert any("Content Security Policy" in complaint for complaint in browser.complaints)
        script = "Object.assign(document.createElement('script'), {text: 'window.x = 1'})"
        browser.evaluate(f"document.head.append({script})")
        assert browser.evaluate("window.x === undefined")


def test_a_wrong_token_gets_403_and_nothing_of_the_run(browser: Browser, tmp_path: Path) -> None:
    with serving(build_run(tmp_path / "night-run")) as server:
        for url in (f"{origin(server)}?token=wrong", origin(server)):
            browser.open(url)
            assert browser.answers[url] == 403
            assert "night-run" not in browser.evaluate("document.documentElement.innerText")


def test_a_server_that_goes_away_is_said_and_found_again(browser: Browser, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    with serving(run) as server:
        browser.open(server.url)
        browser.wait_for(DRAWN)
        port, token = server.port, server.token
    browser.wait_for("document.getElementById('lost').innerText.startsWith('Lost the server since')")
    assert marks(browser, "loss") > 0
    with serving(run, port, token):
        browser.wait_for("document.getElementById('lost').hidden")


def test_what_was_zoomed_into_stays_when_new_steps_come(browser: Browser, tmp_path: Path) -> None:
    run = write_steps(tmp_path / "run", 20_000)
    with serving(run) as server:
        browser.open(server.url)
        browser.wait_for(DRAWN)
        browser.wait_for("document.querySelector('#plot-loss .nsewdrag') !== null")
        browser.evaluate("document.getElementById('plot-loss').scrollIntoView()")
        area = "document.querySelector('#plot-loss .nsewdrag').getBoundingClientRect()"
        left, top, width, height = browser.evaluate(f"(b => [b.x, b.y, b.width, b.height])({area})")
        zoomed = "document.getElementById('plot-loss').layout.xaxis.range"
        shown = (
            "(p => Math.max(...p.data.map(t => t.x.filter(x => x >= p.layout.xaxis.range[0]"
            " && x <= p.layout.xaxis.range[1]).length)))(document.getElementById('plot-loss'))"
        )
        browser.drag((left + 0.50 * width, top + height / 2), (left + 0.55 * width, top + height / 2))
        browser.wait_for(f"{zoomed}[1] - {zoomed}[0] < 2000")
        browser.wait_for(f"{shown} > 900")  # every step of these
        seen = browser.evaluate(zoomed)
        with (run / "metrics" / "0001.jsonl").open("a") as file:
            file.write('{"step": 20001, "tokens": 20001, "loss": 3.0}\n')
        browser.wait_for("document.getElementById('standing').innerText.includes('20,001')")
        assert browser.evaluate(zoomed) == seen


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
def test_the_page_fits_the_screen(browser: Browser, tmp_path: Path, scheme: str, width: int) -> None:
    with serving(build_run(tmp_path / "run-with-a-name-that-is-quite-long-for-a-telephone")) as server:
        browser.pretend(scheme=scheme, width=width, height=700)
        browser.open(server.url)
        browser.wait_for(DRAWN)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)")
        assert (int(background[0]) > 200) == (scheme == "light")


def test_a_hundred_thousand_steps_paint_within_a_second(browser: Browser, tmp_path: Path) -> None:
    with serving(write_steps(tmp_path / "run", 100_000)) as server:
        browser.open(server.url)
        paint = "performance.getEntriesByName('first-contentful-paint')"
        browser.wait_for(f"{paint}.length > 0")
        assert browser.evaluate(f"{paint}[0].startTime") < 1000
        assert "run" in browser.evaluate("document.querySelector('h1').innerText")
