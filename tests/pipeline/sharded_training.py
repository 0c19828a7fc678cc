"""Run by test_sharded_optimizers on every rank: trains a tiny model with each optimizer at each ZeRO stage.

    mpiexec -n WORLD python -m tests.pipeline.sharded_training OUT

OUT/KIND-STAGE-straight holds the checkpoint after 20 steps, OUT/KIND-STAGE-resumed that of a new engine of the stage
RESUMED[STAGE] that went on from the checkpoint after 10, if there are RESUMED_WORLD ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from data_prep.world import World
from pipeline.checkpoint import WEIGHT, CheckpointReader, Progress, resolve_checkpoint, save_checkpoint
from pipeline.depth import Depth
from pipeline.engine import (
    allocate_optimizer_state,
    build_engine,
    local_fragments,
    optimizer_step,
    owned_fragments,
    publish_weights,
    set_accumulation,
    set_learning_rate,
    start_process_group,
    stop_process_group,
)
from pipeline.model import ModelConfig, RecurrentDepthModel, reference_name
from pipeline.optim import OptimizerConfig, build_optimizer

STEPS = 20
STAGES = (0, 1, 2, 3)
RESUMED = {1: 3, 3: 0}
RESUMED_WORLD = 2
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


def new_model(seed: int) -> RecurrentDepthModel:
    model = RecurrentDepthModel(MODEL)
    model.init_weights(seed, 4.0)
    return model


def batch_size(step: int) -> int:
    """Twice as large for a while, which is two micro-batches a rank instead of one."""
    return BATCH if STEPS // 4 <= step < STEPS // 2 else BATCH // 2


def batch_of(step: int, samples: slice) -> tuple[torch.Tensor, torch.Tensor, Depth, torch.Tensor]:
    """Samples of the step's global batch, the same for any world size; the depth changes from step to step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    state = torch.randn(BATCH, LENGTH, MODEL.n_embd, generator=generator)
    depth = Depth(step % 3, 1 + step % 2)
    return ids[samples, :-1], state[samples], depth, ids[samples, 1:]


def loss_scale_of(step: int) -> float:
    """Gradients that jump, so that update clipping and global clipping have something to do."""
    return 20.0 if step % 6 == 5 else 1.0


def rate_of(step: int) -> float:
    return OPTIMIZERS["adamw"].learning_rate * min(1.0, (step + 1) / 4)


def train(engine: Any, steps: range, world: World) -> None:
    micro = BATCH // 2 // world.size
    for step in steps:
        set_learning_rate(engine, rate_of(step))
        set_accumulation(engine, batch_size(step) // micro // world.size)
        for first in range(world.rank * micro, batch_size(step), world.size * micro):
            loss = engine(*batch_of(step, slice(first, first + micro)))
            engine.backward(loss * loss_scale_of(step))
            optimizer_step(engine, CLIPPING)


def engine_of(kind: str, stage: int, world: World, seed: int) -> Any:
    model = new_model(seed)
    return build_engine(
        model,
        build_optimizer(OPTIMIZERS[kind], model),
        stage=stage,
        precision="fp32",
        gradient_clipping=CLIPPING,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // 2 // world.size,
    )


def save(engine: Any, out: Path, step: int, world: World) -> Path:
    shapes = {reference_name(name): list(value.shape) for name, value in RecurrentDepthModel(MODEL).named_parameters()}
    return save_checkpoint(
        out,
        world,
        owned_fragments(engine, world.rank),
        shapes,
        progress=Progress(step=step),
        config={},
        data_fingerprint="",
        tokenizer_sha256="",
    )


def restore(engine: Any, reader: CheckpointReader) -> None:
    with torch.no_grad():
        allocate_optimizer_state(engine, reader.manifest.optimizer_state, reader.manifest.progress.step)
        for fragment in local_fragments(engine):
            for name, tensor in {WEIGHT: fragment.weight, **fragment.optimizer_state}.items():
                tensor.copy_(reader.slice(fragment.parameter, name, fragment.start, tensor.numel()))
    publish_weights(engine)


def main(out: Path) -> None:
    world = World.discover()
    start_process_group(world)
    for kind in OPTIMIZERS:
        for stage in STAGES:
            engine = engine_of(kind, stage, world, seed=1)
            train(engine, range(STEPS // 2), world)
            resumed = stage in RESUMED and world.size == RESUMED_WORLD
            if resumed:
                save(engine, out / f"{kind}-{stage}-half", STEPS // 2, world)
            train(engine, range(STEPS // 2, STEPS), world)
            save(engine, out / f"{kind}-{stage}-straight", STEPS, world)
            if resumed:
                engine = engine_of(kind, RESUMED[stage], world, seed=2)
                restore(engine, resolve_checkpoint(out / f"{kind}-{stage}-half"))
                train(engine, range(STEPS // 2, STEPS), world)
                save(engine, out / f"{kind}-{stage}-resumed", STEPS, world)
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
