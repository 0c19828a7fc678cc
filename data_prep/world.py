"""The ranks of a job: discovery, small collectives, and a guard against half-failed phases.

It lives in the lowest room that needs ranks, so that tokenization and training share one notion of them. Only
small control messages pass through it; tensors travel on the collective library's own groups. The messages go over
MPI; where a job has none, training brings another control plane along.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

# What MPI launchers set for the number of ranks: hydra and `srun --mpi=pmi2`, Open MPI, Cray PALS, MVAPICH.
_WORLD_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PALS_SIZE", "MV2_COMM_WORLD_SIZE")
# What torchrun sets, and what a script has to set for PyTorch's `env://`.
_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CONTROL_VARIABLE = "ROOKERY_CONTROL"
_POLLS_AT_FULL_SPEED = 50
_SECONDS_BETWEEN_POLLS = 50e-6


class LaunchError(ValueError):
    """The ranks of a job cannot find each other as they were launched."""


class PeerError(RuntimeError):
    """Another rank failed in a guarded phase; the message is that rank's."""


class PeerInputError(PeerError, ValueError):
    """Another rank refused its input (a `ValueError`) in a guarded phase; the message is that rank's."""


class PendingSum(Protocol):
    """A sum over ranks on its way."""

    def ready(self) -> bool:
        """Return whether `wait` would return at once; drives the sum on."""

    def wait(self) -> npt.NDArray[np.float64]:
        """Return the element-wise sum over ranks."""


class Control(Protocol):
    """What carries messages between ranks. Every method but `abort` is a collective."""

    rank: int
    size: int

    def broadcast(self, value: T, root: int) -> T:
        """Return rank `root`'s value on every rank."""

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's value in rank order on rank 0, None elsewhere."""

    def allgather(self, value: T) -> list[T]:
        """Return every rank's value in rank order on every rank."""

    def exchange(self, values: list[T]) -> list[T]:
        """Give `values[r]` to rank r; return what every rank gave to this one."""

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the element-wise sum over ranks, bitwise repeatable for a given number of ranks."""

    def start_sum(self, values: npt.NDArray[np.float64]) -> PendingSum:
        """Begin such a sum; `values` are copied."""

    def abort(self, exit_code: int) -> None:
        """End every rank at once."""


def launched_size(environment: Mapping[str, str]) -> int | None:
    """Return the number of ranks that a launcher announced, or None if no launcher started this process.

    Raises:
        LaunchError: what the launcher announced is no number.
    """
    for name in _WORLD_SIZE_VARIABLES:
        if name in environment:
            return launcher_number(environment, name, 1)
    # Inside a batch script SLURM_NTASKS is set too; only a step (srun) has a step id. The interactive step of an
    # allocation of many tasks is one task.
    if "SLURM_STEP_ID" in environment:
        for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
            if name in environment:
                return launcher_number(environment, name, 1)
    return None


def launcher_number(environment: Mapping[str, str], name: str, least: int, most: int = 2**32 - 1) -> int:
    """Return the number that a launcher, or whoever plays one, left in a variable of the environment.

    Raises:
        LaunchError: the variable is not set, or is not a whole number from `least` to `most`.
    """
    value = environment.get(name)
    if value is None:
        raise LaunchError(f"{name}: is not set; the launcher has to, or set it to a number in {least}..{most}")
    number = int(value) if value.isascii() and value.isdecimal() and len(value) < 20 else -1
    if not least <= number <= most:
        raise LaunchError(f"{name}: {value!r} is not a whole number in {least}..{most}; mend what starts the job")
    return number


def first_line(error: BaseException) -> str:
    """Return the beginning of what an error says, or its kind if it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def launched_without_mpi(environment: Mapping[str, str]) -> bool:
    """Return whether the ranks of this job talk without MPI: started by torchrun or its like, or asked to.

    Raises:
        LaunchError: ROOKERY_CONTROL has a value without a meaning.
    """
    asked = environment.get(CONTROL_VARIABLE)
    if asked not in (None, "mpi", "torch"):
        raise LaunchError(f"{CONTROL_VARIABLE}: {asked!r} is not one of mpi, torch; leave it away to have it found out")
    if asked is not None:
        return asked == "torch"
    if "TORCHELASTIC_RUN_ID" in environment:
        return True
    return launched_size(environment) is None and all(name in environment for name in _TORCH_VARIABLES)


