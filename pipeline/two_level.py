"""Two levels of data parallelism: ZeRO inside a node, and between nodes an average of each rank's own shard.

A rank holds 1/LOCAL_WORLD_SIZE of the gradient after the reduction inside its node. The ranks with the same place in
every node hold the same shard; they average it among themselves, chunk by chunk, so that each sends that fraction of
the gradient over the network. The chunks have a fixed order, the same on all ranks, and each is begun when it and all
before it are final: whatever depths the ranks have, they begin the same collectives in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed

from data_prep.world import World
from pipeline.errors import ConfigError
from pipeline.journal import journal
from pipeline.launch import CommConfig, ranks_of_nodes

if TYPE_CHECKING:
    from mpi4py import MPI

NODE, BETWEEN_NODES = "node", "between nodes"
MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Where this rank stands in nodes of equal size.

    Attributes:
        node: process group of the ranks of its node.
        between: process group of the ranks with its place in every node.
        nodes: number of nodes.
        index: number of its node, from 0.
        place: its place in the node, from 0.
        size: ranks of a node.
    """

    node: Any
    between: Any
    nodes: int
    index: int
    place: int
    size: int


def check_levels(comm: CommConfig, world: World) -> list[list[int]]:
    """Return the ranks of every node; a collective.

    Raises:
        ConfigError: the nodes have different numbers of ranks; on every rank.
        LaunchError: comm.transport is mpi, but the ranks were not started by MPI.
    """
    if comm.transport == "mpi":
        _ = world.communicator
    nodes = ranks_of_nodes(world)
    sizes = sorted({len(ranks) for ranks in nodes})
    if len(sizes) > 1:
        raise ConfigError(
            f"zero.scope: node needs equally many ranks on every node, but there are nodes of {sizes[0]} and of"
            f" {sizes[-1]}; start as many ranks on each, or use zero.scope=world"
        )
    return nodes


def build_levels(comm: CommConfig, world: World) -> Levels | None:
    """Make the process groups of the two levels; a collective. None if all ranks are on one node.

    Raises:
        ConfigError, LaunchError: see `check_levels`.
    """
    nodes = check_levels(comm, world)
    if len(nodes) == 1:
        return None
    # Every rank makes all groups, in the same order, as the collective library asks.
    inside = [torch.distributed.new_group(ranks) for ranks in nodes]
    across = [torch.distributed.new_group(list(ranks)) for ranks in zip(*nodes, strict=True)]
    for group in inside:
        journal.name_group(group, NODE)
    for group in across:
        journal.name_group(group, BETWEEN_NODES)
    index = next(index for index, ranks in enumerate(nodes) if world.rank in ranks)
    place = nodes[index].index(world.rank)
    return Levels(
        node=inside[index], between=across[place], nodes=len(nodes), index=index, place=place, size=len(nodes[0])
    )


class Transport(ABC):
    """Sums tensors in place over the ranks of equal place, several at a time."""

    @abstractmethod
    def start(self, chunk: torch.Tensor) -> None:
        """Begin to sum `chunk` (contiguous), which nobody may touch before `wait` returns."""

    @abstractmethod
    def poll(self) -> None:
        """Let go on what was begun, where the library does not do so by itself; returns at once."""

    @abstractmethod
    def wait(self) -> None:
        """Return when everything begun is summed, or, on an accelerator, ordered before what is queued next."""


def build_transport(comm: CommConfig, levels: Levels, world: World, device: torch.device) -> Transport:
    """Return the transport that `comm` asks for; a collective."""
    if comm.transport == "collective":
        return CollectiveTransport(levels.between, device)
    communicator = world.communicator
    assert communicator is not None  # there are several nodes
    peers = cast("MPI.Intracomm", communicator.Split(levels.place, levels.index))
    return MpiTransport(peers, device, gpu_aware=comm.gpu_aware_mpi)


