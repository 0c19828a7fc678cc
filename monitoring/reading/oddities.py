"""Signs that a run's log was not written by one job after the other, or is not whole, as the records go by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from monitoring.runlog import Record

_CLOCK_SECONDS = 1.0
_NAMED = 10


class Oddities:
    """Looks at the step records of a run in the order in which they were written.

    Attributes:
        damaged: number of lines that are no step record.
    """

    def __init__(self) -> None:
        self.damaged = 0
        self._place: tuple[int, int, int] | None = None
        self._time = -math.inf
        self._back = 0
        self._attempts: set[int] = set()
        self._jump, self._jumped = _CLOCK_SECONDS, 0

    def take(self, attempt: int, record: Record, time: float | None) -> None:
        """Look at the next record, logged at `time` (unix seconds) if that is known."""
        step, branch = record["step"], record.get("branch", 0)
        branch = branch if isinstance(branch, int) else 0
        if self._place is not None:
            before = self._place
            if step <= before[1] and attempt == before[0] and branch <= before[2]:
                self._back += 1
                self._attempts.add(attempt)
        self._place = (attempt, step, branch)
        if time is not None:
            if self._time - time > self._jump:
                self._jump, self._jumped = self._time - time, step
            self._time = time

    def warnings(self) -> list[str]:
        """Return what is odd, in words."""
        said = []
        if self._back:
            who = ", ".join(map(str, sorted(self._attempts)[:_NAMED]))
            said.append(
                f"steps go back {self._back:,} times within attempt {who} without a rollback:"
                " did two jobs write to this run at once?"
            )
        if self._jump > _CLOCK_SECONDS:
            said.append(f"the clock was set back by {self._jump:,.0f} s at step {self._jumped:,}")
        return said


def unreadable(run_dir: Path, problems: Iterable[tuple[Path, str | None]]) -> list[str]:
    """Return which files could not be read, in words, of pairs of a file and why it could not be, None if it could."""
    bad = [(path, problem) for path, problem in problems if problem is not None]
    said = [f"{path.relative_to(run_dir)} cannot be read: {problem}" for path, problem in bad[:_NAMED]]
    return said + ([f"{len(bad) - _NAMED} more files of the log cannot be read"] if len(bad) > _NAMED else [])


def missing(run_dir: Path, numbers: list[int], *, stepped: bool) -> list[str]:
    """Return which parts of a run's log are not there, in words.

    Args:
        run_dir: the run directory.
        numbers: of its attempts.
        stepped: whether any step was logged.
    """
    said = []
    if gone := sorted(set(range(1, numbers[-1] + 1 if numbers else 1)).difference(numbers)):
        said.append(f"attempt{'s' * (len(gone) > 1)} {_list(gone)} left no trace: somebody removed files of this run")
    # The file is made together with the attempt's directory, before its first sign of life.
    lost = [number for number in numbers if not (run_dir / "metrics" / f"{number:04d}.jsonl").exists()]
    if lost := [number for number in lost if _lived(run_dir / "attempts" / f"{number:04d}")]:
        files = "metrics/NNNN.jsonl" if len(lost) > 1 else f"metrics/{lost[0]:04d}.jsonl"
        said.append(f"the steps of attempt{'s' * (len(lost) > 1)} {_list(lost)} are missing: there is no {files}")
    if stepped and not (run_dir / "events.jsonl").exists():
        said.append("events.jsonl is missing: no incidents are known, and goodput lacks what came before first steps")
    return said


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_NAMED])) + (", ..." if len(numbers) > _NAMED else "")


def _lived(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("heartbeat.json", "outcome.json"))
