"""A process that is told to end at most once, and never dies of that itself: the launcher of the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from slurm.joblog import say

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_SECONDS_BETWEEN = 0.2


class Attendant:
    """Runs one process at a time, and passes on to it that the job is told to end.

    A killed job leaves its processes a few seconds: the signal is passed on from within the handler, whatever else
    this process does at that moment, and a process that is to start later does not start at all.

    Args:
        number: the signal that the launcher passes on to its ranks: SIGUSR2 for `srun`, SIGTERM for `mpiexec`.

    Attributes:
        told: name of the first signal that this process got, or other reason to end; None before.
        ended: why the process that ran last was ended from here; None if it was not.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.told: str | None = None
        self.ended: str | None = None
        self._number = number
        self._process: subprocess.Popen[bytes] | None = None
        self._passed_on = False

    def listen(self) -> None:
        """Take the signals from now on; Submitit's own handlers would requeue the job, and log from within."""
        for number in _SIGNALS:
            signal.signal(number, self._receive)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes before each SIGTERM of SLURM

    def tell(self, reason: str) -> None:
        """Let the process know that it has to end, unless it knows."""
        if self.told is None:
            self.told = reason
            self._pass_on()

    def end(self, reason: str) -> None:
        """End the process, because of `reason`; again, later, by force: a launcher of MPI may wait for its ranks."""
        if self._process is not None:
            if self.ended is None:
                say(reason)
                self._process.terminate()  # which ends the step of an srun at once
            else:
                self._process.kill()
            self.ended = reason

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, between: Callable[[], None]
    ) -> int | None:
        """Run a command to its end, and return its exit status, negative for a signal; None if it was not to start.

        Args:
            command: the program and its arguments.
            environment: all of its environment.
            log: file to which its output is appended.
            between: called again and again meanwhile; it must not raise.

        Raises:
            OSError: the program or the file cannot be opened.
        """
        if self.told is not None:
            return None
        self.ended = None
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            self._pass_on()  # what came while it was being started
            while (status := self._process.poll()) is None:
                between()
                time.sleep(_SECONDS_BETWEEN)
        except BaseException:
            # Whoever goes away from here leaves no ranks behind that nobody waits for.
            self._process.terminate()  # which ends the step of an srun, and the ranks of an mpiexec
            self._process.wait()
            raise
        finally:
            self._process = None
        return status

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.tell(signal.Signals(number).name)

    def _pass_on(self) -> None:
        if self.told is not None and self._process is not None and not self._passed_on:
            self._passed_on = True
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, self._number)
