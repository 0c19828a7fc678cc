"""Unhealthy nodes are named, by whatever they are ill of, and end the run with exit code 13."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from data_prep.world import World
from monitoring.runlog import read_outcome
from pipeline.errors import ConfigError, UnhealthyNodeError
from pipeline.node_check import (
    Findings,
    NodeCheckConfig,
    _timed,
    check_demands,
    check_nodes,
    check_sizes,
    clock_skews,
    faults,
)
from slurm.local import find_mpiexec, rank_command, rank_environment
from tests.ranks import rookery

ROOT = Path(__file__).parents[2]


def findings(**changes: object) -> Findings:
    values: dict[str, object] = {
        "host": "n1",
        "device": "MI250X",
        "gemm_flops": 100e12,
        "peak_flops": 191.5e12,
        "free_bytes": 50e9,
        "versions": {"torch": "2.13"},
        "clock": 1000.0,
    }
    return Findings(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ill", "reason"),
    [
        ({"gemm_flops": 60e12}, "matrix product at 6e+13 FLOP/s, the median is 1e+14"),
        ({"gemm_flops": 50e12, "device": "other"}, "matrix product at 5e+13 FLOP/s of a peak of 1.92e+14"),
        ({"gemm_flops": 0.0, "device": "other"}, "no matrix product has been measured"),
        ({"versions": {"torch": "2.12"}}, "torch is 2.12, and 2.13 on most ranks"),
        ({"versions": {}}, "torch is None, and 2.13 on most ranks"),
        ({"clock": 1009.0}, "clock +9.0 s off the median"),
        ({"free_bytes": 1e9}, "1.00 GB free in /run, node_check.min_free_gb is 2"),
        ({"problem": "the device failed: no memory"}, "the device failed: no memory"),
    ],
)
def test_the_ill_rank_alone_is_named(ill: dict[str, object], reason: str) -> None:
    config = NodeCheckConfig(min_free_gb=2, min_peak_ratio=0.3)
    every = [findings(), findings(), findings(**ill), findings()]
    assert faults(config, every, clock_skews(every), "cuda", Path("/run")) == {2: reason}


def test_healthy_ranks_and_unknown_peaks_pass() -> None:
    every = [
        findings(),
        findings(gemm_flops=80e12, clock=1001.0),
        findings(device="cpu", gemm_flops=1e9, peak_flops=None),
    ]
    assert faults(NodeCheckConfig(), every, clock_skews(every), "cuda", Path("/run")) == {}


def test_a_failure_without_words_is_one_all_the_same() -> None:
    def fail() -> None:
        raise MemoryError

    own = findings()
    _timed(own, "the device", 5.0, fail)
    assert own.problem == "the device failed: MemoryError: MemoryError()"


@pytest.mark.parametrize("name", ["memory_mb", "gemm_size", "allreduce_mb"])
def test_measuring_with_more_than_the_memory_is_a_mistake_of_the_configuration(name: str) -> None:
    config = NodeCheckConfig(**{name: [10**6] if name == "allreduce_mb" else 10**6})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"node_check.{name}: .* needs .* GB, and a rank has 64.0 GB; lower it"):
        check_sizes(config, "cuda", 64 * 10**9)
    check_sizes(NodeCheckConfig(memory_mb=30000, gemm_size=8192, allreduce_mb=[128]), "cuda", 64 * 10**9)


def test_the_lowest_rank_that_answers_speaks() -> None:
    error = UnhealthyNodeError("ill", ["b", "a", "b"], silent=[1, 0])
    assert [error.speaks(rank) for rank in range(4)] == [False, False, True, False]
    assert str(error) == "ill; exclude a, b and submit again"
    assert UnhealthyNodeError("ill", []).hosts == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_limit_seconds": 0.0}, "node_check.time_limit_seconds: 0.0"),
        ({"gemm_size": 0}, "node_check.gemm_size: 0"),
        ({"min_rate_ratio": 1.0}, "node_check.min_rate_ratio: 1.0"),
        ({"allreduce_mb": [16, 0]}, r"node_check.allreduce_mb: \[16, 0\]"),
        ({"min_free_gb": -1.0}, "node_check.min_free_gb: -1.0"),
    ],
)
def test_values_without_a_meaning_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NodeCheckConfig(**values)  # type: ignore[arg-type]


def test_a_run_directory_that_is_full_for_all_is_no_node_s_fault(workdir: Path) -> None:
    done = rookery("train", "test.yaml", "node_check.min_free_gb=1e9", cwd=workdir)
    assert done.returncode == 12, done.stderr
    assert re.search(r"node_check.min_free_gb: 1000000000.0, and .*run has .* GB free on every host", done.stderr)
    assert not (workdir / "run").exists()


def test_the_check_can_be_switched_off(tmp_path: Path) -> None:
    off = NodeCheckConfig(enabled=False, min_free_gb=1e9)
    check_demands(off, World(), torch.device("cpu"), tmp_path)
    assert check_nodes(off, World(), torch.device("cpu"), tmp_path) == []


def test_a_rank_with_other_code_is_named(workdir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for room in ("data_prep", "kernels", "monitoring", "pipeline", "rookery", "slurm"):
        shutil.copytree(ROOT / room, other / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "pipeline/optim.py").open("a") as source:
        source.write("# another version\n")
    command = [sys.executable, "-m", "rookery", "train", "test.yaml", "train.global_batch_size=6"]
    ranks = [["-n", "1", "-env", "PYTHONPATH", str(path), *command] for path in (ROOT, ROOT, other)]
    done = subprocess.run(
        [find_mpiexec(), *ranks[0], ":", *ranks[1], ":", *ranks[2]],
        cwd=workdir, env=rank_environment(3), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 13, done.stderr
    assert done.stderr.count("rookery: unhealthy node: ") == 1
    assert "rank 2: the code of rookery is " in done.stderr
    outcome = read_outcome(workdir / "run", 1)
    assert outcome is not None
    assert outcome["exit_code"] == 13
    assert len(outcome["hosts"]) == 1


def test_the_rank_that_stops_in_an_all_reduce_is_named_within_seconds(workdir: Path) -> None:
    """Rank 0, on which the others rely to find out who does not answer."""
    sizes = ",".join(["64"] * 60)
    command = [sys.executable, "-m", "rookery", "train", "test.yaml", "node_check.time_limit_seconds=2"]
    launcher = subprocess.Popen(
        rank_command(2, [*command, f"node_check.allreduce_mb=[{sizes}]"]),
        cwd=workdir, env=rank_environment(2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for_the_attempt(workdir / "run")
        time.sleep(1.5)
        (rank,) = (
            each
            for each in psutil.Process(launcher.pid).children(recursive=True)
            if each.name().startswith("python") and each.environ().get("PMI_RANK") == "0"
        )
        rank.send_signal(signal.SIGSTOP)
        since = time.monotonic()
        _, errors = launcher.communicate(timeout=60)
        assert time.monotonic() - since < 30
    finally:
        launcher.kill()
    assert launcher.returncode == 13, errors
    assert "no answer from rank 0 on " in errors
    outcome = json.loads((workdir / "run/attempts/0001/outcome.json").read_text())
    assert outcome["exit_code"] == 13
    assert len(outcome["hosts"]) == 1


def wait_for_the_attempt(run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "attempts/0001/environment.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
