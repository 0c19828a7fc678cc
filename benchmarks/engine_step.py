"""A whole step of `rookery train` over a bare PyTorch loop of the same model, on one rank and a CPU.

The run is a real one, with its data, agreement, journal, watchdog and log. After each of its steps the bare loop does
one at the same depth, from the same weights: forward, backward, clipping, AdamW. The time of a step of the run is all
that passes between two of them but for checkpoints.
    python -m benchmarks.engine_step [--width 384] [--steps 30]
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import arguments, machine, median, publish, ratio
from data_prep.build import build_dataset
from data_prep.tokenizer import save_tokenizer, train_tokenizer
from data_prep.world import World
from monitoring.runlog import Record
from pipeline.config import RunConfig, load_config
from pipeline.model import RecurrentDepthModel
from pipeline.train import train

STAGES = (0, 1, 2, 3)
VOCABULARY, LENGTH, MICRO, BATCH = 4096, 256, 2, 4
WARM_UP = 3


def main() -> None:
    options = arguments(__doc__ or "", width=384, steps=30)
    seconds: dict[str, list[float]] = {}
    losses = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        prepare(root)
        for stage in STAGES:
            config = configure(root, options.width, options.steps + WARM_UP, stage)
            engine, bare, losses[stage] = both(config)
            seconds |= {f"engine, stage {stage}": engine, f"bare loop beside stage {stage}": bare}
    table = []
    for stage in STAGES:
        engine, bare = seconds[f"engine, stage {stage}"], seconds[f"bare loop beside stage {stage}"]
        times = f"{1e3 * median(engine):.1f}", f"{1e3 * median(bare):.1f}"
        table.append([str(stage), *times, f"{ratio(engine, bare):.3f}", f"{losses[stage]:.4f}"])
    title = (
        f"A step of {BATCH // MICRO} x {MICRO} x {LENGTH} tokens, width {options.width}, fp32, {options.steps} steps"
    )
    header = ("ZeRO stage", "run, ms", "bare loop, ms", "ratio", "first loss of the run")
    publish(options.out, title, header, table, {"machine": machine("torch", "deepspeed"), "seconds": seconds})


def prepare(root: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    texts = (path.read_text(encoding="utf-8") for path in sorted((library / "asyncio").glob("*.py")))
    save_tokenizer(train_tokenizer(texts, VOCABULARY), root / "tokenizer")
    for name, part in (("train", "asyncio"), ("validation", "json")):
        build_dataset([library / part], root / "tokenizer", LENGTH, root / "data" / name, World())


def configure(root: Path, width: int, steps: int, stage: int) -> RunConfig:
    file = root / f"stage-{stage}.yaml"
    file.write_text(f"""
name: stage-{stage}
run_dir: {root}/run-{stage}
model:
  {{n_embd: {width}, n_heads: {width // 64}, intermediate_size: {3 * width}, vocab_size: {VOCABULARY},
   block_size: {LENGTH}, n_layers_in_prelude: 1, n_layers_in_recurrent_block: 2, n_layers_in_coda: 1}}
depth: {{mean_recurrence: 8, mean_backprop_depth: 4}}
optimizer: {{learning_rate: 1.0e-4}}
data: {{train: {root}/data/train, validation: {root}/data/validation, tokenizer: {root}/tokenizer}}
train:
  {{steps: {steps}, global_batch_size: {BATCH}, micro_batch_size: {MICRO}, precision: fp32,
   activation_checkpointing: iteration}}
monitor: {{probe_every: 1000000}}
zero: {{stage: {stage}}}
checkpoint: {{every: 1000000}}
""")
    return load_config(str(file))


def both(config: RunConfig) -> tuple[list[float], list[float], float]:
    """Return the seconds of the run's steps and of the bare loop's, and the first loss of the run."""
    engine, bare, records, step = list[float](), list[float](), list[Record](), bare_loop(config)
    began = time.perf_counter()

    def on_step(record: Record) -> None:
        nonlocal began
        now = time.perf_counter()
        step(record)
        records.append(record)
        if len(records) > WARM_UP:
            engine.append(now - began)
            bare.append(time.perf_counter() - now)
        began = time.perf_counter()

    train(config, World(), on_step)
    return engine, bare, records[0]["loss"]


def bare_loop(config: RunConfig) -> Callable[[Record], None]:
    model = RecurrentDepthModel(config.model, activation_checkpointing=config.train.activation_checkpointing)
    model.init_weights(config.seed, config.depth.mean_recurrence)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (MICRO, LENGTH), generator=torch.Generator().manual_seed(0))
    keys, labels = torch.arange(MICRO), ids.roll(-1, 1)

    def step(record: Record) -> None:
        depth = tuple(record["num_steps"])
        for _ in range(BATCH // MICRO):
            loss = model(ids, model.initial_state(keys, LENGTH), depth, labels)
            (loss * MICRO / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
