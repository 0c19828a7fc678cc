"""How the ranks of a job find each other: rendezvous of the collective library, devices, and what a node is."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch
import torch.distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from data_prep.world import World, first_line
from pipeline.accelerator import communication_backend, device_identity, select_device, visible_devices
from pipeline.errors import ConfigError, UnhealthyNodeError

TRANSPORTS = ("collective", "mpi")
_PORTS_TRIED = 16
_NODES_SHOWN = 8
_SECONDS_TO_CONNECT = 60
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CommConfig:
    """Communication between ranks: where they meet, and how nodes exchange gradients."""

    interface: str | None = None
    """Network interface of rendezvous, gloo and NCCL/RCCL, or several (hsn0,hsn1); null: that of the host's address."""
    port: int | None = None
    """Port of the rendezvous; if it is taken, the next free one of 16. null: any free one."""
    timeout_minutes: float = 10.0
    """Longest wait of a collective before it fails."""
    transport: str = "collective"
    """Between nodes with zero.scope=node: collective (NCCL, RCCL, gloo), or mpi (staged through the host)."""
    chunk_mb: int = 64
    """Size of the pieces in which gradients travel between nodes."""
    overlap: bool = True
    """Send gradients between nodes while the backward pass still runs."""
    gpu_aware_mpi: bool = False
    """Hand device memory to MPI; only where the site's MPI is safe beside NCCL/RCCL."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"comm.port: {self.port} is not in 1..65535; use null for a free one")
        if self.timeout_minutes <= 0.0:
            raise ConfigError(f"comm.timeout_minutes: {self.timeout_minutes} is not positive")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"comm.transport: {self.transport!r} is not one of {', '.join(TRANSPORTS)}")
        if self.chunk_mb < 1:
            raise ConfigError(f"comm.chunk_mb: {self.chunk_mb} is not positive")
        if self.gpu_aware_mpi and self.transport != "mpi":
            raise ConfigError("comm.gpu_aware_mpi: needs comm.transport=mpi")


class _Meeting(NamedTuple):
    """Where the ranks of this process's job meet, and who this one is."""

    address: str
    port: int
    rank: int
    nodes: list[str]


_meeting: list[_Meeting] = []  # at most one; empty before the process group is started


def start_process_group(world: World, comm: CommConfig | None = None) -> torch.device:
    """Agree on a rendezvous over the control plane, start the collective library, and return this rank's device.

    Raises:
        ConfigError: on every rank; no such interface, no free port, rank 0 out of reach, fewer devices than ranks.
        UnhealthyNodeError: on every rank; nodes lack devices that others have, or have one that does not start.
    """
    comm = comm or CommConfig()
    host, cores = socket.gethostname(), sorted(os.sched_getaffinity(0))
    places = world.allgather((host, cores))
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that the launcher did not bind to cores of their own share them; more threads than cores thrash.
        torch.set_num_threads(max(1, len(cores) // places.count((host, cores))))
    alone = all(name == host for name, _ in places)
    nodes = world.allgather(node_name())
    _choose_interface(world, comm, alone=alone)
    device = _choose_device(world, nodes)
    store = _meet(world, comm, nodes, alone=alone)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that this PyTorch deprecates; nobody who runs a job can act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would probe compilers and build a shared-memory operator for CPU inference: a minute that looks like a
    # hang, and buffers in /dev/shm that outlive a killed rank. Training uses none of its compiled operators.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    _import_without_compiling()
    limit = timedelta(minutes=comm.timeout_minutes)
    torch.distributed.init_process_group(
        communication_backend(device), store=store, rank=world.rank, world_size=world.size, timeout=limit
    )
    deepspeed.init_distributed(
        dist_backend=communication_backend(device), auto_mpi_discovery=False, verbose=False, timeout=limit
    )
    return device


def _import_without_compiling() -> None:
    """Import DeepSpeed's Muon, which is not ours: it would load PyTorch's compiler, two seconds of every start."""
    import deepspeed.runtime.compiler as compiler

    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_


def stop_process_group() -> None:
    """Leave the collective library; without it gloo sometimes aborts at exit."""
    _meeting.clear()
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()  # which forgets DeepSpeed's own references too


def roll_call(topic: str, note: str, seconds: float) -> dict[int, str]:
    """Return rank -> note of the ranks that call this with the same topic, within `seconds`.

    For the moment when ranks hang: it needs neither the collective library nor the control plane nor other threads,
    but a new connection to the store of the rendezvous, which lives in rank 0. If that does not answer, nobody is
    heard, and the result is empty.
    """
    meeting = _meeting[0]
    heard: dict[int, str] = {}
    lock = threading.Lock()

    def ask() -> None:
        deadline = time.monotonic() + seconds
        store = TCPStore(meeting.address, meeting.port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_CONNECT))
        store.append(  # type: ignore[attr-defined]
            f"roll call {topic}", json.dumps([meeting.rank, note]) + "\n"
        )
        while len(heard) < len(meeting.nodes) and time.monotonic() < deadline:
            answers = dict(map(json.loads, store.get(f"roll call {topic}").decode().splitlines()))
            with lock:
                heard.update(answers)
            time.sleep(min(0.1, seconds / 10))

    def ask_if_there() -> None:
        with suppress(RuntimeError):  # the store is gone, or out of reach
            ask()

    # A store that accepts connections and says nothing, as that of a stopped process, holds its clients for ever.
    asking = threading.Thread(target=ask_if_there, name="roll call", daemon=True)
    asking.start()
    asking.join(seconds + 1.0)
    with lock:
        return dict(sorted(heard.items()))


def node_name() -> str:
    """Return SLURM's name of this node, since several of its nodes may be one host, or else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def nodes_of_ranks() -> list[str]:
    """Return the name of each rank's node, in rank order; known once the process group has been started."""
    return _meeting[0].nodes


def _choose_interface(world: World, comm: CommConfig, *, alone: bool) -> None:
    """Tell gloo and NCCL which network interface to use, unless the environment does."""
    problem = None
    if comm.interface is not None:
        try:
            address_of(comm.interface)
        except ConfigError as error:
            problem = str(error)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", comm.interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", comm.interface)
    elif alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _judge_problems(world.allgather((node_name(), problem)), world)


