"""What a checkpoint costs the training, the disk and the restart, against torch.save and against reading the files.

One rank with a real engine (DeepSpeed, float32, AdamW) whose state is three float32 numbers a parameter. Every round
saves that state by `torch.save` and fsync, and in the ways of a run: into the shared directory, with and without
training beside it, with the probe batch's proof, into all tiers. Then it is loaded as at a restart, in turn with
reading the files, from the disk (mincore says whether posix_fadvise has emptied the page cache) and from that cache.
    python -m benchmarks.checkpoint [--preset huginn-150m] [--rounds 3] [--directory DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import mmap
import os
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, median, publish, ratio
from data_prep.build import build_dataset
from data_prep.tokenizer import save_tokenizer, train_tokenizer
from data_prep.world import World
from pipeline.checkpoints.manifest import CheckpointManifest, Progress, checkpoint_name, list_checkpoints
from pipeline.checkpoints.node_directory import NodeTierConfig
from pipeline.checkpoints.proof import ProbeBatch
from pipeline.checkpoints.restart import History, fill, find_checkpoint
from pipeline.checkpoints.saver import LOCAL, MEMORY, SHARED, CheckpointConfig, Saver
from pipeline.config import RunConfig, load_config
from pipeline.engine import (
    base_optimizer,
    build_engine,
    local_fragments,
    loss_scale_state,
    optimizer_step,
    owned_fragments,
    publish_weights,
)
from pipeline.launch import start_process_group, stop_process_group
from pipeline.loader import TrainingData, open_training_data
from pipeline.model import RecurrentDepthModel, reference_name
from pipeline.optim import build_optimizer

VOCABULARY, DEPTH, STEPS = 4096, (1, 1), 2
EVERY = {MEMORY: 2, LOCAL: 3, SHARED: 5}  # so that some step is due in just the tiers that are wanted
LOOK = 0.01  # seconds
SYNCHRONOUS, STEP = "torch.save + fsync", "a step, nothing saved beside it"
DISK, CACHE = "from the disk", "from the page cache"
READ, READ_NEW = "reading the files into memory that is there, {}", "reading the files into new memory, {}"
LOAD = "find_checkpoint and fill, {}"
Seconds = defaultdict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="huginn-150m", help="model; default: huginn-150m")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, default=1, help="of the training and the copy; default: 1")
    parser.add_argument("--tokens", type=int, default=16, help="of a step; default: 16")
    parser.add_argument("--directory", type=Path, help="where to save; default: the directory of temporary files")
    parser.add_argument("--out", "--json", type=Path, default=Path("runs/benchmarks/checkpoint.json"))
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        job = prepare(Path(disk), Path(memory), options)
        save_synchronously(job)  # the first is several times slower than the others
        for _ in range(options.rounds):
            save_in_turn(job)
        stored = sum(file.stat().st_size for file in newest(job).iterdir())
        resident = [share for _ in range(options.rounds) for share in load_in_turn(job)]
        stop_process_group()
    numel = sum(parameter.numel() for parameter in job.engine.module.parameters())
    record = {"state_bytes": job.state_bytes, "checkpoint_bytes": stored, "resident_after_fadvise": resident}
    title = (
        f"Checkpoints of {options.preset}, {numel / 1e6:.0f} M parameters, a state of {job.state_bytes / 1e9:.2f} GB;"
        f" {options.rounds} rounds, {options.threads} thread(s); at most {max(resident):.1%} of the files were"
        " in the page cache when they were read from the disk"
    )
    facts = {"machine": machine("torch", "deepspeed"), **record, "seconds": job.seconds}
    table = [*rows(job.seconds), ["bytes", f"{stored:,}", "the state's", f"{stored / job.state_bytes:.4f}"]]
    publish(options.out, title, ("what", "s", "over", "ratio"), table, facts)


@dataclass
class Job:
    """A run on one rank, as far as its checkpoints need it."""

    config: RunConfig
    data: TrainingData
    engine: Any
    probe: ProbeBatch
    tokens: int
    state_bytes: int = 0
    step: int = 0
    seconds: Seconds = field(default_factory=lambda: defaultdict(list))

    def train(self) -> float:
        """Do a step; return its time."""
        started = time.perf_counter()
        ids = torch.randint(0, VOCABULARY, (1, self.tokens))
        state = self.engine.module.initial_state(torch.tensor([self.step]), self.tokens)
        self.engine.backward(self.engine(ids, state, DEPTH, ids.roll(-1, 1)))
        optimizer_step(self.engine, 1.0)
        return time.perf_counter() - started

    def draft(self, *, proven: bool) -> CheckpointManifest:
        """Return what `rookery train` says of a checkpoint beside its files."""
        module = self.engine.module
        return CheckpointManifest(
            progress=Progress(step=self.step),
            config=dataclasses.asdict(self.config),
            data_fingerprint=self.data.mixture.fingerprint(0),
            tokenizer_sha256=self.data.tokenizer_sha256,
            shapes={reference_name(name): list(value.shape) for name, value in module.named_parameters()},
            loss_scale=loss_scale_state(self.engine),
            proof=self.probe.ask(self.engine) if proven else {},
        )


def prepare(disk: Path, memory: Path, options: argparse.Namespace) -> Job:
    library = Path(sysconfig.get_path("stdlib"))
    texts = (path.read_text(encoding="utf-8") for path in sorted((library / "asyncio").glob("*.py")))
    save_tokenizer(train_tokenizer(texts, VOCABULARY), disk / "tokenizer")
    build_dataset([library / "asyncio"], disk / "tokenizer", 128, disk / "data", World())
    (disk / "run.yaml").write_text(f"""
