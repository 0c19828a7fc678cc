"""What the control plane costs a step of 100 ms: the agreement, the journal and the watchdog, on 4 ranks.

The ranks wait as they would for an accelerator (90 ms before the gradients are averaged, 10 ms after it) and meet twice
in the collective library, as in a step of ZeRO stage 1. Steps without a control plane, with it, and with the second sum
that masked data need take turns.
    python -m benchmarks.control_plane --steps 200
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import arguments, machine, median, publish
from slurm.local import rank_command, rank_environment

FORWARD, BACKWARD, UPDATE = 0.03, 0.06, 0.01


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "rank":
        run_rank(int(sys.argv[2]), Path(sys.argv[3]))
        return
    options = arguments(__doc__ or "", steps=200, ranks=4)
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "benchmarks.control_plane", "rank", str(options.steps), name]
        environment = {**rank_environment(options.ranks), "PYTHONPATH": str(Path.cwd())}
        subprocess.run(rank_command(options.ranks, command), check=True, env=environment, stdin=subprocess.DEVNULL)
        seen = json.loads((Path(name) / "seen.json").read_text())
    without, table = median(seen["without"]), [["no control plane", f"{1e3 * median(seen['without']):.3f}", "", "", ""]]
    for kind in ("with", "masked"):
        step, waited = median(seen[kind]), median(seen[f"{kind}, inside"])
        difference, part = f"{(step / without - 1) * 100:+.2f} %", f"{waited / step * 100:.2f} %"
        name = "control plane" if kind == "with" else "and masked data"
        table.append([name, f"{step * 1e3:.3f}", difference, f"{waited * 1e6:.0f}", part])
    header = ("step", "ms", "difference", "rank 0 in the control plane, us", "of the step")
    title = f"Control plane on {options.ranks} ranks, medians of {options.steps} steps each"
    publish(options.out, title, header, table, {"machine": machine("torch", "deepspeed", "mpi4py"), "seconds": seen})


def run_rank(steps: int, out: Path) -> None:
    """Take the steps on one rank; rank 0 writes down what it saw."""
    import torch
    import torch.distributed

    from data_prep.world import World
    from pipeline.control import ControlConfig, RunControl, StopSignals
    from pipeline.journal import journal
    from pipeline.launch import start_process_group, stop_process_group
    from pipeline.watchdog import Watchdog

    world = World.discover()
    start_process_group(world)
    world.note = journal.collective
    journal.share(world)
    control, gradient = RunControl(ControlConfig(), world, StopSignals()), torch.ones(4096)
    kinds = ("without", "with", "masked")
    seen: dict[str, list[float]] = {name: [] for name in (*kinds, "with, inside", "masked, inside")}
    inside = 0.0

    @contextmanager
    def timed() -> Iterator[None]:
        nonlocal inside
        started = time.perf_counter()
        yield
        inside += time.perf_counter() - started

    def controlled(number: int, watchdog: Watchdog, *, alike: bool) -> None:
        with timed():
            limit, step = watchdog.step(1, number % 40, 8), journal.phase("step", number)
            limit.__enter__()
            step.__enter__()
            counts = control.count(number, (4096, 1), None, alike=alike)
        with journal.phase("forward"):
            time.sleep(FORWARD)
        with timed(), journal.phase("control"):
            counts.wait()
        with journal.phase("backward"):
            time.sleep(BACKWARD)
            with journal.collective("all_reduce", gradient.nbytes):
                torch.distributed.all_reduce(gradient)
        with timed():
            agreement = control.agree(1.0, None, watchdog.longest_step, [0.0] * 6)
        with journal.phase("optimizer"):
            torch.distributed.all_reduce(gradient)
            with timed():  # the veto, once the gradient's norm is known
                agreement.wait()
                control.vetoed(False)
            time.sleep(UPDATE)
        with timed():
            step.__exit__(None, None, None)
            limit.__exit__(None, None, None)

    with Watchdog(ControlConfig(), world, journal, out) as watchdog:
        for number in range(3 * steps + 21):
            started, inside, kind = time.perf_counter(), 0.0, kinds[number % 3]
            if kind == "without":
                for seconds in (FORWARD + BACKWARD, UPDATE):
                    time.sleep(seconds)
                    torch.distributed.all_reduce(gradient)
            else:
                controlled(number, watchdog, alike=kind == "with")
            if number >= 21:
                seen[kind].append(time.perf_counter() - started)
                if kind != "without":
                    seen[f"{kind}, inside"].append(inside)
    if world.rank == 0:
        (out / "seen.json").write_text(json.dumps(seen))
    stop_process_group()


if __name__ == "__main__":
    main()
