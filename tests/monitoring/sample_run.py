"""A run directory as training writes it: two attempts that overlap, probes, evaluations, events."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import orjson

from monitoring.runlog import Record, RunLog

TOKENS_PER_STEP = 2048
CORE_ITERATIONS = 16
START = 1_800_000_000.0
"""Unix seconds of step 0."""
PROBE_EVERY = 10
ROLLED_BACK_TO = 0.6
"""Share of `build_long_run`'s steps that it goes back to, after a twentieth more, and on from in a new branch."""

_TENSORS = [
    f"transformer.{part}.{i}.{kind}.weight"
    for part in ("prelude", "core_block", "coda")
    for i in range(2)
    for kind in ("attn.Wqkv", "attn.proj", "mlp.fc", "mlp.proj")
]


def step_record(step: int, seed: int = 0) -> Record:
    """What training logs for a step: a pure function of (seed, step), as a real step is."""
    draw = random.Random(seed * 1_000_003 + step)
    r = min(1 + int(draw.lognormvariate(math.log(7), 0.6)), 64)
    seconds = 0.05 + 0.01 * r
    record: Record = {
        "step": step,
        "time": START + step,
        "loss": 4.2 + 4.1 * math.exp(-step / 30) + 0.4 / r + draw.gauss(0, 0.05),
        "grad_norm": 0.6 + 2.0 * math.exp(-step / 20) + abs(draw.gauss(0, 0.1)),
        "lr": 3e-3 * min(step / 20, 1.0),
        "num_steps": [max(r - 4, 0), min(r, 4)],
        "tokens": step * TOKENS_PER_STEP,
        "seconds": seconds,
        "tokens_per_second": TOKENS_PER_STEP / seconds,
    }
    if step % 10 == 0:
        record |= recurrence(step)
    return record


def recurrence(step: int) -> Record:
    rate = 0.55 + 0.1 * math.exp(-step / 50)
    return {
        "state_rms": [1.0 + 0.05 * math.log(i) for i in range(1, CORE_ITERATIONS + 1)],
        "relative_residual": [1.2 * rate**i for i in range(1, CORE_ITERATIONS + 1)],
    }


