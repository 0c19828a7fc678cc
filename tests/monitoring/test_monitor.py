"""The monitor as the train loop uses it, on made-up series and on recorded runs that failed and that did not."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from monitoring.config import MonitorConfig
from monitoring.detectors import DetectorsConfig, build_detectors
from monitoring.errors import MonitorConfigError
from monitoring.monitor import Monitor
from monitoring.policy import DEFAULT_ACTIONS, Decision, PolicyConfig

CURVES = Path(__file__).parent / "curves"
MEAN = 8
Record = dict[str, Any]


def monitor(mode: str = "act", **policy: Any) -> Monitor:
    return Monitor(MonitorConfig(mode=mode, policy=PolicyConfig(**policy)), mean_recurrence=MEAN)


def curve(name: str) -> list[Record]:
    """Return the records of a recorded run; `curves/README.md` says which."""
    columns = json.loads((CURVES / f"{name}.json").read_text())
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def watch(records: list[Record], mode: str = "observe") -> list[Decision]:
    subject = monitor(mode)
    return [decision for record in records for decision in subject.after_step(record)]


def steady(step: int) -> Record:
    return {"step": step, "loss": 2.0 + 0.01 * (step % 9), "grad_norm": 1.0 + 0.01 * (step % 7), "num_steps": [4, 4]}


def test_every_detector_has_a_threshold_and_an_action() -> None:
    names = {detector.name for detector in build_detectors(DetectorsConfig(), MEAN)}
    assert names == {item.name for item in fields(DetectorsConfig)} == set(DEFAULT_ACTIONS)


def test_a_spike_is_vetoed_before_the_update_and_not_learnt() -> None:
    subject = monitor()
    for step in range(1, 201):
        assert subject.before_update(steady(step)) is None
        subject.after_step(steady(step))
    spike = {**steady(201), "loss": 5.0}
    veto = subject.before_update(spike)
    assert veto is not None
    assert veto.detector == "loss_spike"
    (decision,) = subject.after_step({**spike, "skipped": True})
    assert (decision.action, decision.acted, decision.finding.step) == ("skip", True, 201)
    assert subject.before_update({**spike, "step": 202}) is not None


@pytest.mark.parametrize("mode", ["observe", "none"])
def test_nothing_is_vetoed_unless_it_acts(mode: str) -> None:
    subject = monitor(mode)
    assert subject.before_update({"step": 1, "loss": math.nan}) is None
    decisions = subject.after_step({"step": 1, "loss": math.nan})
    assert [(each.action, each.acted) for each in decisions] == ([("skip", False)] if mode == "observe" else [])


def test_an_action_off_switches_a_detector_off() -> None:
    subject = monitor(actions={"straggler": "ignore"})
    slow = {"slowest": {"rank": 1, "host": "b", "ratio": 2.0}}
    assert not [each for step in (50, 100, 150) for each in subject.after_step({"step": step, **slow})]
    assert "straggler" not in subject.state()


def test_a_restart_goes_on_as_if_there_had_been_none() -> None:
    records = curve("collapse")
    cut = len(records) // 2
    straight = watch(records)
    first, second = monitor("observe"), monitor("observe")
    decisions = [each for record in records[:cut] for each in first.after_step(record)]
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)) | {"a_detector_of_another_time": {}})
    second.remember([{"kind": "finding", "action": each.action, **each.finding.to_dict()} for each in decisions])
    decisions += [each for record in records[cut:] for each in second.after_step(record)]
    assert {each.finding.detector for each in decisions} == {each.finding.detector for each in straight}
    assert [each for each in straight if each.action != "rollback" and each not in decisions] == []


def collapsed(step: int) -> Record:
    return {**steady(step), "token_correlation": 0.99, "effective_rank": 1.2}


def test_what_was_found_and_not_acted_on_before_a_restart_is_found_again() -> None:
    first, second = monitor(), monitor()
    decisions = [each for step in (200, 210) for each in first.after_step(collapsed(step))]
    assert [each.action for each in decisions] == ["rollback"]
    second.restore(json.loads(json.dumps(first.state())))
    found = [{"kind": "finding", "action": each.action, "acted": True, **each.finding.to_dict()} for each in decisions]
    second.remember([*found, {"kind": "start", "step": 210}])
    (again,) = second.after_step(collapsed(220))
    assert (again.action, again.finding.since) == ("rollback", 200)


def test_a_checkpoint_without_a_detectors_state_makes_it_start_anew() -> None:
    subject, fresh = monitor(), monitor()
    for step in range(1, 120):
        subject.after_step(collapsed(step))
    assert subject.suspects() == ["degenerate", "collapse"]
    spike = fresh.state()["loss_spike"]
    subject.restore({"loss_spike": spike})
    assert subject.state() == fresh.state()
    assert subject.suspects() == []


def level(step: int, loss: float) -> Record:
    return {**steady(step), "loss": loss + 0.01 * (step % 9)}


def train(subject: Monitor, steps: range, loss: float) -> tuple[int, list[Decision]]:
    """Return how many of the steps were vetoed, and what was decided but for skips, up to a rollback."""
    vetoes, decisions = 0, []
    for step in steps:
        record = level(step, loss)
        vetoed = subject.before_update(record) is not None
        vetoes += vetoed
        made = subject.after_step({**record, "skipped": True} if vetoed else record)
        decisions += [each for each in made if each.action != "skip"]
        if any(each.action in ("rollback", "stop") for each in made):
            break
    return vetoes, decisions


def test_a_planned_change_of_the_losss_level_is_learnt() -> None:
    subject = monitor()
    assert train(subject, range(1, 301), 2.0) == (0, [])
    subject.relearn()
    assert train(subject, range(301, 901), 2.6) == (0, [])
    assert subject.before_update(level(901, 4.0)) is not None  # and then they see again
    train(subject, range(901, 903), 4.0)  # two skips that count no more
    subject.relearn()
    none = {**level(903, 4.0), "loss": math.nan, "skipped": True}
    assert [each.action for each in subject.after_step(none)] == ["skip"]
    assert set(subject.state()) == set(monitor().state())


def test_a_change_of_the_losss_level_that_nobody_planned_costs_one_rollback() -> None:
    subject = monitor()
    train(subject, range(1, 301), 2.0)
    saved = subject.state()
    vetoes, (rollback,) = train(subject, range(301, 901), 2.6)
    assert (vetoes, rollback.action, rollback.vital) == (3, "rollback", False)
    subject.restore(saved)
    subject.remember([{"kind": "rollback", "from_step": 303, "to_step": 250}])
    vetoes, (warning,) = train(subject, range(251, 901), 2.6)
    assert (vetoes, warning.action, warning.new_level) == (3, "warn", True)


def test_a_step_without_targets_is_not_judged() -> None:
    subject = monitor()
    train(subject, range(1, 201), 2.0)
    before = subject.state()
    for step, empty in ((201, {"loss": None, "grad_norm": None}), (202, {})):
        record = {"step": step, "num_steps": [4, 4], **empty}
        assert subject.before_update(record) is None
        assert subject.after_step(record) == []
    assert subject.state() == before


def test_a_checkpoint_made_while_a_condition_holds_is_suspect() -> None:
    subject = monitor("observe")
    subject.after_step({"step": 10, "contraction": 1.3, "relative_residual": [0.4] * MEAN})
    assert subject.suspects() == ["not_contracting"]
    subject.after_step({"step": 20, "contraction": 0.4, "relative_residual": [0.001] * MEAN})
    assert subject.suspects() == []


def test_a_collapse_is_announced_at_least_ten_steps_ahead() -> None:
    records = curve("collapse")
    collapsed = next(record["step"] for record in records if record.get("token_correlation", 0.0) > 0.95)
    first = watch(records)[0]
    assert first.finding.detector == "not_contracting"
    assert first.finding.step <= collapsed - 10
    rollback = next(each for each in watch(records) if each.action == "rollback")
    assert rollback.before is not None
    assert rollback.before < first.finding.since


def test_a_recurrence_that_is_ignored_is_said_and_nothing_is_rolled_back() -> None:
    decisions = watch(curve("ignored"))
    assert "ignored" in {each.finding.detector for each in decisions}
    assert {each.action for each in decisions} <= {"warn", "shorten"}


def test_an_explosion_of_the_state_is_seen_before_the_numbers_end() -> None:
    records = curve("explosion")
    decisions = watch(records)
    ends = next(each.finding.step for each in decisions if each.finding.detector == "non_finite")
    assert min(each.finding.step for each in decisions if each.action == "rollback") <= ends - 10


def test_a_healthy_run_raises_no_alarm() -> None:
    for name in ("healthy", "healthy-fast"):
        assert not watch(curve(name)), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "acts"}, r"monitor\.mode: 'acts' is not one of act, observe, none"),
        ({"probe_every": 0}, r"monitor\.probe_every: 0 is not positive"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MonitorConfigError, match=message):
        MonitorConfig(**settings)
