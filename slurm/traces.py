"""What the launches of a run left in its directory, by which a link understands how they ended, and when."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from monitoring.runlog import Record, attempts, read_outcome
from pipeline.checkpoints.manifest import list_checkpoints
from slurm import chain
from slurm.chain import Verdict
from slurm.joblog import say

REFUSAL = "refusal.json"
"""In the directory of a launch: why its ranks began no attempt."""

_SECONDS_BEFORE_RETRIES = (1.0, 5.0, 20.0)


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return step -> directory of the complete checkpoints; a file system that stumbles is asked again.

    Raises:
        OSError: it goes on stumbling.
    """
    for seconds in _SECONDS_BEFORE_RETRIES:
        try:
            return {int(path.name.rpartition("-")[2]): path for path in list_checkpoints(run_dir)}
        except OSError as error:
            say(f"{run_dir}: {error}; looks again")
            time.sleep(seconds)
    return {int(path.name.rpartition("-")[2]): path for path in list_checkpoints(run_dir)}


def attempt_of(run_dir: Path, launched: Record) -> int | None:
    """Return the number of the attempt of a launch, None if it began none."""
    return next((number for number in attempts(run_dir) if number > launched["attempts"]), None)


def verdict(run_dir: Path, launched: Record, status: int | None) -> Verdict:
    """Return how a launch ended.

    Args:
        run_dir: of the run.
        launched: the record of the launch, or what it would say.
        status: exit status of its launcher, None if nobody waited for it.
    """
    attempt = attempt_of(run_dir, launched)
    outcome = None if attempt is None else read_outcome(run_dir, attempt)
    try:
        refusal = json.loads((run_dir / launched["log"] / REFUSAL).read_bytes())
    except (OSError, ValueError):
        refusal = None
    refusal = refusal if isinstance(refusal, dict) else None
    return chain.judge(status, outcome, refusal, began=attempt is not None)


def last_sign(run_dir: Path, launched: Record) -> float:
    """Return the time (unix seconds) at which the ranks of a launch last wrote something, at least its beginning."""
    folders, times = [run_dir / launched["log"]], [float(launched["time"])]
    attempt = attempt_of(run_dir, launched)
    if attempt is not None:
        folders += [run_dir / "attempts" / f"{attempt:04d}", run_dir / "metrics" / f"{attempt:04d}.jsonl"]
    for path in [inner for folder in folders for inner in (folder, *folder.glob("*"))]:
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return min(max(times), time.time())
