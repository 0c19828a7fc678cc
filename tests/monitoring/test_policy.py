"""What is done about findings: the table, escalation within bounds, cool-down, and the memory that events rebuild."""

from __future__ import annotations

import json
from typing import Any

import pytest

from monitoring.detectors import Finding
from monitoring.errors import MonitorConfigError
from monitoring.policy import DEFAULT_ACTIONS, Decision, Policy, PolicyConfig


def finding(detector: str, step: int, since: int | None = None, horizon: int = 20) -> Finding:
    return Finding(
        detector=detector,
        step=step,
        since=step if since is None else since,
        value=2.0,
        threshold=1.0,
        horizon=horizon,
        rule="a rule",
    )


def policy(observe_only: bool = False, **settings: Any) -> Policy:
    return Policy(PolicyConfig(**settings), observe_only=observe_only)


def decide(subject: Policy, step: int, *detectors: str, skipped: bool = False) -> list[str]:
    findings = [finding(name, step) for name in detectors]
    return [decision.action for decision in subject.decide(step, findings, skipped=skipped)]


def events(decisions: list[Decision], to_step: int) -> list[dict[str, Any]]:
    """Return what the train loop writes down of decisions that it has carried out."""
    written: list[dict[str, Any]] = []
    for decision in decisions:
        found = decision.finding
        written.append({"kind": "finding", "action": decision.action, "acted": decision.acted, **found.to_dict()})
        if decision.action == "skip":
            written.append({"kind": "skip", "step": found.step, "detector": found.detector})
        if decision.action == "rollback":
            written.append({"kind": "rollback", "from_step": found.step, "to_step": to_step})
    return written


def test_the_table_says_what_is_done_and_a_report_is_not_repeated() -> None:
    subject = policy(actions={"ignored": "stop", "throughput": "ignore"})
    assert decide(subject, 100, "straggler", "not_contracting", "ignored") == ["warn", "shorten", "stop"]
    assert decide(subject, 149, "straggler", "not_contracting", "ignored") == []
    assert decide(subject, 150, "straggler") == ["warn"]


def test_a_shorter_checkpoint_interval_has_an_end() -> None:
    (decision,) = policy().decide(100, [finding("dead_core", 100)], skipped=False)
    assert (decision.factor, decision.until, decision.acted) == (4, 300, True)


def test_three_skips_in_twenty_steps_roll_back_and_blame_the_data_first() -> None:
    subject = policy()
    assert decide(subject, 100, "non_finite", skipped=True) == ["skip"]
    assert decide(subject, 110, "loss_spike", skipped=True) == ["skip"]
    skip, rollback = subject.decide(119, [finding("non_finite", 119, horizon=8)], skipped=True)
    assert (skip.action, rollback.action) == ("skip", "rollback")
    assert (rollback.before, rollback.fallback, rollback.skip_steps) == (92, 99, 20)
    assert (rollback.rate_factor, rollback.rewarm_steps, rollback.vital) == (1.0, 0, True)


def test_skips_that_lie_apart_stay_skips() -> None:
    subject = policy()
    assert [decide(subject, step, "non_finite", skipped=True) for step in (100, 110, 120, 130)] == [["skip"]] * 4


def test_a_veto_of_another_rank_counts() -> None:
    subject = policy()
    assert [decide(subject, step, skipped=True) for step in (1, 2, 3)] == [["skip"], ["skip"], ["skip", "rollback"]]


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_a_veto_of_another_rank_is_dealt_with_by_the_table(action: str) -> None:
    assert decide(policy(actions={"non_finite": action}), 1, skipped=True) == [action]
    assert decide(policy(actions={"non_finite": action}), 1, "non_finite", skipped=True) == [action]


def test_precursors_may_be_none() -> None:
    assert decide(policy(precursors=[]), 100, "not_contracting", "dead_core") == ["shorten", "shorten"]


def test_what_comes_too_late_to_skip_is_said() -> None:
    assert decide(policy(), 100, "non_finite") == ["warn"]


def test_two_precursors_that_agree_roll_back_behind_the_first_sign() -> None:
    subject = policy()
    assert [each.action for each in subject.decide(100, [finding("not_contracting", 100, 90)], skipped=False)] == [
        "shorten"
    ]
    decisions = subject.decide(120, [finding("dead_core", 120, 110)], skipped=False)
    assert [each.action for each in decisions] == ["shorten", "rollback"]
    assert (decisions[1].before, decisions[1].fallback) == (70, 89)
    assert (decisions[1].rate_factor, decisions[1].rewarm_steps, decisions[1].vital) == (0.5, 50, True)
    assert decisions[1].reason == "dead_core and not_contracting within 50 steps"
    assert decide(policy(), 100, "optimizer_rms", "dead_core") == ["shorten", "shorten"]


def test_a_collapse_goes_behind_the_signs_before_it() -> None:
    subject = policy()
    subject.decide(300, [finding("not_contracting", 300, 280)], skipped=False)
    (decision,) = subject.decide(330, [finding("collapse", 330, 320)], skipped=False)
    assert (decision.action, decision.before) == ("rollback", 260)


