"""A long run's log: read, drawn and written as a report; and what the live page does at every look.

A synthetic run with every field (three attempts, one rollback, probes every ten steps) is read into the run table, by
the reader of whole records, and by orjson alone, which is the floor. Then its panels are computed, as the live page
does at every look, a little is appended and read, and the report is written.
    python -m benchmarks.report --steps 100000 --rounds 5
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from benchmarks.harness import arguments, in_turn, machine, median, publish, ratio
from monitoring.figures import panels
from monitoring.reading.run_reader import RunReader
from monitoring.reading.run_table import RunTable
from monitoring.report import write_report
from monitoring.runlog import read_metrics
from tests.monitoring.sample_run import build_long_run, full_record

_MEMORY = """
import sys
from pathlib import Path
from monitoring.reading.run_table import RunTable

def peak():  # KiB
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak()
table = RunTable(Path(sys.argv[1]))
while table.poll().changed:
    pass
print(peak() - before)
"""


def main() -> None:
    options = arguments(__doc__ or "", rounds=5, steps=100_000)
    with tempfile.TemporaryDirectory(prefix="rk") as folder:
        run_dir, out = build_long_run(Path(folder) / "run", options.steps), Path(folder) / "report.html"
        files = sorted((run_dir / "metrics").glob("*.jsonl"))
        size = sum(path.stat().st_size for path in files)
        follower = RunReader(run_dir)
        while follower.poll().changed:
            pass
        follower.view(now=0.0)

        def parse() -> None:
            for path in files:
                with path.open("rb") as file:
                    for line in file:
                        orjson.loads(line)

        def grow() -> None:
            step = int(follower.table.newest["step"])
            with files[-1].open("ab") as file:
                file.writelines(orjson.dumps(full_record(step + i, options.steps, 1)) + b"\n" for i in range(1, 11))
            follower.poll()

        seconds = in_turn(
            {
                "orjson alone": _timed(parse),
                "run table": _timed(lambda: _read(run_dir)),
                "records (read_metrics)": _timed(lambda: read_metrics(run_dir)),
                "ten more steps": _timed(grow),
                "view and panels": _timed(lambda: panels([follower.view(now=0.0)])),
                "whole report": _timed(lambda: write_report([run_dir], out)),
            },
            options.rounds,
        )
        memory = int(subprocess.check_output([sys.executable, "-c", _MEMORY, str(run_dir)])) / 1024
        report = out.stat().st_size
    table = [
        [name, f"{median(every):.3f}", f"{ratio(every, seconds['orjson alone']):.2f}"]
        for name, every in seconds.items()
    ]
    title = (
        f"{options.steps:,} steps, {size / 1e6:.0f} MB of log, medians of {options.rounds} rounds;"
        f" report {report / 1e6:.2f} MB, memory of the run table {memory:.0f} MiB"
    )
    own = {"log_bytes": size, "report_bytes": report, "table_mib": memory}
    header = ("what", "s", "times orjson alone")
    publish(options.out, title, header, table, {"machine": machine("orjson", "plotly"), "seconds": seconds, **own})


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def _read(run_dir: Path) -> None:
    table = RunTable(run_dir)
    while table.poll().changed:
        pass


if __name__ == "__main__":
    main()
