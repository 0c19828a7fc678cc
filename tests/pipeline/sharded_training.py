"""Run on every rank by tests: trains a tiny model by all ways of sharding, and writes down what came of each.

    mpiexec -n WORLD python -m tests.pipeline.sharded_training OUT SUITE

SUITE is a name in SUITES. LOCAL_WORLD_SIZE says which ranks are a node. OUT/NAME/ of every case holds its loss curve,
and the checkpoint after its last step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from data_prep.world import World
from pipeline import two_level
from pipeline.checkpoints.manifest import CheckpointManifest, Progress
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from pipeline.checkpoints.restart import fill
from pipeline.depth import Depth
from pipeline.engine import (
    ZeroConfig,
    build_engine,
    loss_scale_state,
    optimizer_step,
    owned_fragments,
    publish_weights,
    set_accumulation,
    set_learning_rate,
    step_skipped,
)
from pipeline.journal import Traffic, journal
from pipeline.launch import CommConfig, start_process_group, stop_process_group
from pipeline.model import ModelConfig, RecurrentDepthModel, reference_name
from pipeline.optim import OptimizerConfig, build_optimizer
from pipeline.two_level import BETWEEN_NODES
from tests.pipeline.saved_checkpoint import save_checkpoint

STEPS = 12
BATCH, LENGTH, VOCABULARY = 8, 8, 50
CLIPPING = 10.0
# Odd sizes, so that the ranks' equal ranges cut the tensors.
MODEL = ModelConfig(
    n_embd=20,
    n_heads=2,
    intermediate_size=28,
    vocab_size=VOCABULARY,
    block_size=LENGTH,
    n_layers_in_prelude=1,
    n_layers_in_recurrent_block=1,
    n_layers_in_coda=0,
)
OPTIMIZERS = {
    kind: OptimizerConfig(
        kind=kind,
        learning_rate=3e-3,
        eps=1e-6,
        weight_decay=0.01,
        decoupled_weight_decay=True,
        gradient_clipping=CLIPPING,
    )
    for kind in ("adamw", "ellis_adam", "muon")
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train.

    Attributes:
        resumes: the case from whose checkpoint at half time it goes on.
        same_bits_as: the case whose bits it must have; it ends at half time.
    """

    name: str
    stage: int
    scope: str = "world"
    kind: str = "adamw"
    precision: str = "fp32"
    offload: bool = False
    overlap: bool = True
    transport: str = "collective"
    resumes: str | None = None
    same_bits_as: str | None = None

    def label(self) -> str:
        """What is special about it."""
        extras = [self.kind, f"stage {self.stage}", self.scope]
        extras += ["offload"] if self.offload else []
        extras += [] if self.overlap else ["not overlapped"]
        extras += [self.transport] if self.transport != "collective" else []
        extras += [f"from {self.resumes}"] if self.resumes else []
        return ", ".join(extras)


_WORLD = [Case(name=f"world-{stage}", stage=stage) for stage in range(4)]
_NODE = [Case(name=f"node-{stage}", stage=stage, scope="node") for stage in range(4)]
SUITES = {
    "one": [*_WORLD, Case(name="again", stage=1, same_bits_as="world-1")],
    "two": [
        *_WORLD,
        *_NODE,
        Case(name="again", stage=3, same_bits_as="world-3"),
        *(Case(name=f"{kind}-2", stage=2, kind=kind) for kind in ("ellis_adam", "muon")),
        # To another stage and scope, with another home of the state.
        Case(name="resumed-1", stage=3, scope="node", resumes="world-1"),
        Case(name="resumed-2", stage=0, resumes="node-3"),
        Case(name="resumed-3", stage=1, offload=True, resumes="node-2"),
        Case(name="ellis_adam-resumed", stage=3, kind="ellis_adam", offload=True, resumes="ellis_adam-2"),
        Case(name="muon-resumed", stage=1, kind="muon", offload=True, resumes="muon-2"),
        Case(name="muon-back", stage=3, kind="muon", resumes="muon-resumed"),
        Case(name="bf16-world", stage=1, precision="bf16"),
        Case(name="bf16-node", stage=1, scope="node", precision="bf16"),
    ],
    "four": [
        *_WORLD,
        *_NODE,
        # Whatever is overlapped, and whatever carries the messages.
        Case(name="waits-1", stage=1, scope="node", overlap=False, same_bits_as="node-1"),
        Case(name="mpi-2", stage=2, scope="node", transport="mpi", same_bits_as="node-2"),
        Case(name="mpi-waits-3", stage=3, scope="node", overlap=False, transport="mpi", same_bits_as="node-3"),
        Case(name="offload-3", stage=3, scope="node", offload=True),
        Case(name="muon-3", stage=3, scope="node", kind="muon"),
    ],
    "fp16": [
        Case(name="fp16-1", stage=1, precision="fp16"),
        Case(name="fp16-2-node", stage=2, scope="node", precision="fp16", offload=True),
        Case(name="fp16-3-node", stage=3, scope="node", precision="fp16"),
        Case(name="fp16-1-resumed", stage=1, precision="fp16", resumes="fp16-1"),
        Case(name="muon-fp16", stage=1, kind="muon", precision="fp16"),
        Case(name="muon-fp16-resumed", stage=1, kind="muon", precision="fp16", resumes="muon-fp16"),
    ],
}


