"""How early the monitor sees a recurrent model fall: small runs that fail, and small runs that do not.

Makes its data from the standard library's sources, trains every run by `rookery train` in mode `observe` on one rank,
and lets the monitor judge the records. For a run that fails: the detector that fires first, and how many steps before
the loss shows it (6 standard deviations above the mean of the last 128 steps) and before the token correlation is above
0.95 for good. For a healthy run: the alarms. Runs that are finished are not trained again.

    python -m benchmarks.bad_runs --workdir runs/bad-runs [--images docs/images] [--only NAME...]
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import machine, publish
from benchmarks.svg_plot import Curve, Mark, draw
from monitoring.monitor import Decision, Monitor
from monitoring.runlog import read_metrics
from pipeline.config import load_config
from rookery.display import StageDisplay
from rookery.smoke import Smoke

VOCAB_SIZE, SEQUENCE_LENGTH = 512, 64
WINDOW, SIGMAS = 128, 6.0
COLLAPSED = 0.95
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: a shipped configuration with changes, and what it is for: bad, healthy, or setting of thresholds."""

    name: str
    kind: str
    config: str
    changes: tuple[str, ...] = field(default=())


def _healthy(name: str, *changes: str) -> Run:
    rest = ("optimizer.learning_rate=1e-3", "schedule.warmup_steps=20", "train.steps=200")
    return Run(f"healthy-{name}", "healthy", "collapse", (*rest, *changes))


SETTING = (
    _healthy("setting-1", "seed=1"),
    _healthy("setting-2", "seed=2", "optimizer.learning_rate=3e-3"),
)
"""Thresholds were set on runs like these and on bad runs of other seeds; they do not count."""
BAD = (
    Run("collapse", "bad", "collapse", ("seed=12",)),
    Run("collapse-1e-2", "bad", "collapse", ("seed=11", "optimizer.learning_rate=1e-2")),
    Run("collapse-at-once", "bad", "collapse", ("seed=13", "optimizer.learning_rate=3e-2", "schedule.warmup_steps=10")),
    Run("bad-run-1", "bad", "bad-run-1", ("seed=14",)),
    Run("bad-run-2", "bad", "bad-run-2", ("seed=15",)),
    Run("state-explosion", "bad", "state-explosion", ("seed=16",)),
)
HEALTHY = (
    _healthy("seed-21", "seed=21"),
    _healthy("seed-22", "seed=22"),
    _healthy("seed-23", "seed=23", "optimizer.learning_rate=2e-3"),
    _healthy("rate-5e-4", "seed=24", "optimizer.learning_rate=5e-4"),
    _healthy("ellis-adam", "seed=25", "optimizer.kind=ellis_adam", "optimizer.eps=1e-6"),
    _healthy("muon", "seed=26", "optimizer.kind=muon"),
    _healthy("diagonal", "seed=27", "model.injection=diagonal"),
    _healthy("per-sequence", "seed=28", "depth.scope=per_sequence"),
    _healthy("narrow", "seed=29", "model.n_embd=64", "model.intermediate_size=192"),
    _healthy("shallow", "seed=30", "depth.mean_recurrence=4"),
    _healthy("deep", "seed=31", "depth.mean_recurrence=12", "train.steps=120"),
    _healthy("two-core-layers", "seed=32", "model.n_layers_in_recurrent_block=2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/bad-runs"), help="data and runs; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; default: WORKDIR/bad_runs.json")
    parser.add_argument("--images", type=Path, help="directory for one SVG file a bad run")
    parser.add_argument("--only", nargs="+", help="names of runs")
    options = parser.parse_args()
    workdir = options.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    runs = [run for run in (*BAD, *HEALTHY, *SETTING) if not options.only or run.name in options.only]
    make_data(workdir)
    judged = {}
    for run in runs:
        train(workdir, run)
        judged[run.name] = judge(workdir, run)
        print(f"{run.name}: {judged[run.name]}", flush=True)
        if options.images and run.kind == "bad":
            plot(options.images / f"{run.name}.svg", workdir, run, judged[run.name])
    report(options.out or workdir / "bad_runs.json", runs, judged)


def make_data(workdir: Path) -> None:
    """Make tokenizer and both datasets, unless they are there."""
    if not (workdir / "corpus").exists():
        with StageDisplay(total=1) as display:
            Smoke(workdir, display).corpus()
    if not (workdir / "tokenizer").exists():
        made = ["--input", "corpus/train.list", "--vocab-size", str(VOCAB_SIZE), "--out", "tokenizer"]
        rookery(workdir, "data", "train-tokenizer", *made)
    for name in ("train", "validation"):
        if not (workdir / "data" / name).exists():
            made = ["--input", f"corpus/{name}.list", "--tokenizer", "tokenizer", "--out", f"data/{name}"]
            rookery(workdir, "data", "build", *made, "--sequence-length", str(SEQUENCE_LENGTH))


def train(workdir: Path, run: Run) -> None:
    """Train a run to its end, or to where it fails; a finished one returns at once."""
    changes = [f"name={run.name}", f"run_dir={run.name}", "monitor.mode=observe", *run.changes]
    rookery(workdir, "train", run.config, *changes, check=False)


