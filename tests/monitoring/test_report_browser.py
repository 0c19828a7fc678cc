"""The report in a real browser: it draws, it stays silent, it follows the person's colours and clicks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring.report import write_report
from tests.monitoring.browser import Browser
from tests.monitoring.sample_run import build_long_run, build_run

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")

# What runs with few probes show, alone and side by side.
PANELS = ("loss", "loss-buckets", "validation", "loss-depth", "depth-histogram", "grad-norm", "learning-rate",
          "state-rms", "residual", "throughput", "checkpoints")  # fmt: skip
HOSTILE = "<img src=x onerror='document.documentElement.dataset.owned=1'>"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(started: Browser) -> Browser:
    started.pretend()
    started.point_at(0, 0)
    return started


def _open_report(browser: Browser, runs: list[Path], out: Path) -> None:
    write_report(runs, out)
    browser.open(out.as_uri())
    browser.wait_for("document.documentElement.dataset.plots !== undefined")
    failure = browser.evaluate("document.getElementById('failure').textContent")
    assert (browser.evaluate("document.documentElement.dataset.plots"), failure) == ("drawn", "")


def _marks(browser: Browser, panel: str) -> int:
    """Lines, dots and bars that are drawn with an extent inside the panel."""
    shapes = f"document.querySelectorAll('#plot-{panel} .trace path')"
    extents = "path => path.getBBox().width + path.getBBox().height > 0"
    count = browser.evaluate(f"[...{shapes}].filter({extents}).length")
    assert isinstance(count, int)
    return count


def test_every_panel_is_drawn_and_no_request_leaves(browser: Browser, tmp_path: Path) -> None:
    _open_report(browser, [build_run(tmp_path / "night-run")], tmp_path / "report.html")
    assert {panel: _marks(browser, panel) > 0 for panel in PANELS} == dict.fromkeys(PANELS, True)
    assert _marks(browser, "loss") >= 100 + 10 + 1  # a dot per step, a ring per replayed step, the mean
    # Heat maps are pictures that the page makes itself.
    asked = [url for url in browser.requests if not url.startswith("data:image/png;")]
    assert asked == [(tmp_path / "report.html").as_uri()]
    assert browser.complaints == []


def test_a_long_run_is_drawn_whole_in_a_small_file(browser: Browser, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    _open_report(browser, [build_long_run(tmp_path / "long", steps=20_000)], out)
    assert out.stat().st_size <= 5_000_000
    drawn = browser.evaluate("[...document.querySelectorAll('.panel .plot')].map(plot => plot.id.slice(5))")
    heats = {"state-heat", "residual-heat", "nodes"}
    assert heats < set(drawn)
    assert {key for key in set(drawn) - heats if not _marks(browser, key)} == set()
    images = "document.querySelectorAll('#plot-{} .heatmaplayer image').length"
    assert [browser.evaluate(images.format(key)) for key in sorted(heats)] == [1, 1, 1]
    assert browser.evaluate("document.querySelectorAll('.panel .gap').length") == 0
    assert browser.complaints == []
    browser.evaluate("document.querySelector('.incidents a').click()")
    browser.wait_for("document.querySelector('pre:target')?.checkVisibility() === true")


def test_the_browser_itself_forbids_the_report_any_request(browser: Browser, tmp_path: Path) -> None:
    _open_report(browser, [build_run(tmp_path / "run")], tmp_path / "report.html")
    outside = "http://127.0.0.1:9/outside"
    assert browser.evaluate(f"fetch('{outside}').then(() => 'sent', () => 'refused')") == "refused"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
    assert outside not in browser.requests


def test_the_checks_above_see_a_page_that_does_load_something(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><img src='http://127.0.0.1:9/outside.png'>")
    browser.open(page.as_uri())
    assert "http://127.0.0.1:9/outside.png" in browser.requests


def test_the_plots_follow_the_colour_scheme(browser: Browser, tmp_path: Path) -> None:
    def background() -> tuple[int, int]:
        """Brightness of the page and of the plot on it."""
        page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        plot = browser.evaluate("getComputedStyle(document.querySelector('#plot-loss .main-svg')).backgroundColor")
        page_light, plot_light = (sum(map(int, colour[4:-1].split(","))) // 3 for colour in (page, plot))
        return page_light, plot_light

    _open_report(browser, [build_run(tmp_path / "run")], tmp_path / "report.html")
    assert min(background()) > 200
    browser.pretend(scheme="dark")
    browser.wait_for(
        "getComputedStyle(document.querySelector('#plot-residual .main-svg')).backgroundColor === 'rgb(25, 31, 39)'"
    )
    assert max(background()) < 60


def test_a_click_hides_a_run_in_all_panels_and_another_shows_it(browser: Browser, tmp_path: Path) -> None:
    runs = [build_run(tmp_path / "first"), build_run(tmp_path / "second", seed=1)]
    _open_report(browser, runs, tmp_path / "report.html")
    both = {panel: _marks(browser, panel) for panel in PANELS}
    browser.evaluate("document.querySelector('[data-run=run-1]').click()")
    browser.wait_for("document.querySelectorAll('#plot-checkpoints .trace').length === 1")
    assert all(0 < _marks(browser, panel) < both[panel] for panel in PANELS)
    browser.evaluate("document.querySelector('[data-run=run-1]').click()")
    browser.wait_for("document.querySelectorAll('#plot-checkpoints .trace').length === 2")
    assert {panel: _marks(browser, panel) for panel in PANELS} == both


def test_pointing_at_a_dot_tells_its_depth_and_run_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    name = f"%{{x}} {HOSTILE} &amp;"
    _open_report(browser, [build_run(tmp_path / name, steps=10, killed_at=3, resumed_from=2)], tmp_path / "report.html")
    dots = "[...document.querySelectorAll('#plot-loss .points path')]"
    # Of all dots the rightmost: nothing but the end of the mean is near it.
    place = browser.evaluate(f"{dots}.map(p => p.getBoundingClientRect()).map(b => [b.x + b.width / 2, b.y]).sort()")
    x, y = max(place)
    browser.point_at(x, y)
    browser.wait_for("document.querySelector('#plot-loss .hoverlayer text') !== null")
    label = browser.evaluate("document.querySelector('#plot-loss .hoverlayer').textContent")
    assert name in label
    assert "r = " in label or "mean of" in label
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.documentElement.dataset.owned") is None
    assert browser.evaluate("document.querySelector('h1').textContent") == name


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen(browser: Browser, tmp_path: Path, width: int) -> None:
    browser.pretend(width=width)
    runs = [build_run(tmp_path / "first"), build_run(tmp_path / "second-with-a-name-that-is-quite-long", seed=1)]
    _open_report(browser, runs, tmp_path / "report.html")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    widths = browser.evaluate("[...document.querySelectorAll('.plot')].map(plot => plot.clientWidth)")
    assert len(widths) >= len(PANELS)
    assert min(widths) >= 300


def test_a_run_without_anything_yet_is_a_page_of_stated_gaps(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "new" / "attempts").mkdir(parents=True)
    _open_report(browser, [tmp_path / "new"], tmp_path / "report.html")
    gaps = browser.evaluate("[...document.querySelectorAll('.panel .gap')].map(gap => gap.innerText)")
    assert len(gaps) > 20
    assert browser.evaluate("document.querySelectorAll('.plot').length") == 0
    assert "No evaluation yet." in gaps
    assert browser.complaints == []
