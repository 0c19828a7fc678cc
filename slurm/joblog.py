"""What becomes of a run's jobs: `jobs.jsonl`, which submission, cancelling and every link of the chain append to."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitoring.append_log import AppendLog
from monitoring.runlog import JsonlFollower, Record

FILE = "jobs.jsonl"


def append(run_dir: Path, kind: str, **fields: Any) -> bool:
    """Append a record with the time (unix seconds), and bring it to the disk.

    Returns:
        Whether it is there. A disk that is full ends no job: the reason goes to stderr.
    """
    return append_line(run_dir / FILE, {"time": time.time(), "kind": kind} | fields)


def append_line(path: Path, record: Record) -> bool:
    """Append a record to a file of JSON lines; return whether that worked, or else say on stderr why not."""
    try:
        log = AppendLog(path)
    except OSError as error:
        problem: str | None = f"{path}: {error.strerror or error}"
    else:
        log.add(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        log.close()
        problem = log.problem
    if problem is not None:
        say(f"cannot write down {json.dumps(record)}: {problem}")
    return problem is None


def say(text: str) -> None:
    """Write a line into the output of the job that this process runs in."""
    sys.stderr.write(f"rookery: {text}\n")
    sys.stderr.flush()


def read(run_dir: Path) -> list[Record]:
    """Return all records in the order written; none if the run was never submitted."""
    return JsonlFollower(run_dir / FILE, "kind", str).poll()


def current_chain(records: Sequence[Record]) -> list[Record]:
    """Return the records from the newest submission by a person on: what came before is another chain's."""
    starts = [place for place, record in enumerate(records) if _opens(record)]
    return list(records[starts[-1] :] if starts else records)


def _opens(record: Record) -> bool:
    return record["kind"] == "submitted" and record.get("first_link", 1) == 1 and not record.get("continues", False)
