"""`rookery watch`: a run while it goes on, as a page in a browser or as a screen of the terminal."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]


def watch(
    run: Run,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine's loopback; 0 for a free one.")] = 0,
    tui: Annotated[bool, typer.Option("--tui", help="Show it in the terminal; once, if this is no terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print how it stands as one JSON object, and end.")] = False,
) -> None:
    """Watch a run: a live page for your browser, also through an SSH tunnel, or a screen in the terminal."""
    if as_json:
        from rookery.screen import snapshot

        print(json.dumps(snapshot(run)))
    elif tui:
        from rookery.screen import show

        _until_interrupted()
        show(run)
    else:
        _serve(run, port)


def _serve(run: Path, port: int) -> None:
    from monitoring.watch import WatchServer

    _until_interrupted()
    with WatchServer(run, port) as server:
        print(f"{run}: watch it at\n\n  {server.url}\n", flush=True)
        print(
            f"From another machine, first: ssh -N -L {server.port}:127.0.0.1:{server.port} {socket.gethostname()}\n"
            "The address lets whoever has it look, and nobody write. Ctrl-C ends it.",
            flush=True,
        )
        server.serve_forever()


def _until_interrupted() -> None:
    """Let Ctrl-C, and a terminal that goes away, end this quietly: nothing is lost."""

    def leave(number: int, frame: object) -> None:
        if sys.stdout.isatty() and number == signal.SIGINT:
            print()
        raise SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
