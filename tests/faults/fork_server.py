"""Ranks in a second: a process that has imported everything and forks them, with faults to order.

    server = fault_server()
    codes = server.train(workdir, "test.yaml", faults={1: Fault(...)})

The server is that of `multiprocessing`, one for all tests, with the library of faults preloaded. Ranks
find each other without MPI, whose state no fork would survive.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from slurm.local import rank_environment
from tests.faults import forked_rank
from tests.faults.forked_rank import serve
from tests.faults.interpose import Fault, build

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("torch._dynamo", "deepspeed", "rookery.cli", "pipeline.config", "pipeline.train", __name__)
CLEAN = (0, 10, 11, 12, 13)
"""Exit codes of ranks that ended as they meant to (docs/architecture.md)."""
SECONDS = 60.0


@cache
def fork_server() -> ForkServer:
    """Return the server, the same for all tests."""
    return ForkServer()


def fault_server() -> ForkServer:
    """Return the server, whose processes can have faults; without a compiler the test is skipped, in CI failed."""
    if not fork_server().has_faults:
        pytest.skip("no C compiler")
    return fork_server()


class ForkServer:
    """Starts processes that need not import anything.

    Attributes:
        has_faults: whether they have the library of faults.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="rookery-faults-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        library, before = build(folder), dict(os.environ)
        self.has_faults = library is not None
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        os.environ.update(rank_environment(2) | {"PYTHONPATH": str(ROOT)})
        if library is not None:
            os.environ["LD_PRELOAD"] = str(library)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.call(_nothing)  # which waits until everything is imported
        self._socket = folder / "ranks"
        self._ranks = self.start(serve, str(self._socket))

    def start(self, target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
        """Start `target`, which can be imported, in a process of its own."""
        process = self._context.Process(target=target, args=arguments, daemon=True)
        process.start()
        return process

    def call(self, target: Callable[..., None], *arguments: Any) -> int:
        """Run `target` in a process of its own; return its exit code, negative for a signal."""
        process = self.start(target, *arguments)
        process.join(SECONDS)
        process.kill()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def python(self) -> list[str]:
        """Return the words that a launcher starts in place of `python`; `-m MODULE` must follow."""
        while not self._socket.exists():
            assert self._ranks.exitcode is None, "nobody forks ranks"
            time.sleep(0.01)
        return [sys.executable, "-S", "-E", forked_rank.__file__, str(self._socket)]

    def programs(self) -> Path:
        """Return a directory with a program `rookery` that need not import anything, for shells and launchers."""
        program = self._socket.parent / "bin/rookery"
        if not program.exists():
            program.parent.mkdir()
            program.write_text(f'#!/bin/sh\nexec {shlex.join(self.python())} -m rookery "$@"\n')
            program.chmod(0o755)
        return program.parent

    def command(
        self, arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run `rookery ARGUMENTS` in `cwd` as one plain process."""
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / name for name in ("stdout", "stderr")]
            process = self._context.Process(target=_command, args=(arguments, cwd, dict(environment), outputs))
            process.start()
            process.join(4 * SECONDS)
            assert process.exitcode is not None, f"rookery {' '.join(arguments)} hangs"
            texts = [output.read_text() if output.exists() else "" for output in outputs]
        return subprocess.CompletedProcess(["rookery", *arguments], process.exitcode, *texts)

    def train(
        self,
        workdir: Path,
        *arguments: str,
        ranks: int = 2,
        faults: Mapping[int, Fault] | None = None,
        kill_after: float | None = None,
    ) -> list[int]:
        """Run `rookery train ARGUMENTS` in `workdir`, on ranks of which some have faults; return their exit codes.

        As a launcher does, it kills the other ranks soon after one has crashed. What ranks say goes to
        `workdir`/rank-RANK.log.

        Args:
            workdir: the current directory of the ranks.
            arguments: of the command.
            ranks: how many.
            faults: of the ranks that have one.
            kill_after: seconds from the start until all ranks are killed.
        """
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # ours, as torchrun's is its own
        places = [(rank, ranks, store.port, (faults or {}).get(rank)) for rank in range(ranks)]
        processes = [self.start(_train, workdir, arguments, *place) for place in places]
        deadline = time.monotonic() + (kill_after or SECONDS)
        while running := [process for process in processes if process.exitcode is None]:
            connection.wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
            if any(process.exitcode not in (None, *CLEAN) for process in processes):
                deadline = min(deadline, time.monotonic() + 0.1)
            if time.monotonic() >= deadline:
                for process in running:
                    process.kill()
                    process.join()
                assert kill_after is not None or -signal.SIGKILL in codes(processes), "the ranks hang"
        return codes(processes)


def codes(processes: list[ForkServerProcess]) -> list[int]:
    """Return the exit codes of processes that have ended."""
    return [process.exitcode for process in processes if process.exitcode is not None]


def _nothing() -> None: ...


def _command(arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    from rookery.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT, 0o666), descriptor)
    sys.argv = ["rookery", *arguments]
    code = main()
    atexit._run_exitfuncs()  # which a forked process leaves out
    sys.exit(code)


def _train(workdir: Path, arguments: tuple[str, ...], rank: int, ranks: int, port: int, fault: Fault | None) -> None:
    from rookery.cli import main

    os.chdir(workdir)
    log = os.open(f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        ROOKERY_CONTROL="torch",
        TORCHELASTIC_USE_AGENT_STORE="True",
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.argv = ["rookery", "train", *arguments]
    if fault is not None:
        fault.arm()
    sys.exit(main())
