"""The ranks of a job, as MPI sees them: discovery, small collectives, and a guard against half-failed phases.

It lives in the lowest room that needs ranks, so that tokenization and training share one notion of them. Only
small control messages pass through it; tensors travel on the collective library's own groups.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

# What MPI launchers set for the number of ranks: hydra and `srun --mpi=pmi2`, Open MPI, Cray PALS, MVAPICH.
_WORLD_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PALS_SIZE", "MV2_COMM_WORLD_SIZE")


class LaunchError(ValueError):
    """The launcher and MPI disagree about how many ranks there are."""


class PeerError(RuntimeError):
    """Another rank failed in a guarded phase; the message is that rank's."""


class PeerInputError(PeerError, ValueError):
    """Another rank refused its input (a `ValueError`) in a guarded phase; the message is that rank's."""


def launched_size(environment: Mapping[str, str]) -> int | None:
    """Return the number of ranks that a launcher announced, or None if no launcher started this process."""
    for name in _WORLD_SIZE_VARIABLES:
        if name in environment:
            return int(environment[name])
    # Inside a batch script SLURM_NTASKS is set too; only a step (srun) has a step id.
    if "SLURM_STEP_ID" in environment and "SLURM_NTASKS" in environment:
        return int(environment["SLURM_NTASKS"])
    return None


class World:
    """All ranks of this job.

    Attributes:
        rank: index of this process, 0 <= rank < size.
        size: number of processes.
        failed_together: whether a guard has told every rank of a failure, so that one report is enough.
    """

    def __init__(self, communicator: MPI.Intracomm | None = None) -> None:
        self._communicator = communicator
        self.rank = 0 if communicator is None else communicator.Get_rank()
        self.size = 1 if communicator is None else communicator.Get_size()
        self.failed_together = False

    @classmethod
    @cache
    def discover(cls) -> World:
        """Join the ranks that the launcher started, or be a single rank when there was no launcher; once a process.

        MPI is not initialised for a single rank: on several machines MPI_Init aborts on a login node.

        Raises:
            LaunchError: MPI sees another number of ranks than the launcher announced. A wrong `srun --mpi` starts
                N singletons that would all believe to be rank 0.
        """
        announced = launched_size(os.environ)
        if announced is None:
            return cls()
        from mpi4py import MPI

        # mpi4py finalizes at the very end of the interpreter. With threads of others about (zarr's), a process has been
        # seen to end without it, one time in ten, upon which the launcher kills the ranks that still work.
        atexit.register(MPI.Finalize)
        world = cls(MPI.COMM_WORLD)
        if world.size != announced:
            raise LaunchError(
                f"the launcher started {announced} ranks but MPI sees {world.size}: this MPI library and the launcher"
                " do not belong together; use the mpiexec of the same MPI, or try another `srun --mpi=...`"
                " (`srun --mpi=list`)"
            )
        return world

    @property
    def communicator(self) -> MPI.Intracomm | None:
        """What carries messages between ranks; None for a single rank."""
        return self._communicator

    def broadcast(self, value: T, root: int = 0) -> T:
        """Return rank `root`'s value on every rank."""
        return value if self._communicator is None else self._communicator.bcast(value, root=root)

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's value in rank order on rank 0, None elsewhere."""
        return [value] if self._communicator is None else self._communicator.gather(value, root=0)

    def allgather(self, value: T) -> list[T]:
        """Return every rank's value in rank order on every rank."""
        return [value] if self._communicator is None else self._communicator.allgather(value)

    def exchange(self, values: Sequence[T]) -> list[T]:
        """Give `values[r]` to rank r, for every r; return what every rank gave to this one, in rank order."""
        assert len(values) == self.size
        return list(values) if self._communicator is None else self._communicator.alltoall(list(values))

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the element-wise sum over ranks, float64, same shape. Bitwise repeatable for a given world size."""
        if self._communicator is None:
            return values.copy()
        total = np.empty_like(values)
        self._communicator.Allreduce(values, total)
        return total

    @contextmanager
    def guard(self, phase: str) -> Iterator[None]:
        """End the block on every rank if it failed on any, with the failing rank's message instead of a hang.

        A collective: every rank must enter it. It protects work between collectives; ranks that wait inside a
        collective of the block for a rank that has left it are beyond its reach.

        Raises:
            PeerInputError: another rank raised a `ValueError` (bad input).
            PeerError: another rank raised anything else.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # every kind must reach the other ranks
            failure = error
        if self.sum(np.array([float(failure is not None)]))[0] == 0.0:
            return
        self.failed_together = True
        mine = None if failure is None else (isinstance(failure, ValueError), str(failure) or repr(failure))
        reports = self.allgather(mine)
        rank, (is_input, message) = next((rank, report) for rank, report in enumerate(reports) if report is not None)
        if failure is not None and rank == self.rank:
            raise failure
        # The first failing rank decides for all: launchers merge the ranks' exit codes bit by bit.
        kind = PeerInputError if is_input else PeerError
        raise kind(f"{message} (rank {rank}, {phase})") from failure

    def abort(self, exit_code: int) -> None:
        """End every rank at once, for a failure outside any guard; returns only when there is a single rank."""
        if self._communicator is not None and self.size > 1:
            self._communicator.Abort(exit_code)
