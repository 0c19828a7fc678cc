"""The report file: self-contained, bounded, the same for the same runs, and never taken over by a run's text."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from monitoring.figures import panels
from monitoring.reading.run_reader import read_runs
from monitoring.report import write_report
from monitoring.runlog import RunLog, RunLogError
from tests.monitoring.sample_run import TOKENS_PER_STEP, build_long_run, build_run, evaluation, step_record

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def _write(runs: list[Path], out: Path) -> str:
    write_report(runs, out)
    return out.read_text()


def _figures(page: str) -> dict[str, Any]:
    packed = re.search(r'id="figures">([^<]*)<', page)
    assert packed
    figures: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return figures


def _traces(page: str, panel: str, name: str) -> list[dict[str, Any]]:
    return [trace for trace in _figures(page)[panel]["traces"] if trace["name"].startswith(name)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


class _Elements(HTMLParser):
    """Tags and attributes of a page, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in {"script", "style"}:
            self.text += data


def test_the_tables_tell_how_the_run_went(tmp_path: Path) -> None:
    text = _Elements(_write([build_run(tmp_path / "night-run")], tmp_path / "report.html")).text
    best = min(evaluation(100)["loss"].values())
    for expected in (
        "night-run",
        f"{100 * TOKENS_PER_STEP:,}",
        f"{step_record(100)['loss']:.4f}",
        f"{best:.4f} at r = 16, step 100",
        "killed",
        "51 to 100",
        "finished: reached step 100",
        "10 step records superseded by a later attempt or a rollback, 10 of them replayed: bitwise equal losses.",
        "step 50, changed {'train.steps': [60, 100]}",
        "seed: 0",
    ):
        assert expected in text


def test_the_loss_panel_shows_every_step_its_depth_and_what_was_replayed(tmp_path: Path) -> None:
    page = _write([build_run(tmp_path / "run")], tmp_path / "report.html")
    (dots,) = _traces(page, "loss", "step")
    (rings,) = _traces(page, "loss", "abandoned")
    assert [about[0] for about in dots["customdata"]] == list(range(1, 101))
    assert [about[1] for about in dots["customdata"]] == [sum(step_record(s)["num_steps"]) for s in range(1, 101)]
    assert {about[2] for about in dots["customdata"][50:]} == {2}
    assert [about[0] for about in rings["customdata"]] == list(range(51, 61))
    assert len(set(dots["marker"]["color"])) > 5
    (mark,) = _figures(page)["loss"]["layout"]["shapes"]
    assert mark["x0"] == 51 * TOKENS_PER_STEP


def test_the_newest_evaluation_gives_the_curves_over_depth_and_iterations(tmp_path: Path) -> None:
    page = _write([build_run(tmp_path / "run")], tmp_path / "report.html")
    newest = evaluation(100)
    lines = _traces(page, "loss-depth", "evaluation")
    assert lines[-1]["x"] == [1, 2, 4, 8, 16]
    assert lines[-1]["y"] == pytest.approx(list(newest["loss"].values()), rel=1e-5)
    assert lines[0]["customdata"][0] == [50]
    assert _figures(page)["loss-depth"]["layout"]["xaxis"]["type"] == "log"
    (residual,) = _figures(page)["residual"]["traces"]
    assert residual["x"] == list(range(1, 17))
    assert residual["y"] == pytest.approx(newest["relative_residual"], rel=1e-5)
    assert _figures(page)["residual"]["layout"]["yaxis"]["type"] == "log"


