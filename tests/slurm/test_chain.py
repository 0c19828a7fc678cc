"""What a chain does next, decided from its records: every branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.runlog import Record
from slurm import chain
from slurm.chain import GAVE_UP, Move, Verdict
from tests.slurm.submitted_run import request as make_request

REQUEST = make_request(minutes=60, links=3, signal_seconds=600, max_restarts=3)


def link(code: int | None, *, minutes: float = 55.0, start: int | None = None, job: str = "7") -> list[Record]:
    """The records of a link with one launch, from the checkpoint of step `start`."""
    return [
        {"kind": "began", "time": 0.0, "job": job, "checkpoint": start},
        {"kind": "launched", "time": 1.0, "job": job, "launch": 1, "nodes": ["n1", "n2"], "checkpoint": start},
        {"kind": "ended", "time": minutes * 60.0, "job": job, "launch": 1, "code": code, "reason": f"because {code}"},
    ]


@pytest.mark.parametrize(
    ("status", "outcome", "refusal", "began", "code", "words"),
    [
        (0, {"exit_code": 0, "reason": "all steps done"}, None, True, 0, "all steps done"),
        (137, {"exit_code": 10, "reason": "stopped"}, None, True, 10, "stopped"),
        (0, {"exit_code": 11, "reason": "loss nan"}, None, True, 11, "loss nan"),
        (12, {"exit_code": 12, "reason": "another job"}, None, True, 12, "another job"),
        (10, {"exit_code": 1, "reason": "rank 3 failed"}, None, True, None, "rank 3 failed"),
        (10, {"reason": "cut"}, None, True, None, "cut"),
        (0, None, None, True, None, "status 0; its attempt left no outcome"),
        (10, None, None, True, None, "status 10"),
        (1, None, {"code": 12, "reason": "train.steps: bad"}, False, 12, "train.steps: bad"),
        (137, None, {"reason": "stale"}, True, None, "SIGKILL"),
        (12, None, None, False, 12, "nothing was started"),
        (0, None, {"code": 0, "reason": "finished before, at step 9"}, False, 0, "at step 9"),
        (0, None, {"code": 0, "reason": "stale"}, True, None, "status 0; its attempt left no outcome"),
        (0, None, None, False, None, "status 0; no attempt had begun"),  # srun says so of a step that was aborted
        (1, None, {"code": 11, "reason": "no such refusal"}, False, None, "status 1"),
        (10, None, None, False, None, "no attempt had begun"),
        (13, None, None, False, None, "no attempt had begun"),
        (-15, None, None, False, None, "SIGTERM"),
        (None, None, None, False, None, "without a word"),
    ],
)
def test_a_launch_is_judged_by_what_it_left_before_its_status(
    status: int | None, outcome: Record | None, refusal: Record | None, began: bool, code: int | None, words: str
) -> None:
    verdict = chain.judge(status, outcome, refusal, began=began)
    assert verdict.code == code
    assert words in verdict.reason


def test_an_unhealthy_node_is_named() -> None:
    outcome: Record = {"exit_code": 13, "reason": "slow", "hosts": ["n2"]}
    assert chain.judge(13, outcome, None, began=True) == Verdict(13, "slow", ["n2"])


@pytest.mark.parametrize("code", [0, 11, 12])
def test_a_final_code_ends_the_chain_with_its_reason(code: int) -> None:
    assert chain.over(link(code), 100, REQUEST) == (code, f"because {code}")


def test_input_that_was_good_before_is_not_bad_by_itself() -> None:
    began: Record = {"kind": "ended", "time": 0.0, "job": "1", "launch": 1, "code": 10, "attempt": 1, "reason": "saved"}
    refused = link(12, minutes=1.0, start=50)
    assert chain.over([began, *refused], 50, REQUEST) is None
    code, reason = chain.over([began, *refused * 3], 50, REQUEST) or (0, "")
    assert code == GAVE_UP
    assert "because 12" in reason


@pytest.mark.parametrize("code", [10, 13, None])
def test_other_endings_go_on(code: int | None) -> None:
    assert chain.over(link(code, minutes=1.0), 100, REQUEST) is None


def test_a_chain_that_has_ended_stays_so() -> None:
    assert chain.over([{"kind": "over", "code": 11, "reason": "why"}, *link(10)], 100, REQUEST) == (11, "why")


def test_a_cancelled_chain_stops_unless_it_has_finished() -> None:
    cancelled: Record = {"kind": "cancelled", "by": "ada"}
    assert chain.over([cancelled], None, REQUEST) == (10, "cancelled by ada")
    assert chain.over([*link(10), cancelled], 100, REQUEST) == (10, "cancelled by ada")
    assert chain.over([cancelled, *link(0)], 100, REQUEST) == (0, "because 0")


def test_launches_without_a_newer_checkpoint_end_the_chain() -> None:
    crash = link(None, minutes=1.0, start=50)
    assert chain.over(crash * 2, 50, REQUEST) is None
    code, reason = chain.over(crash * 3, 50, REQUEST) or (0, "")
    assert code == GAVE_UP
    assert "3 launches in a row" in reason
    assert "step 50" in reason
    assert "because None" in reason
    assert chain.over(crash * 3, 60, REQUEST) is None
    # A link that came to no launch is one in vain as soon as the next has begun; the one at work is not counted.
    began: Record = {"kind": "began", "time": 0.0, "job": "8", "checkpoint": 50}
    assert chain.launches_in_vain([*crash, began], 50) == 1
    assert chain.launches_in_vain([*crash, began, began], 50) == 2
    refused: Record = {"kind": "ended", "time": 1.0, "job": "8", "launch": None, "code": 13, "reason": "few nodes"}
    assert chain.launches_in_vain([*crash, began, refused], 50) == 2


@given(st.lists(st.integers(0, 3), max_size=30))
def test_only_launches_after_the_newest_checkpoint_are_in_vain(progress: list[int]) -> None:
    """Each launch makes so many checkpoints; the guard counts the launches since the last that made one."""
    step, records = 0, []
    for made in progress:
        records += link(None, minutes=1.0, start=step or None)
        step += made
    in_vain = next((back for back, made in enumerate(reversed(progress)) if made), len(progress))
    assert chain.launches_in_vain(records, step or None) == in_vain


def test_links_are_used_up_by_time_and_not_by_crashes() -> None:
    whole, crash, preempted = link(10), link(None, minutes=5.0), link(10, minutes=5.0)
    killed_by_limit = link(None, minutes=60.5)
    assert chain.used_links([*whole, *crash, *preempted, *killed_by_limit], REQUEST) == 2
    assert chain.over([*whole, *crash, *whole], 100, REQUEST) is None
    code, reason = chain.over(whole * 3, 100, REQUEST) or (0, "")
    assert (code, "links are used up" in reason) == (10, True)
    # Launches after another in one job are one link; its time counts from the job's beginning.
    again = [{**record, "time": 3000.0} for record in whole[1:2]] + [{**whole[2], "time": 3400.0}]
    assert chain.used_links([*link(13, minutes=20.0), *again], REQUEST) == 1


def test_a_link_of_minutes_counts_though_its_signal_came_a_minute_early() -> None:
    short = make_request(minutes=1, links=3, signal_seconds=30)
    assert chain.used_links(link(10, minutes=0.2), short) == 1
    assert chain.used_links(link(None, minutes=0.2), short) == 0


def test_a_link_without_a_time_limit_is_never_used_up() -> None:
    decade = make_request(minutes=10 * 365 * 24 * 60)
    assert chain.over(link(10, minutes=60 * 24 * 60), 100, decade) is None
    assert chain.relaunch(Verdict(13, "slow", ["n2"]), (), 1, decade, decade.minutes * 60.0)


def test_the_next_link_is_never_beyond_the_last() -> None:
    assert chain.next_link([], REQUEST) == 1
    assert chain.next_link(link(10), REQUEST) == 2
    assert chain.next_link(link(10) * 5, REQUEST) == 3


def test_a_launch_that_nobody_wrote_the_end_of_is_unsettled() -> None:
    whole = link(10)
    assert chain.unsettled([]) is None
    assert chain.unsettled(whole) is None
    assert chain.unsettled(whole[:1]) is None
    assert chain.unsettled(whole[:2]) == whole[1]
    assert chain.unsettled([*whole, *whole[:2]]) == whole[1]


def test_the_nodes_of_a_crash_are_suspects() -> None:
    assert chain.suspects([]) == {}
    assert chain.suspects(link(10)) == {}
    assert chain.suspects(link(None)) == {"n1": "lost after job 7", "n2": "lost after job 7"}


def test_the_jobs_that_wait_are_those_that_have_not_begun() -> None:
    records: list[Record] = [{"kind": "submitted", "jobs": ["7", "8", "9"]}, *link(10, job="7")]
    assert chain.waiting_jobs(records, "8") == ["9"]
    assert chain.waiting_jobs([*records, {"kind": "submitted", "jobs": ["12"]}], "8") == ["9", "12"]
    assert chain.waiting_jobs([*records, {"kind": "yielded", "job": "9", "to": "7"}], "8") == []


def test_the_job_before_is_the_last_that_began_unless_it_asks_itself() -> None:
    records = [*link(10, job="7"), *link(10, job="8")]
    assert chain.job_before(records, "9") == "8"
    assert chain.job_before(records, "8") is None
    assert chain.job_before([], "8") is None


def test_links_are_being_submitted_until_all_are_or_nobody_does_so_any_more() -> None:
    opening: Record = {"kind": "submitted", "time": 0.0, "jobs": []}
    three = [{"kind": "submitted", "time": 50.0 * number, "jobs": [str(number)]} for number in (1, 2, 3)]
    assert not chain.is_being_submitted([], REQUEST, 1.0)
    assert chain.is_being_submitted([opening], REQUEST, 1.0)
    assert not chain.is_being_submitted([opening], dataclasses.replace(REQUEST, chain="requeue"), 1.0)
    assert chain.is_being_submitted([opening, *three[:2]], REQUEST, 101.0)
    assert not chain.is_being_submitted([opening, *three[:2]], REQUEST, 200.0)
    assert not chain.is_being_submitted([opening, *three], REQUEST, 151.0)


@pytest.mark.parametrize(
    ("kind", "local", "waiting", "move"),
    [
        ("requeue", False, False, Move.REQUEUE),
        ("afterany", False, True, Move.LEAVE),
        ("array", False, True, Move.LEAVE),
        ("afterany", False, False, Move.SUBMIT),
        ("array", False, False, Move.SUBMIT),
        ("afterany", True, False, Move.AGAIN),
    ],
)
def test_how_a_chain_goes_on(kind: str, local: bool, waiting: bool, move: Move) -> None:
    request = dataclasses.replace(REQUEST, chain=kind)
    assert chain.next_move(request, local=local, waiting=waiting) is move


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, True),
        ({"left": 1}, False),
        ({"seconds_left": 1200.0}, False),
        ({"verdict": Verdict(13, "slow", [])}, False),  # no node's fault
        ({"verdict": Verdict(10, "told")}, False),
        ({"verdict": Verdict(None, "crash")}, False),
        ({"verdict": Verdict(None, "crash"), "lost": {"n2"}}, True),
    ],
)
def test_ranks_start_again_in_the_same_job_only_on_other_nodes_with_time_left(
    changes: dict[str, Any], again: bool
) -> None:
    case: dict[str, Any] = {"verdict": Verdict(13, "slow", ["n2"]), "lost": set(), "left": 2, "seconds_left": 1300.0}
    assert chain.relaunch(**{**case, **changes}, request=make_request(nodes=2, signal_seconds=600)) is again


def test_bad_nodes_are_left_aside_in_order() -> None:
    assert chain.usable(["n1", "n2", "n3", "n4"], {"n3"}, {"n1"}) == ["n2", "n4"]


def test_every_kth_checkpoint_is_evaluated() -> None:
    assert chain.evaluations_due([10], None, 2) == []
    assert chain.evaluations_due([30, 10, 20], None, 1) == [10, 20, 30]
    assert chain.evaluations_due([10, 20, 30], None, 2) == [20]
    assert chain.evaluations_due([10, 20, 30, 40, 50, 60, 70], 30, 2) == [50, 70]
    assert chain.evaluations_due([10, 20, 30, 40], 30, 2) == []


@pytest.mark.parametrize(("code", "status"), [(0, 0), (10, 0), (11, 11), (12, 12), (GAVE_UP, 1)])
def test_the_queue_shows_failed_where_a_person_must_look(code: int, status: int) -> None:
    assert chain.exit_status(code) == status


def test_many_nodes_are_named_briefly() -> None:
    assert chain.shown(["n1", "n2"]) == "n1, n2"
    assert chain.shown([f"n{number}" for number in range(1, 8)]) == "n1, n2, n3, n4 and 3 more"