class CollectiveTransport(Transport):
    """NCCL, RCCL or gloo, on a process group of its own.

    Args:
        group: the ranks of equal place.
        device: where the library takes tensors from; others are copied there and back.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self._pending: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def start(self, chunk: torch.Tensor) -> None:
        """See `Transport`."""
        buffer = chunk if chunk.device.type == self._device.type else chunk.to(self._device)
        with journal.collective("all_reduce", buffer.nbytes, BETWEEN_NODES):
            work = torch.distributed.all_reduce(buffer, group=self._group, async_op=True)
        self._pending.append((journal.noted_work(work, "all_reduce", BETWEEN_NODES), chunk, buffer))

    def poll(self) -> None:
        """See `Transport`; the library has threads or queues of its own."""

    def wait(self) -> None:
        """See `Transport`."""
        for work, chunk, buffer in self._pending:
            work.wait()
            if buffer is not chunk:
                chunk.copy_(buffer)
        self._pending.clear()


class MpiTransport(Transport):
    """Non-blocking all-reduce of MPI, of host memory unless MPI can read the accelerator's.

    MPI goes on with a message only inside calls to it: `start` and `poll` are such calls.

    Args:
        communicator: the ranks of equal place.
        device: where the tensors are computed.
        gpu_aware: hand over device memory as it is.
    """

    def __init__(self, communicator: MPI.Intracomm, device: torch.device, *, gpu_aware: bool) -> None:
        self._communicator, self._device, self._gpu_aware = communicator, device, gpu_aware
        self._staged: deque[tuple[torch.Tensor, torch.Tensor, torch.Event | None]] = deque()
        self._sent: deque[tuple[torch.Tensor, torch.Tensor, Any]] = deque()

    def start(self, chunk: torch.Tensor) -> None:
        """See `Transport`."""
        buffer, event = chunk, None
        if chunk.device.type != "cpu" and not self._gpu_aware:
            buffer = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True)
            buffer.copy_(chunk, non_blocking=True)
        if self._device.type != "cpu":  # the memory, wherever it is, is being filled by the device's queue
            event = torch.Event(self._device)
            event.record()
        self._staged.append((chunk, buffer, event))
        self.poll()

    def poll(self) -> None:
        """See `Transport`."""
        while self._staged and ((event := self._staged[0][2]) is None or event.query()):
            self._send()
        if self._sent:
            self._sent[0][2].Test()

    def wait(self) -> None:
        """See `Transport`."""
        while self._staged:
            event = self._staged[0][2]
            if event is not None:
                event.synchronize()
            self._send()
        for chunk, buffer, request in self._sent:
            with journal.collective("wait for Iallreduce", 0, BETWEEN_NODES):
                request.Wait()
            if buffer is not chunk:
                chunk.copy_(buffer, non_blocking=True)
        self._sent.clear()

    def _send(self) -> None:
        from mpi4py import MPI

        chunk, buffer, _ = self._staged.popleft()
        memory = buffer.numpy() if buffer.device.type == "cpu" else buffer
        with journal.collective("Iallreduce", buffer.nbytes, BETWEEN_NODES):
            request = self._communicator.Iallreduce(MPI.IN_PLACE, memory, op=MPI.SUM)
        self._sent.append((chunk, buffer, request))


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a parameter's gradient that lies in this rank's shard.

    Attributes:
        parameter: number of the parameter in the order of `model.parameters()`.
        flat: number of the flat tensor that holds it.
        offset: first element there.
        numel: number of elements.
    """

    parameter: int
    flat: int
    offset: int
    numel: int


class ShardedGradients(Protocol):
    """The gradients that a sharded optimizer of DeepSpeed holds on this rank."""

    parts: list[Part]
    """What lies where."""

    def flats(self) -> list[torch.Tensor]:
        """Return the flat tensors (numel,), float32, of the step in progress."""

    def watch(self, final: Callable[[list[int]], None], poll: Callable[[], None]) -> None:
        """Call `final` with parameters whose gradients are final inside the node, and `poll` now and then."""

    def averaged(self) -> None:
        """Take note that the flat tensors have changed."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What travels in one message: elements [start, stop) of a flat tensor, final when `parameters` are."""

    flat: int
    start: int
    stop: int
    parameters: frozenset[int]


def chunk_numel(comm: CommConfig) -> int:
    """Return the number of float32 gradients in a full chunk."""
    return comm.chunk_mb * MEGABYTE // 4


