"""What the tests of crash consistency do to the directory of a tiny run, in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch

from data_prep.world import World
from pipeline.checkpoints import transfer
from pipeline.checkpoints.reader import CheckpointReader
from pipeline.checkpoints.saver import CheckpointConfig, Saver
from pipeline.engine import Fragment
from tests.faults.interpose import Action, Fault
from tests.pipeline.saved_checkpoint import draft

SHAPE = [2, 3]
RETENTION = CheckpointConfig(keep_last=2, keep_best=0, keep_healthy=0)


def weight_after(step: int) -> torch.Tensor:
    """Return the weight that a checkpoint of `step` holds."""
    return torch.arange(6, dtype=torch.float32).view(SHAPE) + 100.0 * step


def save(run_dir: Path, step: int) -> str | None:
    """Save a checkpoint as training does, and remove all but the two newest; return what failed."""
    flat = weight_after(step).flatten()
    fragments = [
        Fragment(parameter="w", start=start, weight=flat[start:end], optimizer_state={"exp_avg": -flat[start:end]})
        for start, end in ((0, 4), (4, 6))
    ]
    manifest = draft(step, shapes={"w": SHAPE})
    saver = Saver(RETENTION, World(), run_dir, "run", lambda: fragments, lambda kind, **fields: None)
    with patch.object(transfer, "_SECONDS_BETWEEN_LOOKS", 1e-3):  # nothing but the end of a file of 300 bytes to see
        return saver.save_last(lambda: manifest)


def check_content(reader: CheckpointReader) -> int:
    """Check that a checkpoint holds what was saved at its step; return that."""
    step = reader.manifest.progress.step
    assert torch.equal(reader.weight("w"), weight_after(step))
    assert torch.equal(reader.slice("w", "exp_avg", 0, 6), -weight_after(step).flatten())
    return step


def record(run_dir: Path, step: int, log: Path) -> None:
    """Save, and write down the operations."""
    Fault(pattern=f"{run_dir}?(/*)", action=Action.RECORD, log=log).arm()
    save(run_dir, step)


def kill_everywhere(run_dir: Path, step: int, out: Path) -> None:
    """Save and be killed before and within every operation, each in a copy of the run: `out`/ACTION-NUMBER."""
    for action in (Action.KILL_BEFORE, Action.KILL_WITHIN):
        for number in count(1):
            trial = Path(shutil.copytree(run_dir, out / f"{action.name}-{number}"))
            child = os.fork()
            if child == 0:
                Fault(pattern=f"{trial}?(/*)", action=action, first=number).arm()
                os._exit(0 if save(trial, step) is None else 1)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, -signal.SIGKILL)
            if status == 0:  # all operations were done before it would have struck
                shutil.rmtree(trial)
                break
