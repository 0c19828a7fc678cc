"""A run directory as training writes it: two attempts that overlap, probes, evaluations, events."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from monitoring.runlog import Record, RunLog

TOKENS_PER_STEP = 2048
CORE_ITERATIONS = 16


def step_record(step: int, seed: int = 0) -> Record:
    """What training logs for a step: a pure function of (seed, step), as a real step is."""
    draw = random.Random(seed * 1_000_003 + step)
    r = min(1 + int(draw.lognormvariate(math.log(7), 0.6)), 64)
    seconds = 0.05 + 0.01 * r
    record: Record = {
        "step": step,
        "time": 1_800_000_000.0 + step,
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
        second.step(step_record(step, seed))
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
