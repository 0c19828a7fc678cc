"""The control plane of ranks that have no MPI: gloo carries the messages, and nothing that arrives can run code.

Ranks started by torchrun, or by anything that sets PyTorch's `env://` variables, meet at the address that these give.
Under `ROOKERY_CONTROL=torch` the tasks of an `srun --mpi=none` meet at the address that SLURM gives.
"""

from __future__ import annotations

import atexit
import dataclasses
import io
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch.distributed import (  # type: ignore[attr-defined]
    BroadcastOptions,
    GatherOptions,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from data_prep.world import LaunchError, PeerError, PendingSum, first_line, launcher_number

T = TypeVar("T")

# A message waits as long as MPI's would: who comes late compiles or reads, and a watchdog finds ranks that hang.
_FOREVER = timedelta(days=365)
_SECONDS_TO_MEET = 300.0
_PORTS_TRIED = 16
_SECONDS_BETWEEN_LOOKS = 0.2
_ROOMS = ("data_prep", "monitoring", "pipeline")
# Classes that only hold what they are given, beside the dataclasses, named tuples and enums of our own rooms.
_SAFE = {
    "builtins": {"bytearray", "complex", "frozenset", "range", "set", "slice"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"PosixPath"},
    "pipeline.mixture": {"Mixture", "Stage"},
}
# Size and rank of a process, as launchers name them.
_RANK_VARIABLES = (
    ("WORLD_SIZE", "RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


def connect(environment: Mapping[str, str] = os.environ) -> GlooControl:
    """Join the other ranks of this job without MPI.

    Raises:
        LaunchError: the environment does not say who this rank is or where to meet, or the others are not there.
    """
    size, rank = _place(environment)
    met = threading.Event()
    try:
        store = _store(environment, rank, met)
        # A restart of torchrun's workers comes to the same store.
        store = PrefixStore(f"rookery-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        return GlooControl(_group(store, rank, size, environment))
    except RuntimeError as error:
        raise LaunchError(
            f"rank {rank} on {socket.gethostname()} does not reach the other ranks: {first_line(error)}; set"
            " GLOO_SOCKET_IFNAME to the network interface that joins the nodes"
        ) from None
    finally:
        met.set()


class GlooControl:
    """Messages over a gloo group of its own, apart from the groups of the tensors."""

    def __init__(self, group: ProcessGroupGloo) -> None:
        self._group: Any = group  # its collectives are not annotated
        self.rank, self.size = group.rank(), group.size()
        # Threads of gloo that outlive the interpreter end the process with a signal now and then.
        atexit.register(self._close)

    def broadcast(self, value: T, root: int) -> T:
        """Return rank `root`'s value on every rank."""
        options = BroadcastOptions()
        options.rootRank = root
        content = _encode(value) if self.rank == root else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(content)])
        _finish(self._group.broadcast([length], options))
        if self.rank != root:
            content = torch.empty(int(length), dtype=torch.uint8)
        _finish(self._group.broadcast([content], options))
        return value if self.rank == root else _decode(content)

    def gather(self, value: T) -> list[T] | None:
        """Return every rank's value in rank order on rank 0, None elsewhere."""
        content, lengths = self._padded(value)
        options = GatherOptions()
        options.rootRank = 0
        outputs = [[torch.empty_like(content) for _ in lengths]] if self.rank == 0 else []
        _finish(self._group.gather(outputs, [content], options))
        return _decode_all(outputs[0], lengths) if outputs else None

    def allgather(self, value: T) -> list[T]:
        """Return every rank's value in rank order on every rank."""
        content, lengths = self._padded(value)
        outputs = [torch.empty_like(content) for _ in lengths]
        _finish(self._group.allgather([outputs], [content]))
        return _decode_all(outputs, lengths)

    def exchange(self, values: list[T]) -> list[T]:
        """Give `values[r]` to rank r; return what every rank gave to this one."""
        return [of_rank[self.rank] for of_rank in self.allgather(values)]

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the element-wise sum over ranks; gloo adds in an order that the number of ranks fixes."""
        return self.start_sum(values).wait()

    def start_sum(self, values: npt.NDArray[np.float64]) -> PendingSum:
        """Begin such a sum."""
        total = torch.from_numpy(values.copy())
        return _GlooSum(total, self._group.allreduce([total]))

    def abort(self, exit_code: int) -> None:
        """End this process at once; the others lose their connections to it, and their launcher ends them."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def _close(self) -> None:
        self._group.shutdown()
        self._group = None

    def _padded(self, value: object) -> tuple[torch.Tensor, list[int]]:
        content = _encode(value)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        _finish(self._group.allgather([lengths], [torch.tensor([len(content)])]))
        sizes = [int(length) for length in lengths]
        return torch.nn.functional.pad(content, (0, max(sizes) - len(content))), sizes


class _GlooSum:
    def __init__(self, total: torch.Tensor, work: Any) -> None:
        self._total, self._work = total, work

    def ready(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> npt.NDArray[np.float64]:
        _finish(self._work)
        total: npt.NDArray[np.float64] = self._total.numpy()
        return total


def _finish(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise PeerError(
            f"the connection to another rank broke ({first_line(error)}); a rank has ended, and says why if it can"
        ) from None


class _DataUnpickler(pickle.Unpickler):
    """Reads plain data and the dataclasses and named tuples of this package, and nothing that can do anything.

    The network of a job is not authenticated, neither here nor in NCCL: what listens must not run what it is sent.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name in _SAFE.get(module, ()):
            return super().find_class(module, name)
        found = getattr(sys.modules.get(module), name, None) if module.partition(".")[0] in _ROOMS else None
        if isinstance(found, type) and found.__module__ == module and _is_data(found):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is no data")


def _is_data(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or issubclass(kind, Enum) or hasattr(kind, "_fields")


def _encode(value: object) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=np.uint8))


def _decode(content: torch.Tensor) -> Any:
    return _DataUnpickler(io.BytesIO(content.numpy().tobytes())).load()


def _decode_all(contents: list[torch.Tensor], lengths: list[int]) -> list[Any]:
    return [_decode(content[:length]) for content, length in zip(contents, lengths, strict=True)]


def _place(environment: Mapping[str, str]) -> tuple[int, int]:
    for size, rank in _RANK_VARIABLES:
        if size in environment and rank in environment:
            ranks = launcher_number(environment, size, 1)
            return ranks, launcher_number(environment, rank, 0, ranks - 1)
    raise LaunchError(
        "nothing says which rank this is: start it with torchrun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and"
        " MASTER_PORT; for a single process leave ROOKERY_CONTROL away"
    )


def _store(environment: Mapping[str, str], rank: int, met: threading.Event) -> Store:
    """Return the store at which the ranks of this job meet; rank 0 keeps it unless torchrun does."""
    address = environment.get("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR"))
    if address is None:
        raise LaunchError("no address to meet at: set MASTER_ADDR to an address of rank 0's node")
    try:
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return _client(address, launcher_number(environment, "MASTER_PORT", 1, 65535))
        if not ({"SLURM_JOB_ID", "SLURM_STEP_ID"} <= environment.keys()) or "RANK" in environment:
            return _store_of_nameless(environment, address, rank)
        first = _port_of_step(environment)
        job = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}.{first}"
        if rank == 0:
            store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            _announce(first, job, store.port, met)
            return store
        return _client(address, _ask(address, first, job))
    except RuntimeError as error:
        raise LaunchError(
            f"rank {rank} on {socket.gethostname()} does not reach {address}: {first_line(error)}; set MASTER_ADDR to"
            " an address of rank 0's node and MASTER_PORT to a port that may be used there"
        ) from None


def _client(address: str, port: int) -> TCPStore:
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_MEET))


def _store_of_nameless(environment: Mapping[str, str], address: str, rank: int) -> Store:
    """Return the store at MASTER_PORT itself: nothing but the port tells such a job from others on the host."""
    port = launcher_number(environment, "MASTER_PORT", 1, 65535)
    advice = f"two jobs may have the same MASTER_PORT; set it to a free one (it is {port})"
    if rank == 0:
        try:
            store = TCPStore(address, port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise LaunchError(
                f"rank 0 on {socket.gethostname()} cannot listen on port {port}: {first_line(error)}; {advice}"
            ) from None
    else:
        store = _client(address, port)
    if store.add(f"rank-{rank}", 1) > 1:
        raise LaunchError(f"at {address}, port {port}, another rank {rank} was there before; {advice}")
    return store


def _port_of_step(environment: Mapping[str, str]) -> int:
    """Return the port that a step tries first: MASTER_PORT, or another for every step, so that few meet on a node."""
    if "MASTER_PORT" in environment:
        return launcher_number(environment, "MASTER_PORT", 1, 65535 - _PORTS_TRIED)
    job, step = (launcher_number(environment, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20000 + (job * 16 + step) % 20000


def _announce(first: int, job: str, port: int, met: threading.Event) -> None:
    """Tell whoever asks on the first port from `first` on that is free here where `job` has its store, until `met`."""
    listener = next((each for each in map(_listener, range(first, first + _PORTS_TRIED)) if each is not None), None)
    if listener is None:
        raise LaunchError(f"ports {first} to {first + _PORTS_TRIED - 1} are taken; set MASTER_PORT to another")
    listener.settimeout(_SECONDS_BETWEEN_LOOKS)

    def answer() -> None:
        with listener:
            while not met.is_set():
                with suppress(OSError):  # nobody asks at present, or who asked has gone
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(json.dumps({"rookery": job, "port": port}).encode() + b"\n")

    threading.Thread(target=answer, name="rendezvous", daemon=True).start()


def _listener(port: int) -> socket.socket | None:
    try:
        return socket.create_server(("", port), backlog=128)
    except OSError:
        return None


def _ask(address: str, first: int, job: str) -> int:
    """Return the port of the store of `job`, from whichever of the ports that rank 0 may have taken answers for it."""
    deadline = time.monotonic() + _SECONDS_TO_MEET
    while time.monotonic() < deadline:
        for candidate in range(first, first + _PORTS_TRIED):
            try:
                with socket.create_connection((address, candidate), timeout=2.0) as connection:
                    answer = json.loads(connection.makefile().readline(200))
                if isinstance(answer, dict) and answer.get("rookery") == job:
                    return int(answer["port"])
            except (OSError, ValueError):  # nobody there yet, or another program
                continue
        time.sleep(0.2)
    raise LaunchError(
        f"rank 0 does not answer at {address}, ports {first} to {first + _PORTS_TRIED - 1}, within"
        f" {_SECONDS_TO_MEET:.0f} s; set MASTER_ADDR to an address of its node"
    )


def _group(store: Store, rank: int, size: int, environment: Mapping[str, str]) -> ProcessGroupGloo:
    """Start gloo on the interface that leads to rank 0, unless the environment names one.

    A rank that does not come, or dies meanwhile, makes this fail on the others after a time; messages wait for ever.
    """
    name = "GLOO_SOCKET_IFNAME"
    limit = timedelta(seconds=_SECONDS_TO_MEET)
    if name in environment:
        group = ProcessGroupGloo(store, rank, size, limit)
    else:
        own = interface_towards(environment.get("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "")))
        hosts = _hosts(store, rank, size)
        chosen = "lo" if len(hosts) == 1 else own
        try:
            if chosen is not None:
                os.environ[name] = chosen
            group = ProcessGroupGloo(store, rank, size, limit)
        finally:
            os.environ.pop(name, None)  # the tensors' groups choose for themselves
    settings: Any = group
    settings.set_timeout(_FOREVER)
    return group


def _hosts(store: Store, rank: int, size: int) -> set[str]:
    """Return the names of all hosts; a collective."""
    store.set(f"host-{rank}", socket.gethostname())
    if rank == 0:
        names = {name.decode() for name in store.multi_get([f"host-{each}" for each in range(size)])}
        store.set("hosts", json.dumps(sorted(names)))
    return set(json.loads(store.get("hosts")))


def interface_towards(address: str) -> str | None:
    """Return the network interface by which this host reaches `address`, None if it cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next(
        (name for name, found in psutil.net_if_addrs().items() if own in {each.address for each in found}), None
    )
