"""How much time SLURM leaves to a job; imports nothing but the standard library."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

_SQUEUE_SECONDS = 20


def seconds_left(environment: Mapping[str, str]) -> float | None:
    """Return how many seconds SLURM leaves to this job, None outside a job, without a limit or if nobody can say."""
    with suppress(KeyError, ValueError):
        return float(environment["SLURM_JOB_END_TIME"]) - time.time()
    job, squeue = environment.get("SLURM_JOB_ID"), shutil.which("squeue")
    if job is None or squeue is None:
        return None
    try:
        asked = subprocess.run(
            [squeue, "-h", "-j", job, "-o", "%L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SQUEUE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_time_left(asked.stdout.strip())


def parse_time_left(text: str) -> float | None:
    """Return the seconds that squeue's %L, [days-][hours:]minutes:seconds, stands for; None for words."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