def test_a_rollback_is_decided_once_until_it_has_been_made() -> None:
    subject = policy()
    assert decide(subject, 300, "collapse") == ["rollback"]
    assert decide(subject, 301, "blow_up", "collapse") == []


def test_the_second_time_it_goes_further_back_and_blames_the_rate() -> None:
    subject = policy()
    first = subject.decide(300, [finding("loss_drift", 300)], skipped=False)
    subject.remember(events(first, to_step=270))
    for step in (275, 276):
        subject.decide(step, [finding("non_finite", step, horizon=0)], skipped=True)
    again = subject.decide(277, [finding("non_finite", 277, horizon=0)], skipped=True)[-1]
    assert (again.action, again.before, again.fallback, again.rate_factor) == ("rollback", 269, None, 0.5)


def test_a_run_that_fails_again_never_goes_forward() -> None:
    subject = policy()
    log: list[dict[str, Any]] = []
    bounds = []
    for step, to_step in ((47, 24), (41, 20), (41, 0)):
        (decision,) = subject.decide(step, [finding("collapse", step)], skipped=False)
        bounds.append((decision.before, decision.fallback))
        log += events([decision], to_step)
        subject.remember(log)
    assert bounds == [(27, 46), (21, None), (19, None)]


def spikes(subject: Policy, first: int, *detectors: str) -> list[Decision]:
    """Return what is decided about skipped steps, one after the other."""
    return [
        decision
        for step, name in enumerate(detectors, start=first)
        for decision in subject.decide(step, [finding(name, step)], skipped=True)
        if decision.action != "skip"
    ]


@pytest.mark.parametrize("name", ["loss_spike", "gradient_spike"])
def test_finite_spikes_that_come_back_are_the_new_level_and_never_end_a_run(name: str) -> None:
    subject, log = policy(), []
    (rollback,) = spikes(subject, 100, name, name, name)
    assert (rollback.action, rollback.vital) == ("rollback", False)
    for step in (300, 600):  # of other reasons
        log += [{"kind": "rollback", "from_step": step, "to_step": step - 50}]
    log += events([rollback], to_step=90)
    subject.remember(log)
    (level,) = spikes(subject, 92, name, name, name)  # and though there have been enough rollbacks to stop
    assert (level.action, level.new_level) == ("warn", True)
    assert "3 updates skipped within 20 steps; this is learnt as the new level" in level.reason
    subject.forget_spikes()
    assert not spikes(subject, 95, name, name)


def test_finite_spikes_never_end_a_run_that_has_rolled_back_often() -> None:
    subject = policy()
    subject.remember([{"kind": "rollback", "from_step": at, "to_step": at - 50} for at in (100, 300, 500)])
    (level,) = spikes(subject, 900, "loss_spike", "loss_spike", "gradient_spike")
    assert (level.action, level.new_level) == ("warn", True)


