"""What the commands of a login node cost, beside what they stand on: `rookery submit` and `sbatch`, `rookery status`.

A real SLURM cluster of three nodes is started on this machine. In every round the batch script of a dry run is handed
to plain `sbatch`, the same run is submitted by `rookery submit` (which ends by printing the job's first state),
PyTorch is imported, and a run's status is asked for.
    python -m benchmarks.submission --rounds 5
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import arguments, machine, median, publish
from tests.pipeline.conftest import write_corpus
from tests.slurm.cluster import Cluster, write_profile


def main() -> None:
    options = arguments(__doc__ or "", rounds=5)
    seconds: dict[str, list[float]] = defaultdict(list)
    folders = tempfile.TemporaryDirectory(prefix="rk"), tempfile.TemporaryDirectory(prefix="rk")
    with folders[0] as name, folders[1] as work, Cluster(Path(name), nodes=3) as cluster:
        root = write_corpus(Path(work))
        write_profile(root / "config")
        environment = {**os.environ, **cluster.environment, "XDG_CONFIG_HOME": str(root / "config")}
        environment["PYTHONPATH"] = str(Path.cwd())

        def timed(what: str, *command: str) -> str:
            started = time.perf_counter()
            done = subprocess.run(
                command,
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            seconds[what].append(time.perf_counter() - started)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
            return done.stdout

        rookery = (sys.executable, "-m", "rookery")
        for number in range(options.rounds):
            run = ("test.yaml", "--site", "test", "--nodes", "2", "--time", "10m", f"run_dir=run-{number}")
            timed("dry run", *rookery, "submit", *run, "--dry-run", "--out", "script.sh")
            timed("sbatch", "sbatch", "--hold", "script.sh")
            said = json.loads(timed("submit", *rookery, "submit", *run, "--json"))
            assert said["state"] != "unknown", said
            timed("import torch", sys.executable, "-c", "import torch")
            timed("status", *rookery, "status", f"run-{number}")
            timed("import of status", sys.executable, "-c", "import rookery.cli, slurm.status")
            timed("python", sys.executable, "-c", "pass")
            cluster.heal()
    submit, sbatch, torch = (median(seconds[what]) for what in ("submit", "sbatch", "import torch"))
    table = [[what, f"{median(every):.2f}"] for what, every in seconds.items()]
    table.append(["submit beyond sbatch", f"{submit - sbatch:.2f}"])
    table.append(["of that beyond PyTorch's import", f"{submit - sbatch - torch:.2f}"])
    title = f"Commands of a login node, medians of {options.rounds} rounds"
    publish(options.out, title, ("command", "s"), table, {"machine": machine("torch", "submitit"), "seconds": seconds})


if __name__ == "__main__":
    main()
