"""An exception on one rank ends all ranks soon, and all say what that rank said."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

from monitoring.runlog import read_outcome
from slurm.local import rank_command, rank_environment
from tests.pipeline.failing_phases import BROKEN, PHASES
from tests.ranks import forked_python

ROOT = Path(__file__).parents[2]
RANKS = 4
SECONDS = 15.0


def test_an_exception_on_one_rank_ends_all_ranks_with_its_message(workdir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    environment = {
        **rank_environment(RANKS),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        rank_command(RANKS, [*forked_python(), "-m", "tests.pipeline.failing_phases", "test.yaml", str(out)]),
        cwd=workdir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    ended = time.time()
    run, place = workdir / "run", f"rank {BROKEN} on {socket.gethostname()}"
    *together, alone = PHASES
    for phase in together:
        broke = (out / f"{phase}-broke").stat().st_mtime
        for rank in range(RANKS):
            said = out / f"{phase}-{rank}"
            assert said.is_file(), done.stderr
            assert said.stat().st_mtime - broke < SECONDS
            assert f"{phase} broke on purpose" in said.read_text()
            assert rank == BROKEN or f"({place}, " in said.read_text()
    # Bad input leaves nothing; then: data, save, four good steps, load, eval, forward.
    reasons = [str((read_outcome(run, number) or {}).get("reason")) for number in range(1, 7)]
    for phase, reason in zip(["data", "save", "", "load", "eval", "forward"], reasons, strict=True):
        assert not phase or (f"{phase} broke on purpose" in reason and place in reason), reason
    assert done.returncode not in (0, 10, 11, 12, 13), done.stderr
    assert ended - (out / f"{alone}-broke").stat().st_mtime < SECONDS
    assert f"{alone} broke on purpose" in done.stderr
    assert f"{place}, {alone} of step " in reasons[-1]
    report = json.loads((run / f"attempts/0006/failure-{BROKEN:05d}.json").read_text())
    assert (report["rank"], report["phase"]) == (BROKEN, alone)
    assert not list((run / "attempts/0006").glob("failure-0000[!2].json"))
