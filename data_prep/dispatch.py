"""Work handed out one piece at a time, so that a rank with slow pieces gets fewer of them.

Rank 0 keeps the counter and answers requests between its own batches; the others ask for their next piece before they
have finished the last, so that the answer is there when they need it. Plain messages, because one-sided access
(MPI_Fetch_and_op) waits on many machines until the target enters MPI, just as these do, and hangs on some.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from data_prep.world import World

if TYPE_CHECKING:
    from mpi4py import MPI

_TO_ROOT, _TO_RANK = 71, 72  # message tags
_SECONDS_BETWEEN_REPORTS = 0.5
_SECONDS_BETWEEN_POLLS = 0.002


class Dispatcher:
    """Hands out the numbers 0 ... `pieces` - 1 to the ranks, each once.

    Every rank makes one, calls `take` until it returns None, or `abandon` after a failure of its own, and then `close`.
    In between it calls `tick` every second or so. Collectives may follow `close`, not come before it.
    """

    def __init__(self, world: World, pieces: int) -> None:
        self._communicator = world.communicator
        self._is_root = world.rank == 0
        self._next, self._pieces = 0, pieces
        self._present = set(range(1, world.size))  # ranks of which rank 0 may still have messages to receive
        self._amounts = [0] * world.size  # done by each rank, known to rank 0
        self._asked = False
        self._reported_at = 0.0
        self._sent: list[MPI.Request] = []

    @property
    def done(self) -> int:
        """The amount of work that all ranks have reported; known to rank 0."""
        return sum(self._amounts)

    def take(self) -> int | None:
        """Return the next piece for this rank, None when there is none left or a rank has failed."""
        if self._is_root:
            self._serve()
            return self._advance()
        self.ask_ahead()
        assert self._communicator is not None
        piece: int | None = self._communicator.recv(source=0, tag=_TO_RANK)
        self._asked = False
        return piece

    def ask_ahead(self) -> None:
        """Ask for the next piece now; `take` will return it."""
        if not self._is_root and not self._asked:
            self._send(("ask", None), 0, _TO_ROOT)
            self._asked = True

    def tick(self, amount: int) -> None:
        """Report that this rank has done `amount` in all; rank 0 answers whoever has asked meanwhile."""
        if self._is_root:
            self._amounts[0] = amount
            self._serve()
        elif time.monotonic() - self._reported_at > _SECONDS_BETWEEN_REPORTS:
            self._reported_at = time.monotonic()
            self._send(("amount", amount), 0, _TO_ROOT)

    def abandon(self) -> None:
        """Hand out nothing more, on any rank, because this rank has failed."""
        self._next = self._pieces
        if not self._is_root:
            if self._asked:
                self.take()
            self._send(("abandon", None), 0, _TO_ROOT)

    def close(self, on_wait: Callable[[], None]) -> None:
        """Rank 0 answers until every other rank has taken its leave; the others wait until their messages are out.

        A rank asks ahead, so its reports of progress go on after it was told that nothing is left; its leave is what
        comes last. A message that nobody received would make MPI end with an error.
        """
        if not self._is_root:
            self._send(("leave", None), 0, _TO_ROOT)
        while self._is_root and self._present:
            self._serve()
            on_wait()
            time.sleep(_SECONDS_BETWEEN_POLLS)
        for request in self._sent:
            request.wait()

    def _advance(self) -> int | None:
        if self._next >= self._pieces:
            return None
        self._next += 1
        return self._next - 1

    def _serve(self) -> None:
        communicator = self._communicator
        if communicator is None:
            return
        from mpi4py import MPI  # initialises MPI, which a single rank must not

        status = MPI.Status()
        while communicator.iprobe(source=MPI.ANY_SOURCE, tag=_TO_ROOT, status=status):
            rank = status.Get_source()
            kind, amount = communicator.recv(source=rank, tag=_TO_ROOT)
            if kind == "amount":
                self._amounts[rank] = amount
            elif kind == "ask":
                self._send(self._advance(), rank, _TO_RANK)
            elif kind == "abandon":
                self._next = self._pieces
            else:
                self._present.discard(rank)

    def _send(self, message: object, rank: int, tag: int) -> None:
        assert self._communicator is not None
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._communicator.isend(message, dest=rank, tag=tag))
