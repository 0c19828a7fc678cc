"""What the commands draw on a terminal, and the plain lines that they print into a log file instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
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
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
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
    used = "" if record.get("mfu") is None else f"  MFU {record['mfu']:.1%}  HFU {record['hfu']:.1%}"
    return (
        f"loss {record['loss']:.4f}  grad {record['grad_norm']:.2f}  lr {record['lr']:.1e}  r {n}+{k}"
        f"  {record['tokens_per_second']:,.0f} tok/s{used}"
    )


def evaluation_table(result: dict[str, Any]) -> None:
    """Print loss against depth."""
    table = Table()
    table.add_column("depth", justify="right")
    table.add_column("loss (nats/token)", justify="right")
    table.add_column("relative residual", justify="right")
    for depth, loss in result["loss"].items():
        table.add_row(depth, f"{loss:.4f}", f"{result['relative_residual'][int(depth) - 1]:.2e}")
    # Not as the table's title, which would be broken at its width, in the middle of a path.
    print(f"{result['checkpoint']} on {result['evaluated_tokens']:,} tokens")
    Console().print(table)


class StageDisplay:
    """Shows the stages of a chain: a live bar a stage on a terminal, a line a stage and every few seconds elsewhere.

    Attributes:
        finished: (name, seconds, figure) of every finished stage.
    """

    def __init__(self, total: int) -> None:
        self.finished: list[tuple[str, float, str]] = []
        self._total = total
        self._name = ""
        self._console = Console()
        columns = (
            TextColumn("[bold]{task.description:<16}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figure]}"),
        )
        self._progress = Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._due = 0.0

    def __enter__(self) -> StageDisplay:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(self, name: str) -> None:
        """Begin a stage."""
        self._name = f"{len(self.finished) + 1}/{self._total} {name}"
        if self._progress is not None:
            self._task = self._progress.add_task(self._name, total=None, figure="")
        self._due = time.monotonic() + _SECONDS_BETWEEN_LINES

    def update(self, figure: str, share: float) -> None:
        """Show how far the stage is: a figure and the share done in [0, 1]."""
        if self._progress is not None:
            self._progress.update(self._task, total=1.0, completed=share, figure=figure)
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f"{self._name}: {figure}", flush=True)

    def finish(self, figure: str, seconds: float) -> None:
        """End the stage with its figure."""
        self.finished.append((self._name, seconds, figure))
        if self._progress is not None:
            self._progress.update(self._task, total=1.0, completed=1.0, figure=figure)
            self._progress.stop_task(self._task)
        else:
            print(f"{self._name}: {seconds:.1f} s, {figure}", flush=True)


def summary_table(stages: list[tuple[str, float, str]], summary: dict[str, Any], run_dir: Path) -> None:
    """Print the stages of a smoke run and how it ended."""
    console = Console()
    table = Table()
    columns: tuple[tuple[str, Literal["left", "right"]], ...] = (
        ("stage", "left"),
        ("seconds", "right"),
        ("figure", "left"),
    )
    for column, justify in columns:
        table.add_column(column, justify=justify)
    for name, seconds, figure in stages:
        table.add_row(name, f"{seconds:.1f}", figure)
    table.add_section()
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    table.add_row("total", f"{summary['seconds']:.1f}", memory)
    console.print(table)
    for problem in summary["problems"]:
        console.print(f"[red]failed:[/red] {problem}", highlight=False)
    verdict = "[green]ok[/green]" if summary["ok"] else "[red]not ok[/red]"
    console.print(f"{verdict}: {run_dir}/summary.json, {run_dir}/report.html", highlight=False, soft_wrap=True)
