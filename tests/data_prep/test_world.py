"""Ranks agree on failures: one message, no hang, the right kind of error."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest

from data_prep.world import LaunchError, World, first_line, launched_size, launched_without_mpi
from slurm.local import rank_command, rank_environment

HOST = socket.gethostname()

PROGRAM = """
import os
from data_prep.world import World
world = World.discover()
try:
    with world.guard("opening the data"):
        if world.rank == 1:
            raise ERROR
except Exception as error:
    line = f"{world.rank} {type(error).__name__} {isinstance(error, ValueError)} {error}\\n"
    os.write(1, line.encode())  # one piece, or the launcher mixes the ranks' lines
"""


@pytest.mark.parametrize(
    ("error", "peer", "is_input"),
    [("ValueError('no such file: x')", "PeerInputError", True), ("OSError('disk full')", "PeerError", False)],
)
def test_a_failure_on_one_rank_reaches_every_rank(error: str, peer: str, is_input: bool) -> None:
    command = rank_command(3, [sys.executable, "-c", PROGRAM.replace("ERROR", error)])
    done = subprocess.run(command, env=rank_environment(3), capture_output=True, text=True, timeout=60, check=True)
    message = error.split("'")[1]
    own = error.split("(", maxsplit=1)[0]
    assert sorted(done.stdout.splitlines()) == [
        f"0 {peer} {is_input} {message} (rank 1 on {HOST}, opening the data)",
        f"1 {own} {is_input} {message}",
        f"2 {peer} {is_input} {message} (rank 1 on {HOST}, opening the data)",
    ]


def test_ranks_that_fail_differently_end_with_one_kind_of_error() -> None:
    """Launchers merge exit codes bit by bit: 1 and 12 would become 13, an unhealthy node."""
    program = PROGRAM.replace(
        "        if world.rank == 1:\n            raise ERROR",
        "        raise {0: OSError}.get(world.rank, ValueError)('x')",
    )
    done = subprocess.run(
        rank_command(2, [sys.executable, "-c", program]),
        env=rank_environment(2),
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(done.stdout.splitlines()) == [
        "0 OSError False x",
        f"1 PeerError False x (rank 0 on {HOST}, opening the data)",
    ]


def test_singletons_of_a_wrong_launcher_are_refused() -> None:
    """Each of two processes is told that it is one of two, by variables that this MPI does not read."""
    program = "from data_prep.world import World; World.discover()"
    environment = {**rank_environment(1), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "the launcher started 2 ranks but MPI sees 1" in done.stderr


def test_the_size_is_read_from_steps_and_not_from_batch_scripts() -> None:
    assert launched_size({}) is None
    assert launched_size({"SLURM_NTASKS": "8"}) is None
    assert launched_size({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}) == 8
    assert launched_size({"PMI_SIZE": "4", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}) == 4
    assert launched_size({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290"}) == 1


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5", "", "9" * 5000])
def test_a_size_that_is_no_number_is_refused_with_the_variable_s_name(value: str) -> None:
    with pytest.raises(LaunchError, match=r"PMI_SIZE: '.*' is not a whole number in 1\.\."):
        launched_size({"PMI_SIZE": value})


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(OSError("\n no\nspace")) == "no"
    assert first_line(MemoryError()) == "MemoryError()"


def test_ranks_do_without_mpi_under_torchrun_and_where_asked_to() -> None:
    torchrun = dict.fromkeys(("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "1")
    assert not launched_without_mpi({})
    assert not launched_without_mpi({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"})
    assert launched_without_mpi({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "ROOKERY_CONTROL": "torch"})
    assert launched_without_mpi(torchrun)
    assert launched_without_mpi({"TORCHELASTIC_RUN_ID": "x", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"})
    assert not launched_without_mpi({**torchrun, "PMI_SIZE": "2"})  # left over in the environment of mpiexec
    assert not launched_without_mpi({**torchrun, "ROOKERY_CONTROL": "mpi"})
    with pytest.raises(LaunchError, match="ROOKERY_CONTROL: 'gloo' is not one of mpi, torch"):
        launched_without_mpi({"ROOKERY_CONTROL": "gloo"})


def test_a_plain_process_is_one_rank() -> None:
    world = World()
    assert world.meet(0.0)
    assert world.start_sum(np.array([2.0])).wait().tolist() == [2.0]
    with world.guard("anything"):
        assert world.allgather("x") == ["x"]
    with pytest.raises(ValueError, match="mine"), world.guard("anything"):
        raise ValueError("mine")
