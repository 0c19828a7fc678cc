"""Does a run that is driven into collapse bring itself back? Poisoned data, and a learning rate that jumps.

    python -m benchmarks.recovery [--steps N] [--out FILE]

Five runs of the shipped configuration `collapse` at a rate that is healthy, if only just: one clean; two that
meet a window of poisoned samples; two whose rate is multiplied for some steps, whenever they come there. Of each
pair one acts on what its monitor finds and one only watches. What counts is the validation loss in the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness import arguments, machine, publish
from monitoring.runlog import read_attempt, read_events

RATE = 5e-3
BATCH, ROW, VOCABULARY = 8, 64, 512
POISONED = 24  # steps
SPIKE, SPIKED = 10.0, 12  # factor, steps
CASES = {
    "clean": ("none", "act"),
    "poisoned data": ("poison", "act"),
    "poisoned data, only observed": ("poison", "observe"),
    "rate spike": ("spike", "act"),
    "rate spike, only observed": ("spike", "observe"),
}


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        train_broken(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
        return
    options = arguments(__doc__ or "", steps=400)
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        build_data(workdir)
        with ThreadPoolExecutor(2) as pool:  # one core each
            runs = list(pool.map(lambda case: run(workdir, *CASES[case], options.steps), CASES))
    seen = dict(zip(CASES, runs, strict=True))
    clean = seen["clean"]["loss"]
    rows = [
        [
            case,
            "finished" if found["code"] == 0 else f"exit {found['code']}",
            f"{found['loss']:.4f}",
            f"{(found['loss'] / clean - 1) * 100:+.2f} %",
            ", ".join(found["rollbacks"]) or "none",
            str(found["skipped"]),
        ]
        for case, found in seen.items()
    ]
    header = ("run", "ended", "validation loss", "against clean", "rollbacks (detector: from -> to)", "updates skipped")
    title = f"Recovery, {options.steps} steps at rate {RATE:g}; fault at step {fault_step(options.steps)}"
    publish(options.out, title, header, rows, {"machine": machine("torch", "deepspeed"), "runs": seen})


def fault_step(steps: int) -> int:
    """Return the first step that goes wrong."""
    return steps // 2


def build_data(workdir: Path) -> None:
    """Make tokenizer, training and validation data of real text."""
    library = Path(sysconfig.get_path("stdlib"))
    text = [str(library / part) for part in ("asyncio", "email", "json", "logging", "unittest")]
    rookery(workdir, "data", "train-tokenizer", "--input", *text, "--vocab-size", str(VOCABULARY), "--out", "tokenizer")
    for out, inputs in {"train": text, "validation": [str(library / "http")]}.items():
        build = ["data", "build", "--tokenizer", "tokenizer", "--sequence-length", str(ROW), "--out", f"data/{out}"]
        rookery(workdir, *build, "--input", *inputs)


def run(workdir: Path, fault: str, mode: str, steps: int) -> dict[str, Any]:
    """Train one case and return how it ended."""
    name, first = f"{fault}-{mode}", fault_step(steps)
    settings = [
        f"run_dir={name}",
        f"train.steps={steps}",
        f"optimizer.learning_rate={RATE}",
        "schedule.cooldown_steps=50",
        f"monitor.mode={mode}",
        "monitor.probe_every=2",
        "checkpoint.every=20",
        "checkpoint.keep_healthy=4",
        f"validation={{every: {steps // 4}, depths: [1, 8], budget: 0.05}}",
    ]
    command = [sys.executable, "-m", "benchmarks.recovery", "rank", fault, str(first), "collapse", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    log = (workdir / f"{name}.log").open("w")
    code = subprocess.run(command, cwd=workdir, env=environment, stdout=log, stderr=log, check=False).returncode
    records = read_attempt(workdir / name, 1)
    events = read_events(workdir / name)
    validated = [record["validation"]["8"] for record in records if "validation" in record]
    return {
        "code": code,
        "loss": float(validated[-1]) if validated and records[-1]["step"] == steps else float("nan"),
        "rollbacks": [
            f"{event['detector']}: {event['from_step']} -> {event['to_step']}"
            for event in events
            if event["kind"] == "rollback"
        ],
        "findings": [
            [event["step"], event["detector"], event["action"]] for event in events if event["kind"] == "finding"
        ],
        "skipped": sum(bool(record.get("skipped")) for record in records),
        "losses": [[record["step"], record["loss"], record["branch"]] for record in records],
    }


def rookery(workdir: Path, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "rookery", *words]
    subprocess.run(command, cwd=workdir, env=environment, check=True, stdout=subprocess.DEVNULL)


def train_broken(fault: str, first: int, words: list[str]) -> None:
    """Be `rookery train`, in which something goes wrong from step `first` (from 0) on."""
    import pipeline.agenda
    from pipeline.loader import Loader, MicroBatch, Share
    from pipeline.schedules import learning_rate_ratio
    from rookery.cli import main as rookery_main

    read = Loader._read  # noqa: SLF001

    def ratio(config: Any, step: int, total: int) -> float:
        return learning_rate_ratio(config, step, total) * (SPIKE if first <= step < first + SPIKED else 1.0)

    def poisoned(self: Loader, share: Share) -> list[MicroBatch]:
        batches = read(self, share)
        for batch in batches:
            bad = (batch.samples >= first * BATCH) & (batch.samples < (first + POISONED) * BATCH)
            noise = torch.Generator().manual_seed(int(batch.samples[0]))
            for tokens in (batch.input_ids, batch.labels):
                tokens[bad] = torch.randint(VOCABULARY, tokens[bad].shape, generator=noise)
        return batches

    sys.argv = ["rookery", "train", *words]
    with ExitStack() as faults:
        if fault == "poison":
            faults.enter_context(patch.object(Loader, "_read", poisoned))
        elif fault == "spike":
            faults.enter_context(patch.object(pipeline.agenda, "learning_rate_ratio", ratio))
        raise SystemExit(rookery_main())


if __name__ == "__main__":
    main()
