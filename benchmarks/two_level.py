"""What leaves a node: bytes of a rank's messages in one step, sharded over the world or over nodes, and what it costs.

Four ranks of this machine, which LOCAL_WORLD_SIZE divides into nodes of 1 and of 2. A message counts whole if any rank
that it joins is on another node. Step times, of overlapped and of waiting reduction in turn, are those of a machine
without a network: they say what the overlap costs, not what it saves.
    python -m benchmarks.two_level --steps 10
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import arguments, machine, median, publish, ratio
from slurm.local import rank_command, rank_environment

RANKS, PARTS, STAGE = 4, (1, 2), 1


def main() -> None:
    options = arguments(__doc__ or "", steps=10, width=192)
    table, records = [], []
    for local in PARTS:
        record = measured(local, options.steps, options.width)
        records.append({"local": local, **record})
        for scope in ("world", "node"):
            away = record["bytes"][scope]
            times = record["seconds"]
            row = [local, scope, f"{away['gradients'] / 1e6:.2f}"]
            row += [f"{away['gradients'] / record['gradient_bytes']:.3f}", f"{away['others'] / 1e6:.2f}"]
            row += [f"{1e3 * median(times['world' if scope == 'world' else 'overlap']):.0f}"]
            row += [f"{ratio(times['overlap'], times['waits']):.2f}" if scope == "node" else ""]
            table.append(row)
    header = ("ranks a node", "zero.scope", "gradients, MB", "of all", "else, MB", "step, ms", "overlapped / waiting")
    title = f"Bytes of a rank that leave its node in a step: {RANKS} ranks, stage {STAGE}, float32"
    publish(options.out, title, header, table, {"machine": machine("torch", "deepspeed"), "measured": records})


def measured(local: int, steps: int, width: int) -> dict[str, Any]:
    done = subprocess.run(
        rank_command(RANKS, [sys.executable, "-m", "benchmarks.two_level", "rank", str(steps), str(width)]),
        env={**rank_environment(RANKS), "LOCAL_WORLD_SIZE": str(local)},
        check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def rank(steps: int, width: int) -> None:
    """One rank: trains three engines in turn, a step each, and counts what passes through their collectives."""
    from data_prep.world import World
    from pipeline.journal import journal
    from pipeline.launch import start_process_group, stop_process_group

    world = World.discover()
    start_process_group(world)
    journal.watch_deepspeed()
    engines = {name: engine_of(name, width, world) for name in ("world", "overlap", "waits")}
    counted: dict[str, dict[str, int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(steps):
        for name, engine in engines.items():
            before, started = journal.traffic(), time.perf_counter()
            between, after = one_step(engine, number)
            world.allgather(None)
            seconds[name].append(time.perf_counter() - started)
            counted[name] = away(name, before, between, after)
    nodes = {"world": counted["world"], "node": counted["overlap"]}
    assert counted["overlap"] == counted["waits"]
    gradient_bytes = sum(4 * parameter.numel() for parameter in engines["world"].module.parameters())
    if world.rank == 0:
        skipped = {name: values[1:] for name, values in seconds.items()}
        print(json.dumps({"bytes": nodes, "gradient_bytes": gradient_bytes, "seconds": skipped}))
    stop_process_group()


def engine_of(name: str, width: int, world: Any) -> Any:
    from pipeline.engine import ZeroConfig, build_engine
    from pipeline.launch import CommConfig
    from pipeline.model import ModelConfig, RecurrentDepthModel
    from pipeline.optim import OptimizerConfig, build_optimizer

    shape = ModelConfig(
        n_embd=width,
        n_heads=4,
        intermediate_size=2 * width,
        vocab_size=1024,
        block_size=64,
        n_layers_in_prelude=2,
        n_layers_in_recurrent_block=2,
        n_layers_in_coda=2,
    )
    model = RecurrentDepthModel(shape)
    model.init_weights(1, 4.0)
    return build_engine(
        model,
        build_optimizer(OptimizerConfig(learning_rate=1e-3), model),
        zero=ZeroConfig(stage=STAGE, scope="world" if name == "world" else "node"),
        comm=CommConfig(chunk_mb=1, overlap=name != "waits"),
        precision="fp32",
        gradient_clipping=1.0,
        global_batch_size=world.size,
        micro_batch_size=1,
        world=world,
    )


def one_step(engine: Any, number: int) -> tuple[Any, Any]:
    """Train on one row; return the traffic so far, after the last reduction and after the update."""
    import torch

    from pipeline.depth import Depth
    from pipeline.engine import optimizer_step
    from pipeline.journal import journal

    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 1024, (1, 65), generator=generator)
    state = torch.randn(1, 64, engine.module.config.n_embd, generator=generator)
    engine.backward(engine(ids[:, :-1], state, Depth(4, 4), ids[:, 1:]))
    if engine.rookery_average is not None:
        engine.rookery_average.finish()
        engine.rookery_average, kept = None, engine.rookery_average
        between = journal.traffic()
        optimizer_step(engine, 1.0)
        engine.rookery_average = kept
    else:
        between = journal.traffic()
        optimizer_step(engine, 1.0)
    return between, journal.traffic()


def away(name: str, before: Any, between: Any, after: Any) -> dict[str, int]:
    """Bytes of messages that join ranks of several nodes: of gradients, and of all else."""
    groups = ("world",) if name == "world" else ("world", "between nodes")

    def difference(first: Any, second: Any) -> int:
        return sum(
            second[group].bytes - (first[group].bytes if group in first else 0) for group in groups if group in second
        )

    return {"gradients": difference(before, between), "others": difference(between, after)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        rank(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