def rookery(workdir: Path, *arguments: str, check: bool = True) -> None:
    """Run a command of `rookery` in `workdir`."""
    with (workdir / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "rookery", *arguments]
        subprocess.run(command, cwd=workdir, stdout=log, stderr=log, check=check)


def judge(workdir: Path, run: Run) -> dict[str, Any]:
    """Return the alarms of a run, and when other signs showed its failure."""
    records, config = read_metrics(workdir / run.name), load_config(run.config, [*run.changes])
    monitor = Monitor(config.monitor, mean_recurrence=config.depth.mean_recurrence)
    decisions = [decision for record in records for decision in monitor.after_step(record)]
    # How fast a shared machine was says nothing about the model.
    alarms = [each for each in decisions if each.finding.detector not in ("throughput", "straggler")]
    return {
        "steps": len(records),
        "alarms": [alarm(each) for each in alarms],
        "loss_shows": loss_shows(records),
        "collapsed": collapsed(records),
        "not_a_number": next((record["step"] for record in records if not math.isfinite(record["loss"])), None),
        "last_loss": float(np.mean([record["loss"] for record in records[-20:]])),
        "correlation": records[-1].get("token_correlation"),
        "depth_gain": next((record["depth_gain"] for record in reversed(records) if "depth_gain" in record), None),
    }


def alarm(decision: Decision) -> dict[str, Any]:
    found = decision.finding
    return {"step": found.step, "since": found.since, "detector": found.detector, "action": decision.action} | {
        "value": found.value if math.isfinite(found.value) else None,
        "before": decision.before,
    }


def loss_shows(records: list[Record]) -> int | None:
    """Return the first step whose loss is 6 standard deviations above the mean of up to 128 before it."""
    losses = np.array([record["loss"] for record in records])
    for index in range(WINDOW // 2, len(losses)):
        window = losses[max(0, index - WINDOW) : index]
        if not losses[index] - window.mean() <= SIGMAS * window.std():  # what is no number shows too
            return int(records[index]["step"])
    return None


def collapsed(records: list[Record]) -> int | None:
    """Return the first step from which the token correlation stays above 0.95 to the end, at 5 probes at least."""
    since, count = None, 0
    for record in records:
        correlation = record.get("token_correlation")
        if correlation is None:
            continue
        if correlation > COLLAPSED:
            since, count = since or int(record["step"]), count + 1
        else:
            since, count = None, 0
    return since if count >= 5 else None


def plot(path: Path, workdir: Path, run: Run, judged: dict[str, Any]) -> None:
    """Draw what the loss shows and what the probes show, with the first alarms."""
    records = read_metrics(workdir / run.name)

    def curve(title: str, key: str, log: bool = False, last: bool = False) -> Curve | None:
        points = [(r["step"], r[key][-1] if last else r[key]) for r in records if r.get(key) not in (None, [])]
        usable = [(s, v) for s, v in points if math.isfinite(v) and (v > 0.0 or not log)]
        return Curve(title, [s for s, _ in usable], [v for _, v in usable], log) if usable else None

    curves = (
        curve("loss", "loss"),
        curve("gradient norm", "grad_norm", log=True),
        curve("token correlation", "token_correlation"),
        curve("contraction", "contraction"),
        curve("relative residual after the last iteration", "relative_residual", log=True, last=True),
        curve("RMS of the state after the last iteration", "state_rms", log=True, last=True),
    )
    first = {each["detector"]: each for each in reversed(judged["alarms"])}
    failures = (("collapsed", "collapsed"), ("loss_shows", "loss at 6 sigma"), ("not_a_number", "no number"))
    marks = [Mark(judged[key], text, "failure") for key, text in failures if judged[key] is not None]
    marks += [Mark(each["step"], each["detector"], "alarm") for each in sorted(first.values(), key=lambda a: a["step"])]
    draw(path, run.name, [each for each in curves if each], sorted(marks[:7], key=lambda mark: mark.step))


def report(out: Path, runs: list[Run], judged: dict[str, dict[str, Any]]) -> None:
    """Print the table and write everything down."""
    rows = []
    for run in runs:
        found = judged[run.name]
        first = found["alarms"][0] if found["alarms"] else None
        healing = next((each for each in found["alarms"] if each["action"] in ("rollback", "stop")), None)
        rows.append(
            (
                run.name,
                run.kind,
                f"{first['detector']} {first['step']}" if first else "-",
                f"{healing['step']} to {max(healing['before'], 0)}" if healing else "-",
                found["loss_shows"] or "-",
                _lead(first, found["loss_shows"]),
                found["collapsed"] or "-",
                _lead(first, found["collapsed"]),
                len(found["alarms"]),
            )
        )
    header = ("run", "kind", "first alarm", "rollback", "loss at 6 sigma", "lead", "collapsed", "lead", "alarms")
    alarms = sum(len(judged[run.name]["alarms"]) for run in runs if run.kind == "healthy")
    healthy = sum(run.kind == "healthy" for run in runs)
    title = f"Runs that fail, and {alarms} alarms on {healthy} healthy runs"
    publish(out, title, header, rows, {"machine": machine("torch", "deepspeed"), "runs": judged})


def _lead(first: dict[str, Any] | None, failure: int | None) -> str:
    return "-" if first is None or failure is None else str(failure - first["step"])


if __name__ == "__main__":
    main()
