"""What was decided when a run was submitted: `job.json` in the run directory, read by every job of the run."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.runlog import write_atomic

FILE = "job.json"


class RequestError(ValueError):
    """A run directory holds no readable request."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """How the jobs of one run look; the same for all of its links.

    Attributes:
        name: of the jobs in the queue.
        run_dir: the run directory, absolute.
        site: name of the site profile; `site.yaml` beside this holds what it said.
        nodes: that a step of training runs on.
        spares: nodes that are asked for on top.
        ranks_per_node: ranks of a node.
        minutes: time limit of one link.
        links: jobs of the chain.
        chain: how the run goes on after a link: requeue, afterany or array.
        partition: of the queue; None for the site's own.
        qos: quality of service.
        account: that pays.
        reservation: reserved nodes.
        signal_seconds: before the time limit at which the ranks are told to save.
        digest: name of the snapshot of the code below `code/`.
        start_minutes: in which the ranks have to begin an attempt; None for as long as it takes.
        max_restarts: launches in a row that may end without a newer checkpoint before the chain ends itself.
        quarantine_hours: for how long a bad node is avoided.
        stage: files that are copied to the nodes before the ranks start, absolute.
        eval_every: every how many checkpoints an evaluation job is submitted; None for never.
        eval_depths: numbers of iterations of such an evaluation, separated by commas.
        eval_minutes: time limit of such a job.
        sbatch: further options of sbatch, long names without dashes.
        command: what every rank runs, after python.
    """

    name: str
    run_dir: str
    site: str
    nodes: int
    spares: int
    ranks_per_node: int
    minutes: int
    links: int
    chain: str
    partition: str | None
    qos: str | None
    account: str | None
    reservation: str | None
    signal_seconds: int
    digest: str
    start_minutes: float | None = 30.0
    max_restarts: int = 3
    quarantine_hours: float = 72.0
    stage: list[str]
    eval_every: int | None
    eval_depths: str
    eval_minutes: int
    sbatch: dict[str, str]
    command: list[str]

    def write(self, run_dir: Path) -> None:
        """Write it as `job.json` of a run directory, whole or not at all."""
        write_atomic(run_dir / FILE, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, run_dir: Path) -> JobRequest:
        """Read that of a run directory.

        Raises:
            RequestError: there is none, or it is damaged.
        """
        path = run_dir / FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"{run_dir}: has no {FILE}; it was not started by `rookery submit`") from None
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from None
        if not isinstance(record, dict):
            raise _damaged(path, "it is no mapping")
        return cls(**_checked(record, path))


def _checked(record: dict[str, Any], path: Path) -> dict[str, Any]:
    hints = typing.get_type_hints(JobRequest)
    if wrong := sorted(record.keys() ^ hints.keys()):
        raise _damaged(path, f"the keys {', '.join(wrong)} are missing or unknown")
    for key, hint in hints.items():
        value = record[key]
        kinds = tuple(typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,))
        kinds = (typing.get_origin(hint),) if typing.get_origin(hint) in (list, dict) else kinds
        if float in kinds and isinstance(value, int):
            continue
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise _damaged(path, f"{key} is {value!r}")
    return record


def _damaged(path: Path, reason: str) -> RequestError:
    return RequestError(f"{path}: is damaged ({' '.join(reason.split())}); submit the run again")
