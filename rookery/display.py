"""What the commands draw on a terminal, and the plain lines that they print into a log file instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def training_display(name: str, total_steps: int, *, shown: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that takes step records: a bar on a terminal, a line every ten seconds elsewhere."""
    console = Console()
    if not shown:
        yield lambda record: None
    elif console.is_terminal:
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=total_steps, figures="")
            yield lambda record: progress.update(task, completed=record["step"], figures=figures(record))
    else:
        yield _LinePrinter(total_steps)


class _LinePrinter:
    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._due = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if now >= self._due or record["step"] == self._total:
            self._due = now + _SECONDS_BETWEEN_LINES
            print(f"step {record['step']}/{self._total}  {figures(record)}", flush=True)


def figures(record: dict[str, Any]) -> str:
    """Return the figures of a step record in one short line."""
    n, k = record["num_steps"]
    return (
        f"loss {record['loss']:.4f}  grad {record['grad_norm']:.2f}  lr {record['lr']:.1e}  r {n}+{k}"
        f"  {record['tokens_per_second']:,.0f} tok/s"
    )


def evaluation_table(result: dict[str, Any]) -> None:
    """Print loss against depth."""
    table = Table(title=f"{result['checkpoint']} on {result['tokens']:,} tokens")
    table.add_column("depth", justify="right")
    table.add_column("loss (nats/token)", justify="right")
    table.add_column("relative residual", justify="right")
    for depth, loss in result["loss"].items():
        table.add_row(depth, f"{loss:.4f}", f"{result['relative_residual'][int(depth) - 1]:.2e}")
    Console().print(table)