def test_a_skip_before_a_restart_is_remembered_with_its_cause() -> None:
    log: list[dict[str, Any]] = []
    for step, name in ((100, "non_finite"), (101, "loss_spike")):
        log += events(policy().decide(step, [finding(name, step)], skipped=True), to_step=0)
    for first, vital in ((0, True), (2, False)):  # without the events of step 100
        subject = policy(skips_before_rollback=3 - first // 2)
        subject.remember(log[first:])
        (rollback,) = spikes(subject, 102, "loss_spike")
        assert rollback.vital is vital


def test_numbers_that_are_none_are_no_level() -> None:
    subject = policy(rollbacks_most=1)
    (rollback,) = spikes(subject, 100, "loss_spike", "non_finite", "loss_spike")
    assert rollback.vital
    subject.remember(events([rollback], to_step=90))
    subject.forget_spikes()
    (stop,) = spikes(subject, 92, "loss_spike", "loss_spike", "non_finite")
    assert stop.action == "stop"


def test_a_collapse_is_not_taken_for_a_spike_of_the_same_step() -> None:
    subject = policy(actions={"loss_spike": "rollback"})
    decision = subject.decide(100, [finding("loss_spike", 100), finding("collapse", 100)], skipped=False)[-1]
    assert (decision.finding.detector, decision.vital) == ("collapse", True)
    subject = policy()
    spikes(subject, 100, "loss_spike", "loss_spike", "loss_spike")
    assert decide(subject, 103, "collapse") == ["rollback"]  # whatever becomes of the other, which is not vital


def test_after_the_last_rollback_the_run_stops() -> None:
    subject, log = policy(rollbacks_most=2), []
    for step in (300, 900):
        decisions = subject.decide(step, [finding("collapse", step)], skipped=False)
        assert [each.action for each in decisions] == ["rollback"]
        log += events(decisions, to_step=step - 50)
        subject.remember(log)
    (decision,) = subject.decide(1500, [finding("collapse", 1500)], skipped=False)
    assert decision.action == "stop"
    assert "2 rollbacks within 2000 steps did not help" in decision.reason
    subject.remember(log)
    assert decide(subject, 3000, "collapse") == ["rollback"]  # they are long ago


def test_events_rebuild_the_memory() -> None:
    steps = [(100, "not_contracting", False), (105, "non_finite", True), (112, "loss_spike", True)]
    straight, log = policy(), []
    for step, detector, skipped in steps:
        log += events(straight.decide(step, [finding(detector, step)], skipped=skipped), to_step=0)
    rebuilt = policy()
    rebuilt.remember([{"kind": "start", "step": 0}, *json.loads(json.dumps(log))])
    for subject in (straight, rebuilt):
        assert decide(subject, 114, "not_contracting", "non_finite", skipped=True) == ["skip", "rollback"]


def test_what_lies_beyond_the_step_of_a_start_is_forgotten() -> None:
    log: list[dict[str, Any]] = [{"kind": "start", "step": 0}]
    log += events(policy().decide(100, [finding("collapse", 100), finding("straggler", 100)], skipped=False), 0)[:2]
    log += events(policy().decide(101, [finding("non_finite", 101)], skipped=True), 0)
    subject = policy()
    subject.remember(log)
    assert decide(subject, 102, "collapse", "straggler") == []
    subject.remember([*log, {"kind": "start", "step": 80}])
    assert decide(subject, 100, "collapse", "straggler") == ["warn", "rollback"]
    again = [decide(subject, step, "non_finite", skipped=True) for step in (101, 102)]
    assert again == [["skip"], ["skip"]]


def test_a_rollback_that_was_not_made_before_a_restart_is_decided_again() -> None:
    subject = policy()
    decisions = subject.decide(100, [finding("collapse", 100), finding("straggler", 100)], skipped=False)
    log = [event for event in events(decisions, to_step=60) if event["kind"] == "finding"]
    subject.remember([*log, {"kind": "start", "step": 100}])
    assert decide(subject, 110, "collapse", "straggler") == ["rollback"]
    observed = [{**event, "acted": False} for event in log]
    subject.remember([*observed, {"kind": "start", "step": 100}])
    assert decide(subject, 110, "collapse") == []


def test_a_report_of_a_later_step_is_none() -> None:
    subject = policy()
    subject.remember([{"kind": "finding", "action": "warn", **finding("straggler", 100).to_dict()}])
    assert decide(subject, 70, "straggler") == ["warn"]


def test_what_lay_on_an_abandoned_branch_is_forgotten() -> None:
    subject = policy()
    log = events(subject.decide(100, [finding("straggler", 100), finding("collapse", 100)], skipped=False), to_step=60)
    subject.remember(log)
    assert decide(subject, 70, "straggler") == ["warn"]


def test_observing_decides_the_same_and_does_nothing() -> None:
    subject = policy(observe_only=True)
    decisions = []
    for step in range(100, 120):
        decisions += subject.decide(step, [finding("non_finite", step)], skipped=False)
    assert [(each.action, each.finding.step) for each in decisions] == [("skip", 100), ("rollback", 102)]
    assert not any(each.acted for each in decisions)


def test_a_decision_round_trips_through_json() -> None:
    for decision in policy().decide(300, [finding("collapse", 300), finding("dead_core", 300)], skipped=False):
        assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actions": {"colapse": "warn"}}, r"monitor\.policy\.actions\.colapse: .*did you mean 'collapse'"),
        ({"actions": {"collapse": "skip"}}, r"monitor\.policy\.actions\.collapse: 'skip' is not one of ignore, warn"),
        ({"precursors": ["core"]}, r"monitor\.policy\.precursors: 'core' is not a detector"),
        ({"rate_factor": 0.0}, r"monitor\.policy\.rate_factor: 0\.0 is not in \(0, 1\]"),
        (
            {"actions": {"non_finite": "warn"}},
            r"actions\.non_finite: 'warn' is not skip, rollback, stop: no run recovers",
        ),
        ({"actions": {"non_finite": "ignore"}}, r"actions\.non_finite: 'ignore' is not skip"),
        ({"actions": {"non_finite": "shorten"}}, r"actions\.non_finite: 'shorten' is not skip"),
        (
            {"precursors_before_rollback": 4},
            r"precursors_before_rollback: 4 is not at most 3, the number of policy\.prec",
        ),
        ({"skips_before_rollback": 21}, r"skips_before_rollback: 21 is not at most policy\.skip_window, 20"),
        ({"skips_before_rollback": 0}, r"monitor\.policy\.skips_before_rollback: 0 is not positive"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MonitorConfigError, match=message):
        PolicyConfig(**settings)


def test_a_table_that_is_given_in_part_keeps_the_rest() -> None:
    assert PolicyConfig(actions={"collapse": "warn"}).actions == {**DEFAULT_ACTIONS, "collapse": "warn"}