def _judge_problems(said: Sequence[tuple[str, str | None]], world: World) -> None:
    """Refuse the configuration if all nodes have a problem with it, else the nodes that have; on every rank.

    Args:
        said: of every rank that was asked, its node and what is wrong, None if nothing is.
        world: the ranks.
    """
    ill = {node: problem for node, problem in said if problem is not None}
    if ill:
        world.failed_together = True  # all ranks judge the same
        reason = "; ".join(list(ill.values())[:_NODES_SHOWN])
        if len(ill) == len({node for node, _ in said}):
            raise ConfigError(reason)
        raise UnhealthyNodeError(reason, list(ill))


def address_of(interface: str) -> str:
    """Return the address of this host on a network interface, or on the first of several: `hsn0,hsn1`.

    Raises:
        ConfigError: one of them does not exist, or has no address; with those that have one.
    """
    addresses = {
        name: next((each.address for family in _FAMILIES for each in found if each.family == family), None)
        for name, found in psutil.net_if_addrs().items()
    }
    names = interface.split(",")
    for name in names:
        if addresses.get(name) is None:  # gloo takes the list as it is, and fails at the first that is not there
            usable = sorted(other for other, address in addresses.items() if address is not None)
            raise ConfigError(
                f"comm.interface: {name!r} is no network interface with an address on {socket.gethostname()}; it has"
                f" {', '.join(usable)}"
            )
    return str(addresses[names[0]])


class DeviceChoice(NamedTuple):
    """What a rank found when it looked for its device.

    Attributes:
        node: the name of its node.
        host: the name of its host, of which several nodes may be one.
        visible: the number of devices that it sees.
        identity: what tells its device from the others of the host, None for CPUs.
        crowded: why it has none, where its node has too few for its ranks.
        problem: why its device cannot be used.
    """

    node: str
    host: str
    visible: int = 0
    identity: str | None = None
    crowded: str | None = None
    problem: str | None = None


def _choose_device(world: World, nodes: list[str]) -> torch.device:
    device, own = _look_for_device(nodes[world.rank], nodes[: world.rank].count(nodes[world.rank]))
    choices = world.allgather(own)
    try:
        judge_devices(choices)
    except (ConfigError, UnhealthyNodeError):
        world.failed_together = True  # all ranks judge the same
        raise
    assert device is not None
    os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE") or str(nodes.count(nodes[world.rank]))
    # DeepSpeed takes it for the index of the device, which a scheduler that binds devices makes 0 on every rank.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    return device


def _look_for_device(node: str, local_rank: int) -> tuple[torch.device | None, DeviceChoice]:
    """Return this rank's device and what it found; no error leaves, for the other ranks wait to hear of it."""
    own = DeviceChoice(node, socket.gethostname())
    try:
        own = own._replace(visible=visible_devices())
        device = select_device(local_rank)
        return device, own._replace(identity=device_identity(device))
    except ConfigError as error:
        return None, own._replace(crowded=str(error))
    except Exception as error:  # whatever a sick device says
        return None, own._replace(problem=f"its device does not start: {first_line(error)}")


