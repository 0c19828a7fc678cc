"""Stands in for the ranks of a training: does in each attempt what it is told to, in milliseconds.

    trivial_ranks.py RUN_DIR ACTION ACTION ...     one action an attempt; the last one counts for all that follow

Actions, with what rank 0 leaves: `finish` (outcome 0), `save` (a checkpoint, outcome 10), `stop` (outcome 10 without a
checkpoint), `diverge` (11), `bad=NODE` (13), `wait` (until a signal comes, then as `save`), `crash` (an attempt without
an outcome, status 1), `refuse` (no attempt, status 12 and the file that the job asked for), `done` (likewise with 0, as
of a run that was finished before), `vanish` (no attempt, status 0 and no file),
`mute` (no attempt, and no signal but SIGKILL ends it),
`disagree` (outcome 10 and status 1), `hold` (an attempt that lasts until it is killed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(run_dir: Path, actions: list[str]) -> int:
    """Act; return the exit status."""
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: told.append(number))
    # Every attempt has begun with one action, so that a new process knows where it stands.
    attempt = 1 + len(list((run_dir / "attempts").glob("*")))
    action, _, argument = actions[min(attempt, len(actions)) - 1].partition("=")
    if int(os.environ.get("SLURM_PROCID", "0")):
        while action in ("wait", "hold") and not told:
            time.sleep(0.02)
        return 0
    if action == "vanish":
        return 0
    while action == "mute":
        time.sleep(0.02)
    if action in ("refuse", "done"):
        code, reason = (12, "train.steps: no") if action == "refuse" else (0, "finished before")
        Path(os.environ["ROOKERY_REFUSAL"]).write_text(json.dumps({"code": code, "reason": reason}))
        return code
    folder = run_dir / "attempts" / f"{attempt:04d}"
    folder.mkdir(parents=True)
    while action == "hold" or (action == "wait" and not told):
        time.sleep(0.02)
    if action in ("save", "wait"):
        (run_dir / "checkpoints" / f"step-{10 * attempt:08d}").mkdir(parents=True)
    if action == "crash":
        sys.stderr.write("this is a crash\n")
    codes = {"finish": 0, "save": 10, "wait": 10, "stop": 10, "disagree": 10, "diverge": 11, "bad": 13}
    if action in codes:
        outcome = {"exit_code": codes[action], "reason": action, "hosts": [argument] if argument else []}
        (folder / "outcome.json").write_text(json.dumps(outcome))
    return 1 if action == "disagree" else codes.get(action, 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