class World:
    """All ranks of this job.

    Attributes:
        rank: index of this process, 0 <= rank < size.
        size: number of processes.
        failed_together: whether a guard has told every rank of a failure, so that one report is enough.
        note: entered, with a name, around every wait for other ranks; a watchdog learns from it who waits where.
    """

    _discovered: ClassVar[World | None] = None

    def __init__(self, control: Control | None = None) -> None:
        self._control = control
        self.rank = 0 if control is None else control.rank
        self.size = 1 if control is None else control.size
        self.failed_together = False
        self.note: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext()

    @classmethod
    def discover(cls, without_mpi: Callable[[], Control] | None = None) -> World:
        """Join the ranks that the launcher started, or be a single rank when there was no launcher; once a process.

        MPI is not initialised for a single rank: on several machines MPI_Init aborts on a login node.

        Args:
            without_mpi: connects ranks that have no MPI; None if the caller needs MPI.

        Raises:
            LaunchError: MPI sees another number of ranks than the launcher announced (a wrong `srun --mpi` starts N
                singletons that would all believe to be rank 0), or there is no MPI and the caller needs it.
        """
        if cls._discovered is None:
            cls._discovered = cls._join(without_mpi)
        return cls._discovered

    @classmethod
    def _join(cls, without_mpi: Callable[[], Control] | None) -> World:
        if launched_without_mpi(os.environ):
            if without_mpi is not None:
                return cls(without_mpi())
            if os.environ.get("WORLD_SIZE") == "1":
                return cls()
            raise LaunchError(
                "this command does not run on ranks without MPI: start it with the mpiexec of an MPI or with srun, not"
                f" with torchrun or {CONTROL_VARIABLE}=torch, or as one plain process"
            )
        announced = launched_size(os.environ)
        return cls() if announced is None else cls(_join_mpi(announced))

    @property
    def communicator(self) -> MPI.Intracomm | None:
        """MPI itself, for what is more than these collectives; None for a single rank.

        Raises:
            LaunchError: the ranks have no MPI.
        """
        if self._control is None:
            return None
        if not isinstance(self._control, _MpiControl):
            raise LaunchError("this needs MPI, without which the ranks were started: use mpiexec or srun")
        return self._control.communicator

    def broadcast(self, value: T, root: int = 0) -> T:
        """Return rank `root`'s value on every rank."""
        if self._control is None:
            return value
        with self.note("world.broadcast"):
            return self._control.broadcast(value, root)

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's value in rank order on rank 0, None elsewhere."""
        if self._control is None:
            return [value]
        with self.note("world.gather"):
            return self._control.gather(value)

    def allgather(self, value: T) -> list[T]:
        """Return every rank's value in rank order on every rank."""
        if self._control is None:
            return [value]
        with self.note("world.allgather"):
            return self._control.allgather(value)

    def exchange(self, values: Sequence[T]) -> list[T]:
        """Give `values[r]` to rank r, for every r; return what every rank gave to this one, in rank order."""
        assert len(values) == self.size
        if self._control is None:
            return list(values)
        with self.note("world.exchange"):
            return self._control.exchange(list(values))

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the element-wise sum over ranks, float64, same shape. Bitwise repeatable for a given world size."""
        if self._control is None:
            return values.copy()
        with self.note("world.sum"):
            return self._control.sum(values)

    def start_sum(self, values: npt.NDArray[np.float64]) -> PendingSum:
        """Begin the element-wise sum over ranks, float64; `values` are copied. Bitwise equal to `sum`'s repeatability.

        Sums are completed in the order in which they were begun, each before the next collective of another kind.
        """
        if self._control is None:
            return _Done(values.copy())
        return _Noted(self._control.start_sum(values), self.note)

    def meet(self, seconds: float) -> bool:
        """Wait until every rank has come here, at most `seconds`; return whether all did.

        After False the control plane is of no use but to `abort`.
        """
        deadline = time.monotonic() + seconds
        pending = self.start_sum(np.ones(1))
        with self.note("world.meet"):
            while not pending.ready():
                if time.monotonic() > deadline:
                    return False
                time.sleep(_SECONDS_BETWEEN_POLLS)
        return bool(pending.wait()[0] == self.size)

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
        report = (isinstance(failure, ValueError), str(failure) or repr(failure), socket.gethostname())
        reports = self.allgather(None if failure is None else report)
        rank, (is_input, message, host) = next((rank, found) for rank, found in enumerate(reports) if found is not None)
        if failure is not None and rank == self.rank:
            raise failure
        # The first failing rank decides for all: launchers merge the ranks' exit codes bit by bit.
        kind = PeerInputError if is_input else PeerError
        raise kind(f"{message} (rank {rank} on {host}, {phase})") from failure

    def abort(self, exit_code: int) -> None:
        """End every rank at once, for a failure outside any guard; returns only when there is a single rank."""
        if self._control is not None and self.size > 1:
            self._control.abort(exit_code)


def _join_mpi(announced: int) -> Control:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not installed, or its library is not found
        raise LaunchError(
            f"the launcher started {announced} ranks but there is no MPI to join them with ({error}); install mpi4py"
            f" for the site's MPI, or set {CONTROL_VARIABLE}=torch to train without MPI"
        ) from None

    control = _MpiControl(MPI.COMM_WORLD)
    if control.size != announced:
        raise LaunchError(
            f"the launcher started {announced} ranks but MPI sees {control.size}: this MPI library and the launcher"
            " do not belong together; use the mpiexec of the same MPI, or try another `srun --mpi=...`"
            f" (`srun --mpi=list`); on a site without MPI, set {CONTROL_VARIABLE}=torch to train without it"
        )
    # mpi4py finalizes at the very end of the interpreter. With threads of others about (zarr's), a process has been
    # seen to end without it, one time in ten, upon which the launcher kills the ranks that still work.
    atexit.register(MPI.Finalize)
    return control


class _MpiControl:
    """Messages over MPI."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self.communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def broadcast(self, value: T, root: int) -> T:
        received: T = self.communicator.bcast(value, root=root)
        return received

    def gather(self, value: T) -> list[T] | None:
        return self.communicator.gather(value, root=0)

    def allgather(self, value: T) -> list[T]:
        return self.communicator.allgather(value)

    def exchange(self, values: list[T]) -> list[T]:
        return self.communicator.alltoall(values)

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        total = np.empty_like(values)
        self.communicator.Allreduce(values, total)
        return total

    def start_sum(self, values: npt.NDArray[np.float64]) -> PendingSum:
        own, total = values.copy(), np.empty_like(values)
        return _MpiSum(own, total, self.communicator.Iallreduce(own, total))

    def abort(self, exit_code: int) -> None:
        self.communicator.Abort(exit_code)


class _MpiSum:
    def __init__(self, *buffers_and_request: Any) -> None:
        self._own, self._total, self._request = buffers_and_request  # MPI reads and writes the buffers meanwhile

    def ready(self) -> bool:
        return bool(self._request.Test())

    def wait(self) -> npt.NDArray[np.float64]:
        polls = 0
        while not self._request.Test():  # MPI's own wait takes the core from a rank that shares it
            polls += 1
            if polls > _POLLS_AT_FULL_SPEED:
                time.sleep(_SECONDS_BETWEEN_POLLS)
        total: npt.NDArray[np.float64] = self._total
        return total


class _Done:
    def __init__(self, total: npt.NDArray[np.float64]) -> None:
        self._total = total

    def ready(self) -> bool:
        return True

    def wait(self) -> npt.NDArray[np.float64]:
        return self._total


class _Noted:
    def __init__(self, pending: PendingSum, note: Callable[[str], AbstractContextManager[object]]) -> None:
        self._pending, self._note = pending, note

    def ready(self) -> bool:
        return self._pending.ready()

    def wait(self) -> npt.NDArray[np.float64]:
        with self._note("world.sum"):
            return self._pending.wait()
