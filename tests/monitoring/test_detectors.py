"""Each detector sees what it is for, once; none sees it in a healthy run; all survive a restart and any record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.detectors import Detector, DetectorsConfig, Finding, build_detectors

MEAN = 8
Record = dict[str, Any]


def detector(name: str) -> Detector:
    return next(item for item in build_detectors(DetectorsConfig(), MEAN) if item.name == name)


def findings(name: str, records: list[Record]) -> list[Finding]:
    item = detector(name)
    return [found for record in records if (found := item.observe(record))]


def training(steps: int, seed: int = 0) -> list[Record]:
    """Return the log of a healthy run: the loss falls fast, then slowly, and both numbers depend on the depth."""
    draw = np.random.default_rng(seed)
    records: list[Record] = []
    for step in range(1, steps + 1):
        depth = int(draw.poisson(draw.lognormal(math.log(MEAN), 0.5))) + 1
        shallow = math.exp(-depth / 3)
        records.append(
            {
                "step": step,
                "loss": 2.0 + 6.0 * math.exp(-step / 40) + 0.4 * shallow + float(draw.normal(0, 0.1)),
                "grad_norm": math.exp(-0.7 * shallow + float(draw.normal(0, 0.15))),
                "num_steps": [max(depth - 4, 0), min(depth, 4)],
            }
        )
    return records


def probes(count: int, every: int = 10, first: int = 200, **fields: Any) -> list[Record]:
    return [{"step": first + every * i, **fields} for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_falls_fast_and_depends_on_depth_is_no_spike(seed: int) -> None:
    records = training(600, seed)
    assert not findings("loss_spike", records) + findings("gradient_spike", records) + findings("loss_drift", records)


@pytest.mark.parametrize(("name", "key", "factor"), [("loss_spike", "loss", 1.6), ("gradient_spike", "grad_norm", 8.0)])
def test_a_spike_is_found_at_its_step_and_does_not_hide_the_next(name: str, key: str, factor: float) -> None:
    records = training(500)
    for step in (420, 423, 480):
        records[step - 1][key] *= factor
    assert [found.step for found in findings(name, records)] == [420, 423, 480]


def test_a_step_is_judged_by_those_of_its_own_depth() -> None:
    records = training(800)
    for record in records:
        record["loss"] += 1.5 if sum(record["num_steps"]) < 4 else 0.0
    assert not findings("loss_spike", records)
    deep = {"step": 801, "loss": 3.9, "num_steps": [20, 4]}
    assert [found.step for found in findings("loss_spike", [*records, deep])] == [801]


def test_a_skipped_step_is_judged_but_not_learnt_from() -> None:
    item, records = detector("loss_spike"), training(300)
    for record in records:
        item.observe(record)
    before = item.state()["windows"]
    assert item.observe({"step": 301, "loss": 9.0, "num_steps": [4, 4], "skipped": True})
    assert item.state()["windows"] == before


@pytest.mark.parametrize(
    "fields", [{"loss": math.nan}, {"grad_norm": math.inf}, {"state_rms": [1.0, math.nan], "loss": 1.0}]
)
def test_a_number_that_is_none_is_found(fields: Record) -> None:
    assert [found.step for found in findings("non_finite", [{"step": 7, **fields}])] == [7]


def test_a_loss_that_creeps_up_is_found_though_no_step_stands_out() -> None:
    records = training(600)
    for record in records[300:]:
        record["loss"] += 0.005 * (record["step"] - 300)
    found = findings("loss_drift", records)
    assert len(found) == 1
    assert 400 <= found[0].step <= 520
    assert not findings("loss_spike", records[:400])


def test_a_loop_that_stops_contracting_is_found_once_and_again_after_it_has_recovered() -> None:
    slow: Record = {"contraction": 1.2, "relative_residual": [0.3] * MEAN}
    good: Record = {"contraction": 0.4, "relative_residual": [0.001] * MEAN}
    records = probes(6, first=0, **slow) + probes(6, first=100, **good) + probes(6, first=200, **slow)
    found = findings("not_contracting", records)
    assert [(each.step, each.since) for each in found] == [(20, 0), (220, 200)]


def test_a_residual_counts_in_deep_loops_only_and_rounding_does_not_count() -> None:
    assert not findings("not_contracting", probes(9, relative_residual=[0.3] * (MEAN - 1)))
    assert findings("not_contracting", probes(9, relative_residual=[0.3] * MEAN))
    assert not findings("not_contracting", probes(9, contraction=1.0, relative_residual=[1e-7] * MEAN))


def test_a_collapse_needs_rank_and_duration_and_in_the_beginning_a_dead_core() -> None:
    gone: Record = {"token_correlation": 0.98, "effective_rank": 1.05}
    assert [each.step for each in findings("collapse", probes(5, **gone))] == [210]
    assert not findings("collapse", probes(1, **gone))
    assert not findings("collapse", probes(5, token_correlation=0.98, effective_rank=5.0))
    assert not findings("collapse", probes(5, first=20, **gone))
    dead: Record = {**gone, "gradient_share": {"core": 1e-5}}
    assert [each.step for each in findings("collapse", probes(5, first=20, **dead))] == [30]


def test_a_state_that_stays_degenerate_is_told_however_early_but_not_one_that_is_passed_through() -> None:
    gone: Record = {"token_correlation": 0.97, "effective_rank": 1.1}
    good: Record = {"token_correlation": 0.3, "effective_rank": 9.0}
    staying = probes(30, every=1, first=10, **gone)
    for place in (4, 13, 20):  # now and then it looks up
        staying[place] |= good
    assert [each.step for each in findings("degenerate", staying)] == [30]
    passing = probes(12, every=1, first=10, **gone) + probes(30, every=1, first=22, **good)
    assert not findings("degenerate", passing)
    assert [each.step for each in findings("degenerate", probes(9, every=5, first=10, **gone))] == [30]


def test_a_collapse_is_dated_back_to_where_the_correlation_began_to_rise() -> None:
    rise = [0.3, 0.6, 0.8, 0.97, 0.98, 0.98]
    records = [{"step": 300 + i, "token_correlation": value, "effective_rank": 1.1} for i, value in enumerate(rise)]
    assert [(each.step, each.since) for each in findings("collapse", records)] == [(304, 301)]


def test_a_core_without_gradient_must_last() -> None:
    dead: Record = {"gradient_share": {"core": 0.001, "head": 0.999}}
    assert [each.step for each in findings("dead_core", probes(20, every=1, **dead))] == [210]
    assert not findings("dead_core", probes(9, every=1, **dead))
    assert not findings("dead_core", probes(20, gradient_share={"core": 0.1}))


def test_a_recurrence_that_is_ignored_shows_in_the_gain_or_as_an_even_drift() -> None:
    gain = {"shallow": 2.0, "deep": 1.998, "depth": 8}
    assert [each.step for each in findings("ignored", probes(3, every=100, depth_gain=gain))] == [300]
    assert not findings("ignored", probes(3, every=100, depth_gain={**gain, "deep": 1.9}))
    drift: Record = {"contraction": 1.0, "relative_residual": [1 / i for i in range(1, 17)]}
    assert [each.step for each in findings("ignored", probes(9, **drift))] == [240]
    assert not findings("not_contracting", probes(9, **drift))
    assert not findings("blow_up", probes(9, state_rms=[float(i) for i in range(1, 17)]))


def test_a_depth_that_does_harm_is_found() -> None:
    harm = {"shallow": 2.0, "deep": 2.1, "depth": 8}
    assert [each.step for each in findings("depth_inversion", probes(3, depth_gain=harm))] == [200]
    assert not findings("depth_inversion", probes(3, depth_gain={**harm, "deep": 2.01}))


def test_a_fresh_model_may_do_worse_with_depth_and_learn_little_in_its_core() -> None:
    fresh: Record = {"depth_gain": {"shallow": 6.0, "deep": 6.1, "depth": 8}, "gradient_share": {"core": 0.01}}
    records = probes(50, every=1, first=1, **fresh)
    assert not findings("depth_inversion", records) + findings("dead_core", records)


@pytest.mark.parametrize("key", ["state_rms", "injected_rms", "first_jump"])
def test_a_size_that_runs_away_is_found(key: str) -> None:
    sizes = [1.0] * 20 + [12.0, 13.0, 14.0]
    values = [[size] * MEAN if key == "state_rms" else size for size in sizes]
    records = [{"step": 10 * i, key: value} for i, value in enumerate(values)]
    assert [(each.step, each.since) for each in findings("blow_up", records)] == [(210, 200)]


def test_a_state_that_grows_geometrically_along_the_loop_is_found() -> None:
    assert findings("blow_up", probes(3, state_rms=[1.5**i for i in range(12)]))


def test_an_optimizer_whose_second_moment_is_surprised_is_found() -> None:
    usual = probes(20, optimizer_rms={"a": 1.0, "b": 2.0})
    assert not findings("optimizer_rms", [*usual, {"step": 900, "optimizer_rms": {"a": 1.1, "b": 2.9}}])
    found = findings("optimizer_rms", [*usual, {"step": 900, "optimizer_rms": {"a": 4.5, "b": 2.0}}])
    assert [(each.step, list(each.evidence["tensors"])) for each in found] == [(900, ["a"])]


@pytest.mark.parametrize("fitted", [True, False])
def test_slow_steps_are_told_from_deep_ones(fitted: bool) -> None:
    records = training(300)
    for record in records:
        cost = sum(record["num_steps"]) * (1.8 if record["step"] > 200 else 1.0)
        if fitted:
            record |= {"seconds": cost, "expected_seconds": float(sum(record["num_steps"]))}
        else:
            record |= {"seconds": cost, "tokens_per_second": 1000 / cost}
    found = findings("throughput", records)
    assert len(found) == 1
    assert 245 <= found[0].step <= 265
    assert 195 <= found[0].since <= 205
    assert not findings("throughput", records[:200])


def test_a_busy_machine_is_no_slow_run() -> None:
    records = [{"step": step, "seconds": 1.0, "expected_seconds": 1.0} for step in range(1, 301)]
    for record in records:
        record["seconds"] = 1.4 if record["step"] > 200 else 3.0 if record["step"] in range(100, 125) else 1.0
    assert not findings("throughput", records)


def test_the_first_loss_is_no_level_to_drift_from() -> None:
    draw = np.random.default_rng(5)
    records = [{"step": step, "loss": 2.0 + float(draw.normal(0, 0.1)), "num_steps": [4, 4]} for step in range(1, 400)]
    records[0]["loss"] = 1.0
    assert not findings("loss_drift", records)


def test_a_straggler_must_be_the_same_host_twice() -> None:
    def pace(hosts: str) -> list[Record]:
        return [
            {
                "step": 50 * i,
                "nodes": {"a": 1.0, "b": 1.0, host: 1.6},
                "slowest": {"rank": 3, "host": host, "ratio": 1.6},
            }
            for i, host in enumerate(hosts)
        ]

    assert not findings("straggler", pace("abab"))
    assert [each.evidence["host"] for each in findings("straggler", pace("abbb"))] == ["b"]


NUMBER = st.one_of(st.floats(allow_nan=True, allow_infinity=True, width=32), st.none(), st.integers(-2, 10**6))
SERIES = st.one_of(st.lists(NUMBER, max_size=14), NUMBER)
NAMED = st.one_of(
    st.dictionaries(st.sampled_from(["core", "shallow", "deep", "depth", "host", "ratio"]), NUMBER), NUMBER
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("loss", "grad_norm", "contraction", "token_correlation", "effective_rank"), NUMBER),
        **dict.fromkeys(("injected_rms", "first_jump", "seconds", "expected_seconds", "tokens_per_second"), NUMBER),
        **dict.fromkeys(("state_rms", "relative_residual", "num_steps"), SERIES),
        **dict.fromkeys(("gradient_share", "depth_gain", "optimizer_rms", "nodes", "slowest", "depths"), NAMED),
        "skipped": st.booleans(),
    },
)


@settings(max_examples=30, deadline=None)
@given(st.lists(FIELDS, min_size=1, max_size=25), st.integers(0, 24))
def test_no_record_breaks_a_detector_and_a_restart_loses_no_finding(fields: list[Record], cut: int) -> None:
    records = [{**entry, "step": 140 + 3 * i} for i, entry in enumerate(fields)]
    whole, broken = build_detectors(DetectorsConfig(), MEAN), build_detectors(DetectorsConfig(), MEAN)
    for i, record in enumerate(records):
        if i == cut:
            states = json.loads(json.dumps([item.state() for item in broken], allow_nan=False))
            broken = build_detectors(DetectorsConfig(), MEAN)
            for item, state in zip(broken, states, strict=True):
                item.restore(state)
        for one, other in zip(whole, broken, strict=True):
            found, after_break = one.observe(record), other.observe(record)
            # More may be found after the break: what held before it, once more.
            assert found is None or repr(after_break) == repr(found)
            assert one.suspect == other.suspect


def test_memory_is_bounded() -> None:
    items = build_detectors(DetectorsConfig(), MEAN)
    sizes = []
    for i, record in enumerate(_endless(training(60))):
        for item in items:
            item.observe(record)
        if i in (600, 900):
            sizes.append(len(json.dumps([item.state() for item in items])))
    assert sizes[1] < 1.1 * sizes[0]


def _endless(records: list[Record]) -> Iterator[Record]:
    for step in range(901):
        base = records[step % len(records)]
        share = {"core": 0.2, "head": 0.8}
        yield {
            **base,
            "step": step,
            "num_steps": [4, 4],
            "seconds": 1.0,
            "expected_seconds": 1.0,
            "state_rms": [1.0] * 9,
            "gradient_share": share,
        }


def test_a_finding_round_trips_through_json() -> None:
    found = findings("non_finite", [{"step": 7, "loss": math.nan}])[0]
    again = Finding.from_dict(json.loads(json.dumps(found.to_dict()).replace("NaN", '"nan"')))
    assert repr(again) == repr(found)


@pytest.mark.parametrize(
    ("name", "records", "sentence"),
    [
        (
            "collapse",
            probes(2, token_correlation=0.969, effective_rank=1.2),
            "collapse: token correlation 0.969 (threshold 0.95) with an effective rank of 1.2",
        ),
        ("non_finite", [{"step": 7, "loss": math.nan}], "non_finite: loss is not a finite number"),
        (
            "depth_inversion",
            probes(2, depth_gain={"shallow": 2.0, "deep": 2.125, "depth": 8}),
            "depth_inversion: harm of depth 0.125 (threshold 0.05) nats: loss after 8 iterations over that after one",
        ),
    ],
)
def test_a_finding_is_a_sentence_for_people(name: str, records: list[Record], sentence: str) -> None:
    assert findings(name, records)[0].sentence == sentence
