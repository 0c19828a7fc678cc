"""Alerts of a run: what is told, once, by whom."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.alerting.alerts import (
    KINDS,
    AlertsConfig,
    AlertSender,
    Notice,
    compose,
    notice_of_ending,
    notice_of_event,
)
from monitoring.alerting.channels import WebhookConfig
from monitoring.alerting.log import MOST_TRIES, AlertLog
from monitoring.alerting.watch import AlertWatch
from monitoring.errors import MonitorConfigError
from monitoring.runlog import RunLog, read_events
from pipeline.schema import to_dataclass
from tests.monitoring.alert_receivers import FINDING, WebServer, telling
from tests.monitoring.alert_receivers import told as read_told


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def _alert(**fields: Any) -> Any:
    return compose(Notice(id="i", key="k", fields={**FINDING, **fields}), "a run", Path("/runs/a"))


def test_the_example_of_the_manual_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    tree = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert to_dataclass(tree["monitor"]["alerts"], AlertsConfig).channels.keys() == {"command", "email", "webhook"}
    assert all(f"`{kind}`" in text for kind in KINDS)


def test_what_is_only_observed_or_not_wished_for_is_no_alert() -> None:
    config = AlertsConfig()
    assert notice_of_event(FINDING, config) is not None
    assert notice_of_event({**FINDING, "acted": False}, config) is None
    assert notice_of_event({**FINDING, "acted": False, "action": "warn"}, config) is not None
    assert notice_of_event({"kind": "checkpoint", "step": 1}, config) is None
    assert notice_of_event(FINDING, AlertsConfig(kinds=["rollback"])) is None
    assert notice_of_ending(1, {"exit_code": 0}, config) is None
    assert notice_of_ending(1, {"exit_code": 0}, AlertsConfig(kinds=["finished"])) is not None
    assert notice_of_ending(1, {"exit_code": 10}, config) is None
    assert notice_of_ending(1, {"exit_code": 1, "reason": "hang"}, config) is not None
    assert notice_of_ending(1, {"exit_code": 11}, config) is None, "the event before it tells it"
    assert notice_of_ending(1, {"exit_code": 11}, AlertsConfig(kinds=["ended"])) is not None


def test_an_alert_is_small_whatever_the_event_holds() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = {"a": deep, "b": ["y" * 10_000] * 1000}
    alert = _alert(evidence=deep, rule="z\0" * 10_000, **{f"field{n}": "w" * 10_000 for n in range(1000)})
    assert len(alert.text) < 50_000
    assert len(json.dumps(alert.fields)) < 100_000
    assert "\0" not in alert.text


def _log(run_dir: Path) -> RunLog:
    return RunLog.open(run_dir)


def test_rank_0_sends_once_and_a_login_node_and_a_restart_nothing_more(tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", AlertsConfig(command=telling(tmp_path))
    log = _log(run_dir)
    sender = AlertSender(config, run_dir, attempt=log.attempt, name="a run", on_event=log.event)
    log.listeners.append(sender)
    log.event("checkpoint", step=5)
    log.event(**FINDING)
    log.event(**(FINDING | {"step": 8}))  # within the cool-down
    log.event("rollback", from_step=9, to_step=5, reason="collapse")
    sender.close()
    log.close()
    assert [told["stdin"]["kind"] for told in read_told(tmp_path)] == ["finding", "rollback"]
    watch = AlertWatch(run_dir, "a run", config)
    assert watch.look().sent == watch.look().sent == []
    again = AlertSender(config, run_dir, attempt=1, name="a run", on_event=log.event)
    again.event({**FINDING, "attempt": 1})
    again.close()
    assert len(read_told(tmp_path)) == 2


def test_a_login_node_sends_what_the_job_could_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    log = _log(run_dir)
    broken = AlertsConfig(command=["/no/such/program"])
    sender = AlertSender(broken, run_dir, attempt=log.attempt, name="a run", on_event=log.event)
    log.listeners.append(sender)
    log.event(**FINDING)
    log.event(**(FINDING | {"step": 8}))
    sender.close()
    log.close()
    failed = [event for event in read_events(run_dir) if event["kind"] == "alert_failed"]
    assert [(event["channel"], "No such file" in event["reason"]) for event in failed] == [("command", True)]
    lines = (run_dir / "alerts.jsonl").read_text().replace(os.uname().nodename, "a-node")  # another host's tries
    (run_dir / "alerts.jsonl").write_text(lines)
    watch = AlertWatch(run_dir, "a run", AlertsConfig(command=telling(tmp_path)))
    assert watch.look().sent == ["1:finding:8:collapse by command"], "the newest of a kind stands for the others"
    assert watch.look().sent == []
    assert [told["stdin"]["step"] for told in read_told(tmp_path)] == [8]


def test_the_next_alert_says_how_many_were_left_out(tmp_path: Path) -> None:
    log = AlertLog(tmp_path)
    assert log.claim("a", "k", "c", 60.0) == 0
    log.settle("a", "k", "c", None)
    assert log.claim("b", "k", "c", 60.0) is None
    assert log.claim("c", "k", "c", 60.0) is None
    assert log.claim("d", "other", "c", 60.0) == 0
    assert AlertLog(tmp_path).claim("e", "k", "c", 0.0) == 2
    assert "2 more like it" in compose(Notice(id="e", key="k", fields=FINDING), "r", tmp_path, 2).text


def test_who_died_while_sending_does_not_silence_an_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AlertLog(tmp_path)
    assert log.claim("a", "k", "c", 60.0) == 0
    assert AlertLog(tmp_path).claim("a", "k", "c", 60.0) is None, "someone is sending it"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601.0)
    assert AlertLog(tmp_path).claim("a", "k", "c", 60.0) == 0


def test_a_channel_that_fails_is_tried_a_few_times_and_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, tries = time.time(), []
    monkeypatch.setattr(time, "time", lambda: now)
    for second in range(0, 7200, 30):
        now = time.time() + 30 if second else now
        monkeypatch.setattr(time, "time", lambda now=now: now)
        log = AlertLog(tmp_path)
        if log.claim("a", "k", "c", 1800.0) is not None:
            tries.append(second)
            log.settle("a", "k", "c", "no network")
    assert len(tries) == MOST_TRIES
    assert tries[1] >= 60
    assert tries[4] - tries[3] >= 2 * (tries[3] - tries[2]) - 60


def test_many_senders_at_once_send_one(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from monitoring.alerting.log import AlertLog\n"
        "log = AlertLog(Path(sys.argv[1])); time.sleep(max(0.0, float(sys.argv[2]) - time.time()))\n"
        "print(sum(log.claim(f'a{n}', f'k{n}', 'c', 60.0) is not None for n in range(50)))\n"
    )
    begin = time.time() + 2.0
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(begin)], stdout=-1, text=True)
        for _ in range(3)
    ]
    answers = [process.communicate()[0] for process in processes]
    assert sum(map(int, answers)) == 50


def test_a_full_disk_or_a_torn_line_does_not_silence(tmp_path: Path) -> None:
    (tmp_path / "alerts.jsonl").write_bytes(b'{"id": 3}\n{"id": "a", "key": "k", "chan')
    log = AlertLog(tmp_path)
    assert log.claim("a", "k", "c", 60.0) == 0
    missing = AlertLog(tmp_path / "missing")
    assert missing.claim("a", "k", "c", 60.0) == 0
    missing.settle("a", "k", "c", None)
    assert missing.claim("a", "k", "c", 60.0) is None, "this process remembers"


def test_the_sender_neither_waits_nor_raises_nor_starts_a_thread_for_nobody(tmp_path: Path, web: WebServer) -> None:
    before = threading.active_count()
    for config in (AlertsConfig(), AlertsConfig(webhook=WebhookConfig(url=web.url), from_job=False)):
        sender = AlertSender(config, tmp_path, attempt=1, name="a", on_event=lambda kind, **fields: None)
        sender.event({**FINDING})
        sender.close()
    assert threading.active_count() == before
    web.wait = 0.5
    config = AlertsConfig(webhook=WebhookConfig(url=web.url))
    sender = AlertSender(config, tmp_path, attempt=1, name="a", on_event=lambda kind, **fields: None)
    started = time.monotonic()
    sender.event({**FINDING})
    sender.ended(1, "a crash")
    assert time.monotonic() - started < 0.2
    sender.close()
    assert [content["kind"] for *_, content in web.posts] == ["finding", "ended"]


def test_a_login_node_tells_of_endings_and_of_silence_once(tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", AlertsConfig(command=telling(tmp_path))
    log = _log(run_dir)
    log.outcome(1, "hang: nothing moved")
    log.close()
    watch = AlertWatch(run_dir, "a run", config)
    found = watch.look()
    assert found.sent == ["1:ended by command"]
    assert found.pulse.alarm
    log = _log(run_dir)
    log.close()
    old = time.time() - 10_000.0
    for path in (run_dir / "attempts" / "0002", run_dir / "metrics" / "0002.jsonl"):
        os.utime(path, (old, old))
    assert watch.look().sent == ["2:None:None:silent by command"]
    assert AlertWatch(run_dir, "a run", config).look().sent == []
    assert [told["stdin"]["kind"] for told in read_told(tmp_path)] == ["ended", "silent"]


def test_what_happened_long_ago_is_told_nobody(tmp_path: Path) -> None:
    run_dir, config = tmp_path / "run", AlertsConfig(command=telling(tmp_path))
    log = _log(run_dir)
    log.event(**FINDING)
    log.close()
    events = run_dir / "events.jsonl"
    event = json.loads(events.read_text())
    events.write_text(json.dumps(event | {"time": event["time"] - 90_000.0}) + "\n")
    assert AlertWatch(run_dir, "a run", config).look().sent == []


def _rookery(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    code = "import typer, rookery.alerts; app = typer.Typer(); app.command()(rookery.alerts.alerts); app()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (env or {}),
    )


def test_the_command_reads_the_run_s_settings_and_its_exit_code_says_whether_an_alarm_stands(
    tmp_path: Path, web: WebServer
) -> None:
    run_dir = tmp_path / "run"
    log = _log(run_dir)
    log.close()
    (run_dir / "run.yaml").write_text(
        "name: mine\nmonitor:\n  alerts:\n    webhook: {url: env:HOOK}\n    kinds: [ended]\n"
    )
    alive = _rookery(str(run_dir), "--json", env={"HOOK": web.url})
    assert (alive.returncode, json.loads(alive.stdout)["pulse"]["state"]) == (0, "alive"), alive.stderr
    test = _rookery(str(run_dir), "--test", env={"HOOK": web.url})
    assert test.returncode == 0, test.stderr
    assert web.posts[-1][2]["run"] == "mine"
    (run_dir / "attempts" / "0001" / "outcome.json").write_text('{"exit_code": 1, "reason": "it broke"}')
    failed = _rookery(str(run_dir), f"monitor.alerts.command={json.dumps(telling(tmp_path))}")
    assert failed.returncode == 1
    assert "failed" in failed.stdout
    assert "sent 1:ended by command" in failed.stdout
    assert "not sent by webhook: env:HOOK: there is no secret" in failed.stdout


@pytest.mark.parametrize("command", [["False"], ["None"], []])
def test_a_command_of_what_is_no_text_is_refused(command: list[str]) -> None:
    with pytest.raises(MonitorConfigError, match=r"monitor\.alerts\.command: .*list"):
        AlertsConfig(command=command)
