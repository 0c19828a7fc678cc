"""Retention: what stays is the newest, the spaced, the best and what a rollback needs, and never much more."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.world import World
from pipeline.checkpoints.manifest import Progress, list_checkpoints
from pipeline.checkpoints.retention import Facts, Known, check_rules, facts_of, keep, prune
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError, ConfigError
from tests.pipeline.saved_checkpoint import draft, save_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionRules:
    keep_last: int
    keep_every: int | None = None
    keep_best: int = 0
    keep_healthy: int = 0
    healthy_horizon: int = 0


rules_of_a_run = st.builds(
    RetentionRules,
    keep_last=st.integers(2, 4),
    keep_every=st.none() | st.integers(1, 60),
    keep_best=st.integers(0, 3),
    keep_healthy=st.integers(0, 4),
    healthy_horizon=st.integers(0, 60),
)
verdicts = st.sampled_from(["healthy", "healthy", "suspect", "unknown"])
saves = st.lists(
    st.tuples(st.integers(1, 25), verdicts, st.none() | st.floats(0, 9), st.integers(-30, 4)),
    min_size=1,
    max_size=60,
)


def spaced(steps: list[int], width: int) -> set[int]:
    """The first step in each [n width, (n + 1) width), n >= 1; written otherwise than the code under test."""
    return {min(s for s in steps if s // width == n) for n in {s // width for s in steps} if n >= 1}


@given(rules=rules_of_a_run, saves=saves)
def test_rolling_retention_keeps_what_it_promises_of_everything_that_was_ever_saved(
    rules: RetentionRules, saves: list[tuple[int, str, float | None, int]]
) -> None:
    ever: dict[int, Facts] = {}
    there: dict[int, Facts] = {}
    newest = 0
    for increment, verdict, loss, back in saves:
        if 0 < back < len(there):  # a rollback to one that is left
            newest = sorted(there)[-1 - back]
            there = {step: each for step, each in there.items() if step <= newest}
            ever = dict(there)
        newest += increment
        there[newest] = ever[newest] = Facts(step=newest, verdict=verdict, loss=loss, measured=newest)
        kept = keep(there.values(), rules)
        there = {step: there[step] for step in kept}
        healthy = [step for step, each in ever.items() if each.verdict == "healthy"]
        aged = [step for step in healthy if step <= newest - rules.healthy_horizon]
        aged_here = [step for step in aged if step in there]
        assert len(aged_here) >= min(rules.keep_healthy, len(aged))
        if rules.keep_healthy:
            assert set(sorted(healthy)[: max(0, rules.keep_healthy - len(aged))]) <= there.keys()  # age next
            if aged:
                gap = max(1, math.ceil(rules.healthy_horizon / rules.keep_healthy))
                assert max(aged_here) > max(aged) - gap
        assert sum(reasons == ["healthy"] for reasons in kept.values()) <= 3 * rules.keep_healthy
        assert set(sorted(ever)[-rules.keep_last :]) <= there.keys()
        best = sorted((each.loss, each.step) for each in ever.values() if each.loss is not None)[: rules.keep_best]
        assert {step for _, step in best} <= there.keys()
        forever = set() if rules.keep_every is None else spaced(sorted(ever), rules.keep_every)
        assert forever <= there.keys()
        bound = rules.keep_last + rules.keep_best + 3 * rules.keep_healthy + len(forever)
        assert len(there) <= bound


def test_saves_that_are_close_together_still_leave_a_rollback_somewhere_to_go() -> None:
    rules = RetentionRules(keep_last=3, keep_best=1, keep_healthy=2, healthy_horizon=200)
    there: list[Facts] = []
    for step in range(10, 5001, 10):
        there.append(Facts(step=step, verdict="healthy"))
        kept = keep(there, rules)
        there = [each for each in there if each.step in kept]
    assert [each.step for each in there] == [4700, 4800, 4900, 4980, 4990, 5000]


@pytest.mark.parametrize("verdict", ["suspect", "unknown"])
def test_what_is_not_healthy_does_not_push_out_what_is(verdict: str) -> None:
    facts = [Facts(step=step, verdict="healthy" if step <= 30 else verdict) for step in range(10, 1001, 10)]
    assert keep(facts, RetentionRules(keep_last=2, keep_healthy=2, healthy_horizon=20)) == {
        20: ["healthy"],
        30: ["healthy"],
        990: ["last"],
        1000: ["last"],
    }


def test_of_checkpoints_that_carry_one_validation_only_the_measured_one_is_best() -> None:
    carried = {100: (2.0, 100), 110: (2.0, 100), 120: (2.0, 100), 200: (2.5, 200), 210: (2.5, 200), 300: (3.0, 300)}
    facts = [Facts(step=step, loss=loss, measured=measured) for step, (loss, measured) in carried.items()]
    facts.append(Facts(step=310))
    kept = keep(facts, RetentionRules(keep_last=2, keep_best=2))
    assert kept == {100: ["best"], 200: ["best"], 300: ["last"], 310: ["last"]}


def save(run_dir: Path, step: int, **fields: Any) -> Path:
    fragment = Fragment(parameter="w", start=0, weight=torch.ones(2), optimizer_state={})
    return save_checkpoint(run_dir, World(), [fragment], draft(step, shapes={"w": [2]}, **fields))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_facts_of_a_manifest_are_its_verdict_and_the_loss_at_the_largest_depth() -> None:
    said = draft(8, health={"verdict": "healthy"}, validation={"step": 5, "loss": {"2": 3.0, "16": 2.0, "4": 2.5}})
    assert facts_of(said) == Facts(step=8, verdict="healthy", loss=2.0, measured=5)
    assert facts_of(draft(8)) == Facts(step=8)
    assert facts_of(draft(8, validation={"step": 5, "loss": {"2": math.nan}})).loss is None


def test_pruning_removes_what_no_rule_keeps_and_reads_every_manifest_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: Known = {}
    rules = RetentionRules(keep_last=2, keep_best=1)
    folder, removed = tmp_path / "checkpoints", []
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
        newest = save(tmp_path, step, validation={"step": step, "loss": {"4": loss}})
        removed += prune(folder, newest.name, rules, known)
    assert removed == ["step-00000001", "step-00000003"]
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    monkeypatch.setattr("pipeline.checkpoints.retention.read_manifest", None)  # nothing is left to read
    assert prune(folder, "step-00000005", rules, known) == []
    monkeypatch.undo()
    save(tmp_path, 5, validation={"step": 5, "loss": {"4": 0.5}})  # written again, after a step back
    assert prune(folder, "step-00000005", rules, known) == ["step-00000002"]
    assert names(tmp_path) == ["step-00000004", "step-00000005", "superseded-step-00000005"]


@pytest.mark.parametrize("damage", ["cut", "gone", "renamed"])
def test_a_checkpoint_whose_manifest_is_unusable_is_neither_counted_nor_removed(tmp_path: Path, damage: str) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    broken = tmp_path / "checkpoints/step-00000004"
    if damage == "renamed":  # another step's
        (tmp_path / "checkpoints/step-00000001/manifest.json").rename(broken / "manifest.json")
    elif damage == "gone":
        (broken / "manifest.json").unlink()
    else:
        (broken / "manifest.json").write_text("{")
    assert "step-00000003" not in prune(tmp_path / "checkpoints", "step-00000005", RetentionRules(keep_last=2))
    assert {"step-00000003", "step-00000004", "step-00000005"} <= set(names(tmp_path))


@pytest.mark.parametrize(
    "said",
    [
        {"validation": {"step": [3], "loss": {"4": 1.0}}},
        {"validation": {"step": math.inf, "loss": {"4": 1.0}}},
        {"validation": {"step": 3, "loss": [1.0]}},
        {"validation": {"step": 3, "loss": {"4": []}}},
        {"health": [1]},
        {"progress": Progress(step="3")},  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_a_manifest_that_says_odd_things_is_refused_in_words(said: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        facts_of(dataclasses.replace(draft(3), **said))


def test_checkpoints_of_other_users_are_counted_and_removed_only_if_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    folder, rules = tmp_path / "checkpoints", RetentionRules(keep_last=2)
    for path in folder.rglob("*"):
        if path.stat().st_uid == 0:  # root's files are trusted
            os.chown(path, 4243, -1)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert prune(folder, "step-00000005", rules, {}) == []
    assert prune(folder, "step-00000005", rules, {}, other_owners=True) == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_a_newest_one_that_is_not_there_is_an_error_and_nothing_is_removed(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    with pytest.raises(FileNotFoundError, match="step-00000006"):
        prune(tmp_path / "checkpoints", "step-00000006", RetentionRules(keep_last=2))
    assert len(names(tmp_path)) == 5


def test_what_was_passed_over_at_the_restart_is_moved_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step)
    newest, earlier = save(tmp_path, 7), tmp_path / "checkpoints/superseded-step-00000008"
    earlier.mkdir()
    (earlier / "kept").touch()
    assert prune(tmp_path / "checkpoints", newest.name, RetentionRules(keep_last=2)) == []
    aside = ["superseded-step-00000008", "superseded-step-00000008-2", "superseded-step-00000012"]
    assert names(tmp_path) == ["step-00000004", "step-00000007", *aside]
    assert (earlier / "kept").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000007"]


def test_one_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.checkpoints import commit, retention

    for step in range(1, 6):
        save(tmp_path, step)

    def remove(path: Path) -> None:
        if path.name == "step-00000001":
            raise PermissionError(13, "Permission denied", str(path))
        commit.remove_directory(path)

    monkeypatch.setattr(retention, "remove_directory", remove)
    with pytest.raises(PermissionError):
        prune(tmp_path / "checkpoints", "step-00000005", RetentionRules(keep_last=2))
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"keep_last": 1}, "checkpoint.keep_last: 1"),
        ({"keep_every": 0}, "checkpoint.keep_every: 0"),
        ({"keep_best": -1}, "checkpoint.keep_best: -1"),
        ({"keep_healthy": -1}, "checkpoint.keep_healthy: -1"),
        ({"healthy_horizon": -5}, "checkpoint.healthy_horizon: -5"),
    ],
)
def test_values_without_a_meaning_are_refused(change: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        check_rules(dataclasses.replace(RetentionRules(keep_last=2), **change))
