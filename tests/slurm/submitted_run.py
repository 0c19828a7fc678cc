"""A run directory as submission leaves it, with ranks that train nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from slurm import joblog
from slurm.request import JobRequest
from slurm.site import Site, site_to_yaml
from slurm.submission import SITE

TRIVIAL_RANKS = Path(__file__).with_name("trivial_ranks.py")


def request(**changes: Any) -> JobRequest:
    """A request of one rank on one node, for one link of an hour."""
    plain = JobRequest(
        name="run",
        run_dir="/nowhere",
        site="local",
        nodes=1,
        spares=0,
        ranks_per_node=1,
        minutes=60,
        links=1,
        chain="afterany",
        partition=None,
        qos=None,
        account=None,
        reservation=None,
        signal_seconds=60,
        digest="code",
        stage=[],
        eval_every=None,
        eval_depths="1,2",
        eval_minutes=10,
        sbatch={},
        command=[],
    )
    return dataclasses.replace(plain, **changes)


def write_run(run_dir: Path, site: Site, actions: list[str], **changes: Any) -> JobRequest:
    """Write what a link reads, for ranks that do `actions` (see trivial_ranks.py), and the record of a submission."""
    (run_dir / "code/code").mkdir(parents=True)
    command = [str(TRIVIAL_RANKS), str(run_dir), *actions]
    asked = request(run_dir=str(run_dir), site=site.name, command=command, **changes)
    asked.write(run_dir)
    (run_dir / SITE).write_text(site_to_yaml(site))
    return asked


def kinds(run_dir: Path) -> list[str]:
    """The kinds of the records of a run's chain."""
    return [record["kind"] for record in joblog.current_chain(joblog.read(run_dir))]


def endings(run_dir: Path) -> list[int | None]:
    """The codes with which the launches of a run's chain ended."""
    return [record["code"] for record in joblog.current_chain(joblog.read(run_dir)) if record["kind"] == "ended"]
