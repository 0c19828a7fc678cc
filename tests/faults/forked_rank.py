"""A rank of a real launcher that need not import anything: the launcher starts this file, which has a rank forked.

    mpiexec -n 2 python -S -E tests/faults/forked_rank.py SOCKET -m rookery train test.yaml

takes as long as the training itself. The rank is a child of the fork server, with this process's standard streams,
environment, directory and connection to the launcher; this process hands on signals and ends as the rank ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

_NUMBER = struct.Struct("i")
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_LAUNCHER = "PMI_FD"


def main(path: str, arguments: list[str]) -> NoReturn:
    """Have a rank forked that runs python with `arguments`; end as it ends."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    request = json.dumps([arguments, str(Path.cwd()), dict(os.environ)]).encode()
    descriptors = [0, 1, 2, *([int(os.environ[_LAUNCHER])] if _LAUNCHER in os.environ else [])]
    socket.send_fds(server, [_NUMBER.pack(len(request))], descriptors)
    server.sendall(request)
    for descriptor in descriptors[3:]:
        os.close(descriptor)
    rank = _NUMBER.unpack(server.recv(_NUMBER.size, socket.MSG_WAITALL))[0]
    for number in _HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(rank, number))
    status = _NUMBER.unpack(server.recv(_NUMBER.size, socket.MSG_WAITALL))[0]
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        for number in _HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(path: str) -> None:
    """Fork a rank for every process that connects to the socket `path`, until this process is killed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _watch(connection)
        connection.close()


def _watch(connection: socket.socket) -> NoReturn:
    """Fork the rank, tell how it ended, and kill it if the launcher kills the process that stands for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, descriptors, _, _ = socket.recv_fds(connection, _NUMBER.size, 8)
    (size,) = _NUMBER.unpack(head)
    request = json.loads(connection.recv(size, socket.MSG_WAITALL))
    rank = os.fork()
    if rank == 0:
        connection.close()
        arguments, directory, environment = request
        _become_rank(arguments, directory, environment, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(_NUMBER.pack(rank))
    ended = os.pidfd_open(rank)
    if ended not in select.select([connection.fileno(), ended], [], [])[0]:
        os.kill(rank, signal.SIGKILL)
    _, status = os.waitpid(rank, 0)
    try:
        connection.sendall(_NUMBER.pack(status))
    finally:
        os._exit(0)


def _become_rank(arguments: list[str], directory: str, environment: dict[str, str], descriptors: list[int]) -> NoReturn:
    import atexit
    import ctypes
    import threading

    import torch

    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if descriptors[3:]:
        os.environ[_LAUNCHER] = str(descriptors[3])
    os.chdir(directory)
    sys.stdin = os.fdopen(0, closefd=False)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    code = _python(arguments)
    # What an interpreter does at its end and a forked process leaves out; one of the last functions of the C library is
    # MPI's, which tells the launcher that all is well.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(code)
    raise AssertionError


def _python(arguments: list[str]) -> int:
    """Do what python does with `-m MODULE ...`; return the exit code."""
    import runpy

    option, module, *sys.argv[1:] = arguments
    assert option == "-m"
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code: Any = end.code
        if code is None or isinstance(code, int):
            return code or 0
        sys.stderr.write(f"{code}\n")
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