def cut(parts: list[Part], chunk_numel: int) -> list[Chunk]:
    """Return the chunks of a shard in the order in which they travel.

    The backward pass reaches the parameters in about the reverse of their order in the model; a chunk is final with
    the last of its parameters.
    """
    chunks = []
    for flat in sorted({part.flat for part in parts}):
        inside = [part for part in parts if part.flat == flat]
        end = max(part.offset + part.numel for part in inside)
        for start in range(0, end, chunk_numel):
            stop = min(start + chunk_numel, end)
            held = [part for part in inside if part.offset < stop and start < part.offset + part.numel]
            if held:
                parameters = frozenset(part.parameter for part in held)
                chunks.append(Chunk(flat=flat, start=start, stop=stop, parameters=parameters))
    return sorted(chunks, key=lambda chunk: (-min(chunk.parameters), chunk.flat, chunk.start))


class ShardAverage:
    """Averages this rank's shard of the gradients over the nodes.

    With overlap the chunks are begun while the backward pass goes on, from the hooks by which DeepSpeed reduces inside
    the node; without, after it, and each waits for the one before. The sums are of the same chunks, so that both give
    the same bits.

    Args:
        gradients: the shard.
        transport: sums between nodes.
        nodes: number of nodes.
        comm: chunk size and overlap.
    """

    def __init__(self, gradients: ShardedGradients, transport: Transport, nodes: int, comm: CommConfig) -> None:
        self._gradients, self._transport, self._nodes, self._overlap = gradients, transport, nodes, comm.overlap
        self.chunks = cut(gradients.parts, chunk_numel(comm))
        self.begun = 0
        """Chunks of the step in progress whose average has begun."""
        self._final: set[int] = set()
        if self._overlap:
            gradients.watch(self._begin_final, transport.poll)

    def _begin_final(self, parameters: Iterable[int]) -> None:
        self._final.update(parameters)
        while self.begun < len(self.chunks) and self.chunks[self.begun].parameters <= self._final:
            self._begin_next()
        self._transport.poll()

    def _begin_next(self) -> None:
        chunk = self.chunks[self.begun]
        self.begun += 1
        self._transport.start(self._gradients.flats()[chunk.flat][chunk.start : chunk.stop])

    def finish(self) -> None:
        """Average what is left, and wait for everything; after the backward pass, before norm and optimizer step."""
        while self.begun < len(self.chunks):
            self._begin_next()
            if not self._overlap:
                self._transport.wait()
        self._transport.wait()
        for flat in self._gradients.flats():
            flat.mul_(1.0 / self._nodes)
        self._gradients.averaged()
        self.begun = 0
        self._final.clear()


class WholeAverage:
    """Averages whole gradients (stage 0) over all ranks: each rank reduces and sends 1/size of them between nodes.

    Not overlapped: stage 0 is for models so small that it does not matter.

    Args:
        parameters: those of the model.
        levels: groups.
        transport: sums between nodes.
        comm: chunk size.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], levels: Levels, transport: Transport, comm: CommConfig
    ) -> None:
        self._levels, self._transport = levels, transport
        self._chunk = chunk_numel(comm)
        self._buckets: list[list[torch.nn.Parameter]] = []
        room = 0
        for parameter in parameters:
            if parameter.numel() > room:
                self._buckets.append([])
                room = self._chunk * levels.size
            self._buckets[-1].append(parameter)
            room -= parameter.numel()

    @torch.no_grad()
    def finish(self) -> None:
        """Average all gradients; after the backward pass."""
        levels = self._levels
        for bucket in self._buckets:
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in bucket]
            whole = torch.cat([gradient.reshape(-1) for gradient in gradients])
            numel = whole.numel()
            whole = torch.nn.functional.pad(whole, (0, -numel % levels.size))
            own = torch.empty(whole.numel() // levels.size, dtype=whole.dtype, device=whole.device)
            with journal.collective("reduce_scatter_tensor", whole.nbytes, NODE):
                torch.distributed.reduce_scatter_tensor(own, whole, group=levels.node)
            for chunk in own.split(self._chunk):
                self._transport.start(chunk)
                self._transport.wait()
            own.mul_(1.0 / (levels.size * levels.nodes))
            with journal.collective("all_gather_into_tensor", whole.nbytes, NODE):
                torch.distributed.all_gather_into_tensor(whole, own, group=levels.node)
            for parameter, average in zip(bucket, whole[:numel].split([each.numel() for each in bucket]), strict=True):
                parameter.grad = average.view_as(parameter)