def test_a_probe_newer_than_every_evaluation_is_shown_instead(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run")
    (run_dir / "eval" / "step-00000100.json").unlink()
    (rms,) = _figures(_write([run_dir], tmp_path / "report.html"))["state-rms"]["traces"]
    assert rms["customdata"][0] == [100]
    assert "training probe" in rms["hovertemplate"]


def test_a_validation_of_the_loop_is_an_evaluation_where_there_is_no_other(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run", steps=120)
    for attempt in (run_dir / "metrics").glob("*.jsonl"):
        records = [json.loads(line) for line in attempt.read_text().splitlines()]
        for record in records:
            if record["step"] in (110, 120):
                record["validation"] = {"8": 2.5, "1": 3.0}
        attempt.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = _write([run_dir], tmp_path / "report.html")
    lines = _traces(page, "loss-depth", "evaluation")
    assert [line["customdata"][0] for line in lines] == [[110], [50], [120]]  # the newest comes last, over the others
    assert lines[-1]["x"] == [1, 2, 4, 8, 16]  # of step 120 it is the evaluation
    validated = next(line for line in lines if line["customdata"][0] == [110])
    assert (validated["x"], validated["y"]) == ([1, 8], [3.0, 2.5])
    assert "6.3000" in _Elements(page).text  # the unigram entropy, which validations do not know


def test_runs_overlay_and_are_told_apart_by_name(tmp_path: Path) -> None:
    runs = [build_run(tmp_path / "a" / "smoke"), build_run(tmp_path / "b" / "smoke", seed=1)]
    page = _write(runs, tmp_path / "report.html")
    for panel, figure in _figures(page).items():
        assert {trace["meta"] for trace in figure["traces"]} == {"a/smoke", "b/smoke"}, panel
        assert {trace["run"] for trace in figure["traces"]} == {"run-0", "run-1"}, panel
    assert "2 runs" in _Elements(page).text


@pytest.mark.parametrize(
    ("remove", "stated"),
    [
        ("eval", "No evaluation yet."),
        ("metrics", "No training step logged yet."),
        ("attempts", "killed"),
        ("events.jsonl", "No event yet."),
        ("run.yaml", "no run.yaml"),
    ],
)
def test_a_missing_part_is_a_stated_gap(tmp_path: Path, remove: str, stated: str) -> None:
    run_dir = build_run(tmp_path / "run")
    (run_dir / remove).rename(tmp_path / "removed")
    assert stated in _Elements(_write([run_dir], tmp_path / "report.html")).text


def _tear_evaluation(run_dir: Path) -> None:
    (run_dir / "eval" / "step-00000050.json").write_text('{"step": 50, "lo')


def _tear_log(run_dir: Path) -> None:
    path = run_dir / "metrics" / "0001.jsonl"
    path.write_bytes(b"garbage\n" + path.read_bytes()[:-20])


def _log_wrong_types(run_dir: Path) -> None:
    log = RunLog.open(run_dir)
    fields = ("loss", "grad_norm", "lr", "tokens", "tokens_per_second", "num_steps", "state_rms", "time")
    wrong: tuple[Any, ...] = (None, "text", [], {}, [None], True, -1, 0, 1e300)
    for step, value in enumerate(wrong, start=101):
        log.step({"step": step} | dict.fromkeys(fields, value))
    log.event("alarm", time_of_day=None)
    log.outcome(137, "")


def _log_no_finite_loss(run_dir: Path) -> None:
    log = RunLog.open(run_dir)
    log.step(step_record(1) | {"loss": float("nan"), "grad_norm": float("inf")})
    log.step({"step": 2})


@pytest.mark.parametrize(
    ("damage", "stated"),
    [
        (_tear_evaluation, "eval/step-00000050.json cannot be read as an evaluation"),
        (_tear_log, "1 unreadable line in the log skipped"),
        (_log_wrong_types, "crashed with exit code 137"),
        (_log_no_finite_loss, "still running, or killed"),
    ],
)
def test_damage_is_said_and_never_a_crash(tmp_path: Path, damage: Callable[[Path], None], stated: str) -> None:
    run_dir = build_run(tmp_path / "run")
    damage(run_dir)
    assert stated in _Elements(_write([run_dir], tmp_path / "report.html")).text


def test_a_loss_that_is_not_finite_is_marked_in_the_plot_and_the_table(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    log = RunLog.open(run_dir)
    for step in range(1, 20):
        log.step(step_record(step))
    log.step(step_record(20) | {"loss": float("nan")})
    page = _write([run_dir], tmp_path / "report.html")
    (marks,) = _traces(page, "loss", "not finite")
    assert [about[0] for about in marks["customdata"]] == [20]
    assert "nan" in _Elements(page).text


def test_an_exploding_loss_gets_a_logarithmic_axis(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path / "run")
    for step in range(1, 9):
        log.step(step_record(step) | {"loss": 10.0**step})
    page = _write([tmp_path / "run"], tmp_path / "report.html")
    assert _figures(page)["loss"]["layout"]["yaxis"]["type"] == "log"


def test_text_of_a_run_stays_text(tmp_path: Path) -> None:
    plain = _Elements(_write([build_run(tmp_path / "run")], tmp_path / "report.html")).tags
    run_dir = build_run(tmp_path / HOSTILE.replace("/", ""))
    log = RunLog.open(run_dir)
    fields = ("optimizer_rms", "nodes", "phases", "gradient_share", "validation", HOSTILE)
    named = {field: {HOSTILE: 1.5} for field in fields} | {"nodes": {HOSTILE: 1.5, "other": 1.0}}
    log.step(step_record(101) | named)
    log.event(HOSTILE, details=HOSTILE, nested={HOSTILE: [HOSTILE]})
    finding = dict.fromkeys(("detector", "rule", "action", "since", "evidence", "reason"), HOSTILE)
    log.event("finding", step=101, acted=True, **finding)
    log.event("rollback", from_step=101, **dict.fromkeys(("to_step", "branch", "detector", "reason"), HOSTILE))
    log.event("checkpoint", step=100, tier=HOSTILE, seconds=1.0)
    crash: dict[str, Any] = dict.fromkeys(("class", "kind", "summary", "host", "log", "last_steps"), HOSTILE)
    crash |= {"attempt": 1, "lines": [HOSTILE], "stacks": [{"rank": 0, "source": HOSTILE, "text": HOSTILE}]}
    (run_dir / "attempts" / "0001" / "crash.json").write_text(json.dumps(crash))
    log.outcome(1, HOSTILE)
    (run_dir / "run.yaml").write_text(HOSTILE)
    (run_dir / "eval" / f"step-{HOSTILE.replace('/', '')}.json").write_text("{")
    page = _write([run_dir], tmp_path / "report.html")
    elements = _Elements(page)
    # An unreadable evaluation, links to evidence, a caption.
    assert set(elements.tags) - set(plain) == {"ul", "li", "a", "sup"}
    assert elements.tags.count("script") == plain.count("script")
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert HOSTILE in elements.text
    assert "&lt;img" in _traces(page, "loss", "step")[0]["meta"]
    assert not [text for text in _strings(_figures(page)) if "<img" in text or "<script" in text]
    assert _figures(page)["nodes"]["traces"][0]["y"][0].startswith("&lt;/script&gt;&lt;script&gt;alert(1)")


def test_the_file_refers_to_nothing_outside_and_forbids_it(tmp_path: Path) -> None:
    page = _write([build_long_run(tmp_path / "run", steps=2000)], tmp_path / "report.html")
    elements = _Elements(page)
    assert "http:" not in page.lower()
    assert "https:" not in page.lower()
    assert "@import" not in page
    places = [value or "" for name, value in elements.attributes if name in {"src", "href", "action"}]
    assert [place for place in places if not place.startswith("#")] == ["data:,"]
    (policy,) = [value for _, value in elements.attributes if value and value.startswith("default-src")]
    assert policy.startswith("default-src 'none';")
    scripts = policy.split("script-src ")[1].split()
    assert len(scripts) == 2
    assert all(source.startswith("'sha256-") for source in scripts)


def test_a_long_comparison_stays_small_and_keeps_spikes(tmp_path: Path) -> None:
    runs = [tmp_path / f"run-{seed}" for seed in range(3)]
    for seed, run_dir in enumerate(runs):
        log = RunLog.open(run_dir)
        for step in range(1, 6001):
            log.step(step_record(step, seed) | ({"loss": 77.0 + seed} if step == 4321 else {}))
    page = _write(runs, tmp_path / "report.html")
    assert len(page) <= 5_000_000
    for figure in _figures(page).values():
        assert all(len(trace["x"]) <= 4000 for trace in figure["traces"])
    assert [max(trace["y"]) for trace in _traces(page, "loss", "step")] == [77.0, 78.0, 79.0]


def test_the_same_runs_give_the_same_file(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run", steps=20, killed_at=9, resumed_from=5)
    first = _write([run_dir], tmp_path / "one.html")
    assert _write([run_dir], tmp_path / "folder" / "two.html") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "one.html", "run"]


def test_bad_requests_name_the_place_and_leave_an_old_report_alone(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run", steps=20, killed_at=9, resumed_from=5)
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(RunLogError, match=r"no run directory .*nowhere"):
        write_report([run_dir, tmp_path / "nowhere"], out)
    with pytest.raises(RunLogError, match=r"run directory .*run is named twice"):
        write_report([run_dir, run_dir / ".." / "run"], out)
    with pytest.raises(RunLogError, match="at least one run directory"):
        write_report([], out)
    assert out.read_text() == "old"
    with pytest.raises(RunLogError, match=r"cannot write the report .*run.yaml.*choose another file"):
        write_report([run_dir], run_dir / "run.yaml" / "report.html")


def test_the_newest_attempt_of_a_run_may_still_be_running(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run", steps=20, killed_at=9, resumed_from=5)
    RunLog.open(run_dir)
    (view,) = read_runs([run_dir])
    endings = [attempt.ending for attempt in view.attempts]
    assert endings == ["killed", "finished: reached step 20", "still running, or killed"]


def test_a_step_of_many_depths_counts_each_of_them(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path / "run")
    log.step(step_record(1) | {"num_steps": [4, 4], "depths": {"3": 2, "9": 6}})
    log.step(step_record(2) | {"num_steps": [5, 4]})
    log.close()
    figures = _figures(_write([tmp_path / "run"], tmp_path / "report.html"))
    (bars,) = figures["depth-histogram"]["traces"]
    assert dict(zip(bars["x"], [about[0] for about in bars["customdata"]], strict=True)) == {3: 2, 9: 7}


def test_a_run_with_everything_fills_every_panel_and_groups_them(tmp_path: Path) -> None:
    (view,) = read_runs([build_long_run(tmp_path / "run", steps=2000)])
    drawn = panels([view])
    assert [panel.key for panel in drawn if not panel.traces] == []
    assert [group for group, _ in groupby(panel.group for panel in drawn)] == [
        "Loss",
        "Optimization",
        "Recurrence",
        "Time and machine",
    ]
    (tmp_path / "new" / "attempts").mkdir(parents=True)
    (empty,) = read_runs([tmp_path / "new"])
    assert [(panel.key, panel.traces) for panel in panels([empty])] == [(panel.key, []) for panel in drawn]


def test_skips_and_abandoned_steps_are_marked(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    log = RunLog.open(run_dir)
    for step in (*range(1, 31), *range(21, 41)):
        branch = int(log.waiting > 0 or (run_dir / "back").exists())
        log.step(step_record(step) | {"branch": branch} | ({"skipped": True} if step == 33 else {}))
        if step == 30:
            (run_dir / "back").touch()
    figures = _figures(_write([run_dir], tmp_path / "report.html"))
    (crosses,) = [trace for trace in figures["grad-norm"]["traces"] if trace["name"] == "skipped"]
    (grey,) = [trace for trace in figures["grad-norm"]["traces"] if trace["name"] == "abandoned"]
    assert (crosses["x"], grey["x"]) == ([33], list(range(21, 31)))


def test_heat_maps_show_every_iteration_and_the_highest_of_neighbouring_steps(tmp_path: Path) -> None:
    log = RunLog.open(tmp_path / "run")
    for step in range(1, 601):
        log.step({"step": step, "state_rms": [1.0, 1e4 if step == 301 else 1.0, float("inf")][: 2 + step % 2]})
    (heat,) = _figures(_write([tmp_path / "run"], tmp_path / "report.html"))["state-heat"]["traces"]
    assert heat["y"] == [1, 2, 3]
    assert len(heat["x"]) <= 240
    assert max(heat["z"][1]) == pytest.approx(4.0, abs=0.01)
    assert heat["z"][1].count(max(heat["z"][1])) == 1
    assert set(heat["z"][2]) == {None}


def test_an_incident_links_to_its_evidence(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run")
    log = RunLog.open(run_dir)
    evidence = {"token_correlation": [0.2, 0.97]}
    log.event("finding", step=90, detector="collapse", action="rollback", acted=False, rule="correlation > 0.95",
              value=0.97, threshold=0.95, since=80, evidence=evidence)  # fmt: skip
    page = _write([run_dir], tmp_path / "report.html")
    elements = _Elements(page)
    assert "correlation > 0.95: 0.97 against 0.95, since step 80 (rollback, not done)" in elements.text
    (link,) = [value for name, value in elements.attributes if name == "href" and value and value.startswith("#")]
    (block,) = re.findall(rf'<pre id="{link[1:]}">([^<]*)</pre>', page)
    assert json.loads(html.unescape(block))["evidence"] == evidence


def test_a_crash_report_is_shown_with_its_lines_and_stacks(tmp_path: Path) -> None:
    run_dir = build_run(tmp_path / "run")
    crash = {"attempt": 1, "class": "node lost", "summary": "node7 went away", "host": "node7", "lines": ["a", "b"]}
    crash |= {"stacks": [{"rank": 3, "source": "hang", "text": "in all_reduce"}], "last_steps": {"3": {"step": 60}}}
    (run_dir / "attempts" / "0001" / "crash.json").write_text(json.dumps(crash))
    text = _Elements(_write([run_dir], tmp_path / "report.html")).text
    for expected in (
        "attempt 1: node7 went away",
        "node lost",
        "last 2 lines",
        "in all_reduce",
        "last step of every rank",
    ):
        assert expected in text
