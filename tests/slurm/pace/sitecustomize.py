"""Slows steps down where TEST_SECONDS_PER_STEP says so: a run outlasts its time limit and leaves others the cores."""

import os
import time

seconds = float(os.environ.get("TEST_SECONDS_PER_STEP", "0"))
if seconds:
    from monitoring.runlog import Record, RunLog

    write = RunLog.step

    def step(self: RunLog, record: Record) -> None:
        time.sleep(seconds)
        write(self, record)

    RunLog.step = step  # type: ignore[method-assign]