def full_record(step: int, total: int, branch: int = 0) -> Record:
    """Return a record with every field there is, about 1 kB; a pure function of its arguments.

    The gradient norm spikes at every 997th step, which is vetoed at every 4985th; the token correlation rises before
    the run goes back.
    """
    record = step_record(step) | {"sample_hash": f"{step:016x}", "samples": step * 8, "branch": branch}
    far = step / total
    n, k = record["num_steps"]
    seconds = record["seconds"] * (1.4 if 0.3 < far < 0.31 else 1.0)
    record |= {"loss": 2.1 + 2.0 * math.exp(-8 * far) + 0.3 / (n + k) + (record["loss"] % 0.1), "attempt": 1}
    record |= {"lr": 3e-3 * min(50 * far, 1.0), "mfu": 0.41, "hfu": 0.52, "seconds": seconds}
    record |= {"expected_seconds": record["seconds"] / (1.4 if 0.3 < far < 0.31 else 1.0)}
    record["phases"] = {"load": 0.001, "forward": 0.3 * seconds, "backward": 0.5 * seconds, "update": 0.1 * seconds}
    if step % 997 == 0:
        record["grad_norm"] *= 30.0
    if step % 4985 == 0:
        record["skipped"] = True
    if step % PROBE_EVERY == 0:
        record |= _probes(step, far, branch)
    if step % 100 == 0:
        record["depth_gain"] = {"shallow": record["loss"] + 0.4 * far, "deep": record["loss"], "depth": 8}
    if step % 50 == 0:
        record["nodes"] = {
            f"node{i:03d}": 1.0 + 0.01 * (i % 5) + (0.3 if i == 7 and far > 0.5 else 0.0) for i in range(32)
        }
        record["slowest"] = {"rank": 7, "host": "node007", "ratio": 1.3}
    if step % max(total // 200, 1) == 0:
        record["validation"] = {str(r): record["loss"] + 0.5 * math.exp(-r / 3) for r in (1, 2, 4, 8, 16, 32)}
    return record


def _probes(step: int, far: float, branch: int) -> Record:
    falling = branch == 0 and far > ROLLED_BACK_TO
    wave = math.sin(step / 700)
    rate = 0.6 + 0.05 * wave + (0.5 if falling else 0.0)
    core = 0.02 if falling else 0.3
    share = {"prelude": 0.2, "adapter": 0.05, "core": core, "coda": 0.2, "embedding": 0.1, "head": 0.45 - core}
    return {
        "state_rms": [(1.0 + 0.1 * wave) * (1.0 + 0.05 * math.log(i)) for i in range(1, 33)],
        "relative_residual": [1.2 * rate**i + 1e-7 for i in range(1, 33)],
        "initial_rms": 0.63, "injected_rms": 1.0 + 0.1 * wave, "first_jump": 1.6, "contraction": rate,
        "token_correlation": 0.9 if falling else 0.2 + 0.05 * wave, "effective_rank": 2.0 if falling else 40.0 + wave,
        "hidden_correlation": 0.2, "hidden_norm": 11.0, "state_norm": 20.0, "state_minus_input": 18.0,
        "state_change": 0.01, "reference_residual": 0.4, "gradient_share": share,
        "optimizer_rms": {name: 1.0 + 0.1 * i / len(_TENSORS) + 0.1 * wave for i, name in enumerate(_TENSORS)},
        "update_ratio": {name: 1e-3 * (1.0 + 0.3 * wave + i / 40) for i, name in enumerate(_TENSORS)},
        "effective_rate": dict.fromkeys(_TENSORS, 1e-2),
        "weight_norm": {"core": 40.0 + far, "embedding": 30.0 + far, "model": 60.0 + 2 * far},
    }  # fmt: skip


def build_long_run(run_dir: Path, steps: int = 100_000) -> Path:
    """Write a run of that many steps with all fields and events: three attempts, one rollback; return `run_dir`."""
    back, killed = int(ROLLED_BACK_TO * steps), int(0.65 * steps)
    parts = [[(1, int(0.4 * steps), 0)], [(int(0.39 * steps), killed, 0), (back, int(0.8 * steps), 1)]]
    parts += [[(int(0.795 * steps), steps + 1, 1)]]
    (run_dir / "metrics").mkdir(parents=True)
    clock, clocks = START, {0: START}
    for attempt, ranges in enumerate(parts, start=1):
        (run_dir / "attempts" / f"{attempt:04d}").mkdir(parents=True)
        with (run_dir / "metrics" / f"{attempt:04d}.jsonl").open("wb") as file:
            for first, after, branch in ranges:
                for step in range(first, after):
                    clock += 0.05 + 0.012 * sum(step_record(step)["num_steps"])
                    clocks[step] = clock
                    place = {"attempt": attempt, "time": clock}
                    file.write(orjson.dumps(full_record(step, steps, branch) | place) + b"\n")
    outcome = {"exit_code": 0, "reason": f"reached step {steps}", "time": clock, "attempt": 3}
    (run_dir / "attempts" / "0003" / "outcome.json").write_bytes(orjson.dumps(outcome))
    (run_dir / "events.jsonl").write_bytes(
        b"".join(orjson.dumps(event) + b"\n" for event in _events(steps, back, killed, clocks))
    )
    (run_dir / "run.yaml").write_text("schema_version: 1\nmodel:\n  name: long\n")
    return run_dir


def _events(steps: int, back: int, killed: int, clocks: dict[int, float]) -> list[Record]:
    every = max(steps // 200, 1)
    shared: dict[str, Any] = {"detector": "collapse", "reason": "token correlation above 0.85"}
    evidence = {"token_correlation": [0.2, 0.6, 0.9, 0.9, 0.9], "effective_rank": [40.0, 9.0, 2.0, 2.0, 2.0]}
    finding = {"action": "rollback", "since": killed - 50, "value": 0.9, "threshold": 0.85, "horizon": 5, "acted": True}
    finding |= {"rule": "token correlation > 0.85 and effective rank < 4 for 5 probes", "evidence": evidence}
    events: list[Record] = [{"kind": "start", "step": 0, "attempt": 1}]
    saved = {"kind": "checkpoint", "tier": "shared", "blocked": 0.2}
    events += [saved | {"step": step, "seconds": 4.0 + step % 3} for step in range(every, steps + 1, every)]
    events += [
        {"kind": "skip", "step": s, "detector": "grad_spike", "reason": "z = 31"} for s in range(4985, steps, 4985)
    ]
    spike = {"kind": "finding", "step": int(0.3 * steps), "detector": "throughput", "action": "warn", "acted": False}
    spike |= {
        "since": int(0.3 * steps) - 20,
        "value": 1.4,
        "threshold": 1.25,
        "horizon": 20,
        "rule": "step time over the fit",
    }
    events += [spike, {"kind": "finding", "step": killed - 1, "detector": "collapse"} | finding]
    events += [
        {"kind": "rollback", "from_step": killed - 1, "to_step": back - 1, "branch": 1, "rate_factor": 0.5} | shared
    ]
    events.sort(key=_place)
    place = {"attempt": 2}
    return [{"time": 1_800_000_000.0 + _place(event)} | place | event for event in events]


def _place(event: Record) -> int:
    place: int = event["from_step"] if "from_step" in event else event["step"]
    return place


def evaluation(step: int, seed: int = 0) -> Record:
    base = 4.2 + 4.1 * math.exp(-step / 30) + 0.02 * seed
    losses = {str(r): base + 0.5 * math.exp(-r / 3) for r in (1, 2, 4, 8, 16)}
    landmarks = {"unigram_entropy": 6.3, "mean_recurrence": 8}
    return {"step": step, "tokens": step * TOKENS_PER_STEP, "loss": losses} | landmarks | recurrence(step)


def build_run(run_dir: Path, steps: int = 100, killed_at: int = 60, resumed_from: int = 50, seed: int = 0) -> Path:
    """Write a run that was killed after a step, resumed from an earlier checkpoint and finished; return `run_dir`."""
    first = RunLog.open(run_dir)
    for step in range(1, killed_at + 1):
        first.step(step_record(step, seed))
        if step % 25 == 0:
            first.event("checkpoint", step=step, seconds=0.4)
    first.close()
    second = RunLog.open(run_dir)
    second.event("start", step=resumed_from, changed={"train.steps": [60, 100]}, passed_over={})
    for step in range(resumed_from + 1, steps + 1):
        second.step(step_record(step, seed) | {"time": START + killed_at + step})
        if step % 25 == 0:
            second.event("checkpoint", step=step, seconds=0.4)
    second.outcome(0, f"reached step {steps}")
    second.close()
    for step in (50, steps):
        path = run_dir / "eval" / f"step-{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(evaluation(step, seed)))
    (run_dir / "run.yaml").write_text(f"schema_version: 1\nseed: {seed}\nmodel:\n  name: tiny\n")
    return run_dir
