"""Run by test_oversight: runs whose probes say from a step on that the state has collapsed, as long as branch 0 lasts.

    python -m tests.pipeline.collapsing CONFIG CASE...

A case is NAME or NAME:HOW; the run directory is NAME, and the exit code is appended to NAME/codes. HOW says what comes
upon the finding: `told` a signal to stop at that step, `killed` SIGKILL right after the rollback is written
down, `precursors` a decision to save more often that is carried out at the step of the finding.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from data_prep.world import World
from monitoring.detectors import Finding
from monitoring.monitor import Monitor
from monitoring.policy import Decision
from pipeline.config import load_config
from pipeline.control import StopSignals
from pipeline.train import train
from pipeline.training import Training

COLLAPSES = 10
FOUND = 11  # a collapse has to show twice
SETTINGS = [
    "monitor={probe_every: 1, depth_gain_every: 1000}",
    "monitor.detectors.collapse.warm_up=0",
    "monitor.detectors.collapse.horizon=2",
    "monitor.policy.rewarm_steps=3",
    "monitor.policy.skip_steps=1",
    "train.steps=20",
    "checkpoint.every=4",
]


def run(config: str, name: str, how: str) -> None:
    """Train one case."""
    signals = StopSignals()
    conclude, event, after_step = Training._conclude, Training._event, Monitor.after_step

    def collapsed(self: Training, record: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if record["step"] >= COLLAPSES and record["branch"] == 0:
            record |= {"token_correlation": 0.98, "effective_rank": 1.1}
        conclude(self, record, *args, **kwargs)
        if how == "told" and record["step"] == FOUND - 1:
            signals.received = "SIGTERM"

    def noted(self: Training, kind: str, **fields: Any) -> None:
        event(self, kind, **fields)
        if how == "killed" and kind == "rollback":
            os.kill(os.getpid(), signal.SIGKILL)

    def decided(self: Monitor, record: dict[str, Any]) -> list[Decision]:
        found = after_step(self, record)
        if how == "precursors" and record["step"] == FOUND - 1 and record["branch"] == 0:
            sign = Finding(
                detector="dead_core", step=FOUND - 1, since=FOUND - 1, value=0.0, threshold=0.0, horizon=0, rule="sign"
            )
            found.append(
                Decision(action="shorten", finding=sign, acted=True, reason="a sign", factor=2, until=FOUND + 5)
            )
        return found

    with (
        patch.object(Training, "_conclude", collapsed),
        patch.object(Training, "_event", noted),
        patch.object(Monitor, "after_step", decided),
    ):
        code, reason = train(load_config(config, [f"run_dir={name}", *SETTINGS]), World(), signals=signals)
    with (Path(name) / "codes").open("a") as file:
        file.write(f"{int(code)} {reason}\n")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        run(sys.argv[1], *(case.partition(":")[::2]))
