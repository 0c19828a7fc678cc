"""What writes RUN/wandb: a process that reads records from its input, so that wandb's threads and exits stay in it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from monitoring.runlog import write_atomic

_NOTE_SECONDS = 10.0


def main(run_dir: str) -> None:
    """Log what comes as JSON lines: first {name, settings}, then {step, branch, values}; ends with the input."""
    # A job's signals reach all of its processes; rank 0 decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    first = json.loads(sys.stdin.readline())
    runs = WandbRuns(Path(run_dir), first["name"], first["settings"])
    for line in sys.stdin:
        runs.log(**json.loads(line))
    runs.close()


class WandbRuns:
    """Runs for `wandb sync`, one a branch, in one group: a wandb run cannot go back.

    A restart goes on with the branch's wandb run and leaves out the steps that this has; they are the same numbers,
    computed again.
    """

    def __init__(self, run_dir: Path, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb, self._directory, self._name, self._settings = wandb, run_dir, name, dict(settings)
        self._group = _identity(run_dir)
        self._known = run_dir / "wandb" / "last-steps.json"
        self._steps: dict[str, int] = {}
        with suppress(OSError, ValueError):
            self._steps = {str(key): int(step) for key, step in json.loads(self._known.read_bytes()).items()}
        self._run: Any = None
        self._id = ""
        self._noted = time.monotonic()

    def log(self, step: int, branch: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step, unless the branch's wandb run has it."""
        id_ = f"{self._group}-b{branch}"
        if id_ != self._id:
            self._begin(id_, branch)
        if step <= self._steps.get(id_, -1):
            return
        self._run.log(dict(values), step=step)
        self._steps[id_] = step
        if time.monotonic() - self._noted >= _NOTE_SECONDS:
            self._note()

    def close(self) -> None:
        """End the wandb run that is open."""
        if self._run is not None:
            self._run.finish()
            self._note()

    def _begin(self, id_: str, branch: int) -> None:
        self.close()
        self._id = id_
        self._run = self._wandb.init(
            mode="offline",  # whatever the environment says: compute nodes have no network
            dir=str(self._directory),
            project=os.environ.get("WANDB_PROJECT", "rookery"),
            group=f"{self._name}-{self._group}",
            name=self._name if branch == 0 else f"{self._name} branch {branch}",
            id=id_,
            resume="allow",
            config=self._settings,
            settings=self._wandb.Settings(
                console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True, save_code=False
            ),
        )

    def _note(self) -> None:
        self._noted = time.monotonic()
        write_atomic(self._known, json.dumps(self._steps).encode())


def _identity(run_dir: Path) -> str:
    """Return what a run is called in wandb: another name for a copy of its directory."""
    own = ""
    with suppress(OSError):
        own = (run_dir / "id").read_text(encoding="utf-8", errors="replace").strip()
    return hashlib.sha256(f"{own} {run_dir.resolve()}".encode()).hexdigest()[:16]
