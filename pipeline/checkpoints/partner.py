"""Each rank's bytes, held also by the rank of equal place on another node: the loss of one node loses nothing.

The bytes go round the nodes: each sends to the next and receives from the one before. Messages are non-blocking, and
only the main thread touches MPI: unless the network moves them by itself, they move on while that thread polls, and
while it waits in any other call to MPI.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.world import LaunchError, World
from pipeline.checkpoints.node_directory import Place

if TYPE_CHECKING:
    from mpi4py import MPI

# Well below what MPI counts in one message, 2^31 - 1; several travel at a time.
CHUNK_BYTES = 2**28
# An MPI that moves the bytes itself moves about a megabyte whenever it is asked, which once a step is too little.
_SHARE_OF_TIME = 0.02


class Partner:
    """Sends this rank's bytes to the next node, and receives those of the node before; from the main thread only.

    Args:
        communicator: the ranks of equal place, one a node, in the order of the nodes; of nobody else's messages.
        source: rank whose bytes it receives.
        target: rank that it sends to.

    Attributes:
        source: see above.
        target: see above.
    """

    def __init__(self, communicator: MPI.Intracomm, source: int, target: int) -> None:
        self.source, self.target = source, target
        self._communicator = communicator
        size, rank = communicator.Get_size(), communicator.Get_rank()
        self._before, self._next = (rank - 1) % size, (rank + 1) % size
        self._memory = np.empty(0, dtype=np.uint8)
        self._coming = np.empty(1, dtype=np.int64)
        self._own: tuple[Any, ...] = ()
        self._announcement: Any = None
        self._requests: list[Any] = []
        self._started, self._polled = False, 0.0

    @staticmethod
    def build(world: World, at: Place) -> tuple[Partner | None, str]:
        """Return the partner of the rank that stands `at`, or None and why it has none; a collective, one outcome."""
        nodes = at.nodes
        if len(nodes) == 1:
            return None, "all ranks are on one node"
        if len({len(ranks) for ranks in nodes}) > 1:
            return None, "the nodes have different numbers of ranks"
        try:
            communicator = world.communicator
        except LaunchError:
            return None, "the ranks were started without MPI"
        assert communicator is not None  # there are several nodes
        peers: Any = communicator.Split(at.place, at.index)
        source, target = (nodes[other % len(nodes)][at.place] for other in (at.index - 1, at.index + 1))
        return Partner(peers, source, target), ""

    def start(self, own: memoryview) -> None:
        """Begin to send `own`, bytes that nobody may change before they have gone, and to receive.

        All ranks start for the same save, and in the same order; with nothing to send, an empty view. What the last
        one received is overwritten.
        """
        assert not self._started, "the last bytes have not all come"
        self._started, self._polled = True, time.perf_counter()
        size = np.array([len(own)], dtype=np.int64)
        self._own = (own, size)  # MPI reads them meanwhile
        self._announcement = self._communicator.Irecv(self._coming, source=self._before)
        self._requests = [self._communicator.Isend(size, dest=self._next)]
        self._requests += [self._communicator.Isend(chunk, dest=self._next) for chunk in _chunks(own)]

    def poll(self) -> memoryview | None:
        """Let the messages move on; return what was received once everything has come and gone, None before.

        It takes at most a fiftieth of the time since the last poll. What it returns belongs to the caller until the
        next `start`.
        """
        assert self._started
        begun = time.perf_counter()
        deadline = begun + _SHARE_OF_TIME * (begun - self._polled)
        while not (ended := self._move_on()) and time.perf_counter() < deadline:
            pass
        self._polled = time.perf_counter()
        if not ended:
            return None
        self._started, self._own = False, ()
        return self._received()

    def _move_on(self) -> bool:
        """Ask MPI once; return whether everything has come and gone."""
        if self._announcement is not None:
            if not self._announcement.Test():
                return False
            self._announcement = None
            if len(self._memory) < self._coming[0]:
                self._memory = np.empty(self._coming[0], dtype=np.uint8)
            received = _chunks(self._received())
            self._requests += [self._communicator.Irecv(chunk, source=self._before) for chunk in received]
        self._requests = [request for request in self._requests if not request.Test()]
        return not self._requests

    def _received(self) -> memoryview:
        return self._memory[: self._coming[0]].data


def _chunks(memory: memoryview) -> list[memoryview]:
    return [memory[start : start + CHUNK_BYTES] for start in range(0, len(memory), CHUNK_BYTES)]
