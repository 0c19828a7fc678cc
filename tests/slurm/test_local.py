"""Ranks on this machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slurm.local import LauncherError, find_mpiexec, rank_command, rank_environment


def test_ranks_see_each_other_even_if_we_run_under_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "7")
    monkeypatch.setenv("SLURM_NTASKS", "7")
    program = (
        "import os; from data_prep.world import World; w = World.discover();"
        " os.write(1, f'{w.rank} {w.size} {w.allgather(w.rank)}\\n'.encode())"
    )
    done = subprocess.run(
        rank_command(3, [sys.executable, "-c", program]),
        env=rank_environment(3),
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.splitlines()) == [f"{rank} 3 [0, 1, 2]" for rank in range(3)]


def test_a_missing_launcher_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LauncherError, match=r"rookery\[mpi\]"):
        find_mpiexec()