name: benchmark
run_dir: {disk}/run
model: {options.preset}
depth: {{mean_recurrence: 8, mean_backprop_depth: 4}}
optimizer: {{learning_rate: 1.0e-4}}
data: {{train: {disk}/data, validation: {disk}/data, tokenizer: {disk}/tokenizer}}
train: {{steps: 1000, global_batch_size: 1, micro_batch_size: 1, precision: fp32}}
zero: {{stage: 1}}
""")
    config = load_config(str(disk / "run.yaml"))
    (disk / "local").mkdir()
    config.checkpoint = CheckpointConfig(
        every=EVERY[SHARED],
        keep_last=2,
        keep_best=0,
        keep_healthy=0,
        memory=NodeTierConfig(every=EVERY[MEMORY], keep=1, directory=str(memory)),
        local=NodeTierConfig(every=EVERY[LOCAL], keep=1, directory=str(disk / "local")),
    )
    world, data = World(), open_training_data(config)
    device = start_process_group(world, config.comm)
    torch.set_num_threads(options.threads)
    model = RecurrentDepthModel(config.model)
    model.init_weights(config.seed, config.depth.mean_recurrence)
    engine = build_engine(
        model,
        build_optimizer(config.optimizer, model),
        zero=config.zero,
        comm=config.comm,
        precision=config.train.precision,
        gradient_clipping=config.optimizer.gradient_clipping,
        global_batch_size=1,
        micro_batch_size=1,
        world=world,
    )
    job = Job(config, data, engine, ProbeBatch(config, data, device), options.tokens)
    for _ in range(2):  # the optimizer has its state after the first
        job.train()
    job.state_bytes = sum(tensor.nbytes for tensors in state_of(job).values() for tensor in tensors.values())
    return job


def state_of(job: Job) -> dict[str, dict[str, torch.Tensor]]:
    return {each.parameter: {"weight": each.weight, **each.optimizer_state} for each in local_fragments(job.engine)}


def newest(job: Job) -> Path:
    return list_checkpoints(Path(job.config.run_dir))[-1]


def save_in_turn(job: Job) -> None:
    """Save in every way, each time the whole state, the first time with a saver of its own as after a start."""
    seconds = job.seconds
    seconds[SYNCHRONOUS].append(save_synchronously(job))
    run_dir = Path(job.config.run_dir)
    saver = Saver(job.config.checkpoint, World(), run_dir, "benchmark", lambda: owned_fragments(job.engine, 0), refuse)
    started = time.perf_counter()
    saver.prepare()
    seconds["before the first save, once: memory for the copy"].append(time.perf_counter() - started)
    first = save(job, saver, [SHARED])
    seconds["blocked by the first save: the copy"].append(first.blocked)
    seconds["to the final name, nothing beside it"].append(first.until[SHARED])
    seconds[STEP].append(median([job.train() for _ in range(STEPS)]))
    beside = save(job, saver, [SHARED], train=job.train)
    seconds["blocked by a later save: the copy"].append(beside.blocked)
    seconds["to the final name, beside training"].append(beside.until[SHARED])
    seconds["a step beside a save"].append(median(beside.steps))
    proven = save(job, saver, [MEMORY], proven=True)
    seconds["blocked by a later save: the copy and the probe batch"].append(proven.blocked)
    all_tiers = save(job, saver, [MEMORY, LOCAL, SHARED])
    for tier, until in all_tiers.until.items():
        seconds[f"to the final name in tier {tier}, all being due"].append(until)
    saver.close()


def save_synchronously(job: Job) -> float:
    path = Path(job.config.run_dir).parent / "state.pt"
    started = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state_of(job), file)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - started
    path.unlink()
    return took


@dataclass
class Saved:
    """How a save went: seconds in calls of the saver, until the final name in each tier, and of the steps beside it."""

    blocked: float
    until: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)


def save(
    job: Job, saver: Saver, tiers: list[str], *, proven: bool = False, train: Callable[[], float] | None = None
) -> Saved:
    """Save as `rookery train` does, at a step at which just these tiers are due; `train` while it goes on."""
    job.step += 1
    while [tier.name for tier in saver.due(job.step)] != tiers:
        job.step += 1
    finals = {tier.name: tier.directory / checkpoint_name(job.step) for tier in saver.due(job.step)}
    started = time.perf_counter()
    saver.save(job.step, lambda: job.draft(proven=proven))
    saved = Saved(blocked=time.perf_counter() - started)
    while saver.under_way:
        if train is not None:
            saved.steps.append(train())
        else:
            time.sleep(LOOK)
        looked = time.perf_counter()
        saver.advance(saver.reports())
        now = time.perf_counter()
        saved.blocked += now - looked
        for tier in finals.keys() - saved.until.keys():
            if finals[tier].is_dir():
                saved.until[tier] = now - started
    return saved


def refuse(kind: str, **fields: Any) -> None:
    if kind != "checkpoint":
        raise RuntimeError(f"{kind}: {fields}")


def load_in_turn(job: Job) -> list[float]:
    """Read and load the newest checkpoint, cold and warm; return what share of it the page cache held when cold."""
    seconds, resident = job.seconds, list[float]()
    files = sorted(newest(job).iterdir())
    room = max(file.stat().st_size for file in files)
    memory = bytearray(b"1") * room  # all of it touched
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "the disk, read": lambda: {READ.format(DISK): read(files, memory)},
        "the disk, new memory": lambda: {READ_NEW.format(DISK): read(files, mmap.mmap(-1, room))},
        "the disk, load": lambda: load(job, DISK),
        "read": lambda: {READ.format(CACHE): read(files, memory)},
        "read, new memory": lambda: {READ_NEW.format(CACHE): read(files, mmap.mmap(-1, room))},
        "load": lambda: load(job, CACHE),
    }
    for name, case in cases.items():
        if name.startswith("the disk"):
            resident.append(forget(files))
        for what, took in case().items():
            seconds[what].append(took)
    return resident


def read(files: list[Path], memory: bytearray | mmap.mmap) -> float:
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            place = 0
            while count := file.readinto(memoryview(memory)[place:]):
                place += count
    return time.perf_counter() - started


def load(job: Job, where: str) -> dict[str, float]:
    """Load as at a restart, into an engine without a state of the optimizer."""
    run_dir, world = Path(job.config.run_dir), World()
    base_optimizer(job.engine).state.clear()
    times = [time.perf_counter()]
    found = find_checkpoint(job.config.checkpoint, world, run_dir, "", History())
    reader = found.open(world, run_dir, other_owners=False)
    times.append(time.perf_counter())
    fill(job.engine, reader)
    times.append(time.perf_counter())
    publish_weights(job.engine)
    times.append(time.perf_counter())
    return {
        LOAD.format(where): times[2] - times[0],
        f"of it, find_checkpoint, {where}": times[1] - times[0],
        f"of it, fill, {where}": times[2] - times[1],
        f"publish_weights, {where}": times[3] - times[2],
    }


def forget(files: list[Path]) -> float:
    """Have the page cache forget files that are on the disk; return what share of them it still holds."""
    held = total = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:  # private, and never touched
                first = ctypes.c_char.from_buffer(mapped)
                pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
                if libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages):
                    raise OSError(ctypes.get_errno(), "mincore", str(path))
                del first
            held += sum(page & 1 for page in pages)
            total += len(pages)
    return held / total


def rows(seconds: Seconds) -> list[list[str]]:
    """Return a row for a measure and each that it is compared with, in its round."""
    against = {STEP: [STEP], "a step beside a save": [STEP]}
    for where in (DISK, CACHE):
        against |= {name: [READ.format(where)] for name in seconds if name.endswith(where)}
    for where in (DISK, CACHE):
        against[LOAD.format(where)] = [READ.format(where), READ_NEW.format(where)]
    return [
        [name, f"{median(values):.3f}", base if base != name else "", f"{ratio(values, seconds[base]):.3f}"]
        for name, values in seconds.items()
        for base in against.get(name, [SYNCHRONOUS])
    ]


if __name__ == "__main__":
    main()
