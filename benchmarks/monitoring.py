"""What monitoring costs: a step of `rookery train` with all of it over the same step with none, on one rank.

Two runs of the same configuration, seed and data, each in a process of its own, take turns: one does a step while the
other waits. One has the monitor's defaults (digest of the gradients, probes, detectors, policy), the other has
mode=none and never probes. What a step costs more is measured for each kind of step, as the median over pairs of the
same step, and weighted by how often the defaults have that kind; the probes come more often here, so that there are
enough of them. The line that every step leaves in the log is timed in the first run and added: the other writes one
too.
    python -m benchmarks.monitoring [--steps 60] [--smoke-steps 200] [--threads 0]

Wall time needs a machine of one's own. CPU time, over all threads, is told beside it: on a busy machine it is the
better number, with --threads 1.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.engine_step import prepare
from benchmarks.harness import arguments, machine, publish
from data_prep.world import World
from monitoring.config import MonitorConfig
from monitoring.runlog import Record, RunLog
from pipeline.config import load_config
from pipeline.train import train

WARM_UP = 5
PROBE_EVERY, DEPTH_GAIN_EVERY = 5, 20
NEVER = 1_000_000
OFF = f"{{mode: none, probe_every: {NEVER}, depth_gain_every: {NEVER}, pace_every: {NEVER}}}"
ON = f"{{probe_every: {PROBE_EVERY}, depth_gain_every: {DEPTH_GAIN_EVERY}}}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch, of sequences of at most 256 tokens, as many as `prepare` makes."""

    name: str
    width: int
    micro_batch: int
    batch: int


SIZES = (
    Size(name="smoke", width=96, micro_batch=4, batch=8),
    Size(name="larger", width=384, micro_batch=4, batch=8),
)


class Took(NamedTuple):
    """What a step took: wall and CPU seconds, and CPU seconds of them for its line in the log."""

    wall: float
    cpu: float
    log: float


def main() -> None:
    options = arguments(__doc__ or "", steps=60, smoke_steps=200, threads=0)
    rows, seconds = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        prepare(root)
        for size in SIZES:
            steps = options.smoke_steps if size.name == "smoke" else options.steps
            watched, bare = side_by_side(root, size, steps + WARM_UP, options.threads)
            seconds[size.name] = {"with": watched, "without": bare}
            rows.append([f"{size.name}, width {size.width}", *costs(watched, bare)])
    title = f"Monitoring at its defaults over none, {SIZES[0].batch} sequences of 256 tokens a step, fp32, one rank"
    header = ("model", "step, ms", "plain, ms", "probe, ms", "depth gain, ms", "log, ms", "ratio", "ratio, CPU time")
    publish(options.out, title, header, rows, {"machine": machine("torch", "deepspeed"), "seconds": seconds})


def side_by_side(root: Path, size: Size, steps: int, threads: int) -> tuple[list[Took], list[Took]]:
    """Return what each step took with monitoring and without, but for the first few."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for name, monitor in (("with", ON), ("without", OFF)):
        file = configure(root, f"{size.name}-{name}", size, steps, monitor)
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(file, theirs, threads), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
        ours.recv()  # built, and at its first step
    took: tuple[list[Took], list[Took]] = ([], [])
    for step in range(steps):
        for which in (0, 1) if step % 2 else (1, 0):  # neither has the other's caches more often
            pipes[which].send(None)
            took[which].append(pipes[which].recv())
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return took[0][WARM_UP:], took[1][WARM_UP:]


def configure(root: Path, name: str, size: Size, steps: int, monitor: str) -> Path:
    file = root / f"{name}.yaml"
    file.write_text(f"""
name: {name}
run_dir: {root}/run-{name}
model:
  {{n_embd: {size.width}, n_heads: {max(2, size.width // 64)}, intermediate_size: {8 * size.width // 3 // 8 * 8},
   vocab_size: 4096, block_size: 256, n_layers_in_prelude: 1, n_layers_in_recurrent_block: 2, n_layers_in_coda: 1}}
depth: {{mean_recurrence: 8, mean_backprop_depth: 4}}
optimizer: {{learning_rate: 1.0e-4}}
data: {{train: {root}/data/train, validation: {root}/data/validation, tokenizer: {root}/tokenizer}}
train:
  {{steps: {steps + 1}, global_batch_size: {size.batch}, micro_batch_size: {size.micro_batch}, precision: fp32}}
checkpoint: {{every: {NEVER}}}
monitor: {monitor}
""")
    return file


def run(file: Path, pipe: Connection, threads: int) -> None:
    """Train in this process; before every step but the first, wait to be told."""
    if threads:
        torch.set_num_threads(threads)
    log, write = 0.0, RunLog.step
    wall = cpu = 0.0

    def timed(self: RunLog, record: Record) -> None:
        nonlocal log
        began = time.process_time()
        write(self, record)
        log = time.process_time() - began

    def on_step(record: Record) -> None:
        nonlocal wall, cpu
        took = Took(time.perf_counter() - wall, time.process_time() - cpu, log)
        pipe.send(took if record["step"] > 1 else None)
        pipe.recv()
        wall, cpu = time.perf_counter(), time.process_time()

    RunLog.step = timed  # type: ignore[method-assign]
    train(load_config(str(file)), World(), on_step)


def costs(watched: list[Took], bare: list[Took]) -> list[str]:
    """Return the columns of the table for one model."""
    defaults = MonitorConfig()
    gains = 1.0 / defaults.depth_gain_every
    probes = 1.0 / defaults.probe_every
    # The detectors see a step's record after it was logged, which here falls into the next step.
    shares = {"depth gain": gains, "probe": probes - gains, "after": probes, "plain": 1.0 - 2.0 * probes}
    kinds: dict[str, list[int]] = {kind: [] for kind in shares}
    for index in range(len(bare)):
        kinds[kind_of(index + WARM_UP + 2)].append(index)
    log = statistics.median(took.log for took in watched)
    ratios, more = [], dict[str, float]()
    for clock in ("wall", "cpu"):
        ours, theirs = ([getattr(took, clock) for took in each] for each in (watched, bare))
        differences = {
            kind: statistics.median(ours[index] - theirs[index] for index in indices) for kind, indices in kinds.items()
        }
        more = more or differences
        added = sum(share * differences[kind] for kind, share in shares.items())
        ratios.append(f"{1.0 + (added + log) / statistics.mean(theirs):.4f}")
    times = [
        statistics.mean(took.wall for took in bare),
        *(more[kind] for kind in ("plain", "probe", "depth gain")),
        log,
    ]
    return [*(f"{1e3 * value:.2f}" for value in times), *ratios]


def kind_of(step: int) -> str:
    """Return what the first run does in a step."""
    if step % DEPTH_GAIN_EVERY == 0:
        return "depth gain"
    return {0: "probe", 1: "after"}.get(step % PROBE_EVERY, "plain")


if __name__ == "__main__":
    main()
