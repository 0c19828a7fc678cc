"""Which nodes a check of their devices leaves, and when it is the check that is to blame."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest

from slurm.attended import Attendant
from slurm.site import load_site
from slurm.spares import CheckError, check_nodes, problems
from tests.slurm.submitted_run import request

GOOD = {"problem": None, "unhealthy": False}
BAD = {"problem": "n2: a matrix product is wrong", "unhealthy": True}
BROKEN = {"problem": "no module named torch", "unhealthy": False}


def test_nodes_that_fail_or_say_nothing_are_bad() -> None:
    assert problems({"n1": GOOD, "n2": BAD, "n3": None, "n4": BROKEN}, needed=2) == {
        "n2": "n2: a matrix product is wrong",
        "n3": "no answer from the check of its devices",
    }


def test_a_check_that_too_many_do_not_answer_blames_nobody() -> None:
    with pytest.raises(CheckError, match="2 of 3 nodes gave no answer, the first of them n1"):
        problems({"n1": None, "n2": GOOD, "n3": None}, needed=2)


def test_a_fault_that_all_nodes_have_blames_nobody() -> None:
    with pytest.raises(CheckError, match="all 3 nodes fail, n2 with: n2: a matrix product is wrong"):
        problems({"n1": None, "n2": BAD, "n3": BAD}, needed=2)
    assert list(problems({"n2": BAD}, needed=1)) == ["n2"], "there is nothing to compare it with"


def test_bad_nodes_are_named_even_if_too_few_are_left() -> None:
    assert list(problems({"n1": BAD, "n2": BAD, "n3": GOOD}, needed=2)) == ["n1", "n2"]


def test_nodes_are_asked_and_heard(tmp_path: Path) -> None:
    host = socket.gethostname()
    python = tmp_path / "python"  # in place of one that would import PyTorch
    python.write_text(f'#!/bin/sh\necho \'{json.dumps(BAD)}\' >"$3/$(hostname).json"; echo "$@"\n')
    python.chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    asked = request(spares=1, ranks_per_node=4)
    run = Attendant(signal.SIGTERM).run
    assert check_nodes(load_site("local"), asked, [host], str(python), folder, run) == {host: BAD["problem"]}
    assert (folder / "check.log").read_text() == f"-m slurm.spares {folder} 4\n"