def new_model(seed: int) -> RecurrentDepthModel:
    model = RecurrentDepthModel(MODEL)
    model.init_weights(seed, 4.0)
    return model


def batch_size(step: int) -> int:
    """Twice as large for a while, which is two micro-batches a rank instead of one."""
    return BATCH if STEPS // 4 <= step < STEPS // 2 else BATCH // 2


def batch_of(step: int, samples: slice) -> tuple[torch.Tensor, torch.Tensor, list[Depth], torch.Tensor]:
    """Samples of the step's global batch, the same for any world size; every sample has a depth of its own."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    state = torch.randn(BATCH, LENGTH, MODEL.n_embd, generator=generator)
    depths = [Depth(step % 3 + sample % 2, 1 + step % 2) for sample in range(BATCH)]
    return ids[samples, :-1], state[samples], depths[samples], ids[samples, 1:]


def loss_scale_of(step: int) -> float:
    """Gradients that jump, so that update clipping and global clipping have something to do."""
    return 20.0 if step % 6 == 5 else 1.0


def rate_of(step: int) -> float:
    return OPTIMIZERS["adamw"].learning_rate * min(1.0, (step + 1) / 4)


class Run:
    """A case in progress."""

    def __init__(self, case: Case, world: World) -> None:
        self.case, self.world = case, world
        model = new_model(1 if case.resumes is None else 2)
        self.engine = build_engine(
            model,
            build_optimizer(OPTIMIZERS[case.kind], model),
            zero=ZeroConfig(stage=case.stage, scope=case.scope, offload_optimizer=case.offload),
            comm=CommConfig(chunk_mb=1, overlap=case.overlap, transport=case.transport),
            precision=case.precision,
            gradient_clipping=CLIPPING,
            global_batch_size=BATCH,
            micro_batch_size=BATCH // 2 // world.size,
            world=world,
        )
        self.losses: list[float] = []
        self.scales: list[float] = []
        self.skipped: list[bool] = []
        self.begun: list[int] = []
        if case.scope == "node" and case.stage > 0:
            last = next(model.parameters())  # the embedding, which the backward pass reaches last
            average = self.engine.rookery_average
            last.register_post_accumulate_grad_hook(lambda _: self.begun.append(average.begun))

    def train(self, steps: range) -> None:
        micro = BATCH // 2 // self.world.size
        kind = next(self.engine.module.parameters()).dtype
        for step in steps:
            set_learning_rate(self.engine, rate_of(step))
            set_accumulation(self.engine, batch_size(step) // micro // self.world.size)
            total = 0.0
            for first in range(self.world.rank * micro, batch_size(step), self.world.size * micro):
                ids, state, depths, labels = batch_of(step, slice(first, first + micro))
                loss = self.engine(ids, state.to(kind), depths, labels)
                self.engine.backward(loss * loss_scale_of(step))
                optimizer_step(self.engine, CLIPPING)
                total += float(loss.detach()) * micro
            self.losses.append(total / batch_size(step))
            self.skipped.append(step_skipped(self.engine))
            self.scales.append(loss_scale_state(self.engine).get("cur_scale", 1.0))

    def save(self, out: Path, step: int) -> None:
        shapes = {reference_name(name): list(value.shape) for name, value in new_model(1).named_parameters()}
        save_checkpoint(
            out,
            self.world,
            owned_fragments(self.engine, self.world.rank),
            CheckpointManifest(
                progress=Progress(step=step),
                config={},
                data_fingerprint="",
                tokenizer_sha256="",
                shapes=shapes,
                loss_scale=loss_scale_state(self.engine),
            ),
        )

    def restore(self, reader: CheckpointReader) -> None:
        fill(self.engine, reader)
        publish_weights(self.engine)


def run(case: Case, out: Path, world: World) -> None:
    trained, half, before = Run(case, world), STEPS // 2, journal.traffic()
    if case.resumes is None:
        trained.train(range(half))
    else:
        trained.restore(resolve_checkpoint(out / f"{case.resumes}-half"))
    trained.save(out / f"{case.name}-half", half)
    if case.same_bits_as is None:
        trained.train(range(half, STEPS))
        trained.save(out / case.name, STEPS)
    losses = world.sum(np.array(trained.losses)).tolist()
    levels = trained.engine.rookery_levels
    for group in () if levels is None else (levels.node, levels.between):  # each has threads of its own
        torch.distributed.destroy_process_group(group)
    if world.rank == 0:
        chunks = getattr(trained.engine.rookery_average, "chunks", [])
        record = {key: getattr(trained, key) for key in ("scales", "skipped", "begun")}
        sent = [traffic.get(BETWEEN_NODES, Traffic()).bytes for traffic in (before, journal.traffic())]
        record |= {"losses": losses, "chunks": len(chunks), "sent": sent[1] - sent[0]}
        (out / f"{case.name}.json").write_text(json.dumps(record))


def main(out: Path, suite: str) -> None:
    two_level.MEGABYTE = 4 * 1024  # so that a shard is several chunks, and a backward pass several buckets
    world = World.discover()
    start_process_group(world)
    if suite == "fp16":
        from deepspeed.accelerator import get_accelerator

        # PyTorch computes in fp16 on any CPU, if slowly; DeepSpeed asks for the fast instructions.
        get_accelerator().is_fp16_supported = lambda: True
    for case in SUITES[suite]:
        run(case, out, world)
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
