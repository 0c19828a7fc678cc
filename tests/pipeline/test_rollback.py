"""Where a run goes on after a rollback, also if it was killed in the middle of one."""

from __future__ import annotations

import json
import math

import pytest

from pipeline.checkpoints.manifest import Progress
from pipeline.rollback import Adjustment, Rollback, data_to_skip, left_behind, rate_factor, resumed

FIRST = Rollback(
    from_step=60,
    to_step=40,
    branch=1,
    samples_from=400,
    samples_to=620,
    adjustments=[Adjustment(step=40, factor=0.5, rewarm_steps=3)],
)
SECOND = Rollback(
    from_step=70,
    to_step=20,
    branch=2,
    samples_from=200,
    samples_to=900,
    adjustments=[*FIRST.adjustments, Adjustment(step=20, factor=0.5, rewarm_steps=0)],
)


def test_the_rate_is_lowered_from_its_step_on_and_rises_to_that() -> None:
    assert [rate_factor(FIRST.adjustments, step) for step in (39, 40, 41, 42, 43, 1000)] == [
        1.0,
        0.125,
        0.25,
        0.375,
        0.5,
        0.5,
    ]
    assert rate_factor(SECOND.adjustments, 20) == 0.5
    assert rate_factor(SECOND.adjustments, 1000) == 0.25
    assert rate_factor([], 5) == 1.0


def test_an_event_gives_the_rollback_back() -> None:
    event = json.loads(json.dumps({"kind": "rollback", "time": 1.0, **SECOND.to_dict(), "reason": "collapse"}))
    assert Rollback.from_event(event) == SECOND


def test_what_was_saved_after_the_target_on_an_older_branch_is_left_behind() -> None:
    assert left_behind([FIRST, SECOND], 0, 20) is None
    assert left_behind([FIRST, SECOND], 0, 30) is SECOND
    assert left_behind([FIRST, SECOND], 0, 50) is FIRST
    assert left_behind([FIRST, SECOND], 1, 60) is SECOND
    assert left_behind([FIRST, SECOND], 2, 60) is None
    assert left_behind([], 0, 60) is None


@pytest.mark.parametrize("step", [40, 20])
def test_a_run_killed_in_a_rollback_goes_on_past_the_data(step: int) -> None:
    saved = Progress(step=step, samples=10 * step, tokens=7, branch=0)
    progress, adjustments = resumed(saved, [], [FIRST])
    assert progress == Progress(step=step, samples=620, tokens=7, branch=1)
    assert adjustments == FIRST.adjustments


def test_a_checkpoint_from_after_the_rollback_goes_on_as_it_was() -> None:
    saved = Progress(step=44, samples=700, branch=1)
    assert resumed(saved, FIRST.adjustments, [FIRST]) == (saved, FIRST.adjustments)
    assert resumed(Progress(step=3), [], []) == (Progress(step=3), [])
    older = Progress(step=20, samples=200, branch=0)
    assert resumed(older, [], [FIRST, SECOND])[0].samples == 900


def test_data_that_are_served_once_are_skipped_only_as_far_as_they_last() -> None:
    assert data_to_skip(620, 400, needed=5000, length=None) == 620
    assert data_to_skip(620, 400, needed=5000, length=6000) == 620
    assert data_to_skip(620, 400, needed=5500, length=6000) == 500
    assert data_to_skip(620, 400, needed=5700, length=6000) == 400
    assert math.isfinite(data_to_skip(620, 400, needed=0, length=1))