def judge_devices(choices: Sequence[DeviceChoice]) -> None:
    """Refuse nodes that lack devices; every rank gives the choices of all, in rank order, and judges the same.

    A node with as many devices as any other, and more ranks than those, is a mistake of who started the ranks. With
    fewer devices than others, and too few or none for its ranks, it is unhealthy.

    Raises:
        ConfigError: more ranks than devices on a node that has all of its devices.
        UnhealthyNodeError: with the nodes whose devices are missing or do not start.
    """
    most = max(each.visible for each in choices)
    users = Counter((each.host, each.identity) for each in choices)
    ill: dict[str, str] = {}
    for rank, each in enumerate(choices):
        problem = each.problem or each.crowded
        if each.identity is not None and users[each.host, each.identity] > 1:
            problem = f"several ranks on {each.host} have the same device: start one rank a device"
        if most > each.visible == 0:
            problem = problem or "it sees no device"
        if problem is None:
            continue
        if each.problem is None and each.visible == most:
            raise ConfigError(problem)
        seen = f" ({each.visible} visible, {most} elsewhere)" if each.visible < most else ""
        ill.setdefault(each.node, f"{each.node}, rank {rank}: {problem}{seen}")
    if ill:
        everywhere = len(ill) > 1 and len(ill) == len({each.node for each in choices})
        raise UnhealthyNodeError("; ".join(list(ill.values())[:_NODES_SHOWN]), [] if everywhere else list(ill))


def _meet(world: World, comm: CommConfig, nodes: list[str], *, alone: bool) -> PrefixStore:
    """Return the store at which all ranks have met: rank 0 listens first, and then says where."""
    listening = None
    with world.guard("rendezvous"):
        if world.rank == 0:
            listening = _listen("127.0.0.1" if alone and comm.interface is None else _own_address(comm), comm.port)
    address, port = world.broadcast(None if listening is None else listening[1]) or ("", 0)
    store, problem = None if listening is None else listening[0], None
    if store is None:
        try:
            store = _join(address, port)
        except ConfigError as error:
            problem = str(error)
    _judge_problems(world.allgather((nodes[world.rank], problem))[1:], world)  # rank 0 reaches itself
    assert store is not None
    _meeting[:] = [_Meeting(address, port, world.rank, nodes)]
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), MASTER_ADDR=address, MASTER_PORT=str(port))
    return PrefixStore("collectives", store)


def _listen(address: str, first: int | None) -> tuple[TCPStore, tuple[str, int]]:
    """Return a store that listens on `address`, at the first free port from `first` on, and where that is."""
    ports = (0,) if first is None else range(first, min(first + _PORTS_TRIED, 65536))
    problem: OSError | None = None
    for port in ports:
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, port), family=family, backlog=4096)
        except OSError as error:
            problem = error
            continue
        taken = int(listener.getsockname()[1])
        if problem is not None:
            _log.warning("comm.port: %d is taken on %s; the ranks meet at %d", first, socket.gethostname(), taken)
        store = TCPStore(address, taken, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        return store, (address, taken)
    tried = "any port" if first is None else f"the ports {first} to {ports[-1]}"
    raise ConfigError(
        f"comm.port: rank 0 on {socket.gethostname()} cannot listen at {address} on {tried} ({problem}); choose another"
        " port or comm.interface"
    )


def _join(address: str, port: int) -> TCPStore:
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_CONNECT))
    except RuntimeError as error:
        raise ConfigError(
            f"comm.interface: {socket.gethostname()} does not reach rank 0 at {address}, port {port}"
            f" ({first_line(error)}); name the network interface that joins the nodes"
        ) from None


def _own_address(comm: CommConfig) -> str:
    """Return an address of this host that the other ranks reach."""
    if comm.interface is not None:
        return address_of(comm.interface)
    try:
        own = socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        own = []
    # Without a name service there is the address that srun was started from, which is the first node's in a batch job.
    fallback = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", socket.gethostname())
    return next((address for address in own if not address.startswith("127.")), fallback)


def ranks_of_nodes(world: World) -> list[list[int]]:
    """Return the ranks of each node, nodes in the order of their first rank; a collective.

    A node is what SLURM calls one, or a host, or each run of LOCAL_WORLD_SIZE consecutive ranks where that is set, as
    torchrun does and as one machine is made to look like several.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE differs between ranks, or does not divide the world.
    """
    own = os.environ.get("LOCAL_WORLD_SIZE") or None
    places = world.allgather((own, node_name()))
    sizes = sorted({str(size) for size, _ in places})
    if len(sizes) > 1:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE differs between ranks: {', '.join(sizes)}; set it alike on all, or nowhere"
        )
    if own is None:
        nodes: dict[str, list[int]] = {}
        for rank, (_, host) in enumerate(places):
            nodes.setdefault(host, []).append(rank)
        return list(nodes.values())
    if not own.isdecimal() or int(own) < 1 or world.size % int(own):
        raise ConfigError(f"LOCAL_WORLD_SIZE: {own} does not divide the {world.size} ranks into equal nodes")
    size = int(own)
    return [list(range(first, first + size)) for first in range(0, world.size, size)]
