"""The batch script of every shipped site, line by line, for one fixed request; and that SLURM takes each of them.

After a wanted change: ROOKERY_WRITE_GOLDEN=1 pytest tests/slurm/test_golden_scripts.py, and read the difference.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from slurm.limits import allot
from slurm.request import JobRequest
from slurm.site import SITES, Site, load_site
from slurm.steps import shown_step
from slurm.submission import batch_script

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm"
NAMES = sorted(path.stem for path in SITES.glob("*.yaml"))
CLUSTER = [name for name in NAMES if name != "local"]


@pytest.fixture(autouse=True)
def only_shipped_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def fixed_request(site: Site) -> JobRequest:
    """Three links on four nodes and a spare one; this machine where there is no queue."""
    nodes, spares, links = (1, 0, 1) if site.scheduler == "local" else (4, 1, 3)
    minutes = None if any(queue.hours for queue in site.queues) else 120
    allotment = allot(site, nodes + spares, minutes, None, None)
    return JobRequest(
        name="huginn-1b",
        run_dir="/RUN",
        site=site.name,
        nodes=nodes,
        spares=spares,
        ranks_per_node=site.ranks_per_node,
        minutes=allotment.minutes,
        links=links,
        chain=site.chain,
        partition=allotment.partition,
        qos=allotment.qos,
        account=f"ACCOUNT{site.account_suffix or ''}" if site.account_required else None,
        reservation=None,
        signal_seconds=site.signal_seconds,
        digest="DIGEST",
        stage=[],
        eval_every=None,
        eval_depths="1,8",
        eval_minutes=60,
        sbatch={},
        command=["-m", "rookery", "train", "/RUN/run.yaml"],
    )


def rendered(name: str) -> str:
    site = load_site(name)
    request = fixed_request(site)
    script = batch_script(site, request, exclude=["BAD2", "BAD1"])
    text = f"{script}\n# the ranks, in the job\n{shown_step(site, request)}\n"
    return text.replace(sys.executable, "PYTHON")


@pytest.mark.parametrize("name", NAMES)
def test_the_script_of_a_site_is_the_golden_one(name: str) -> None:
    golden, text = GOLDEN / f"{name}.sh", rendered(name)
    if os.environ.get("ROOKERY_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_golden_script_belongs_to_a_site() -> None:
    assert sorted(path.stem for path in GOLDEN.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_shell_can_read_the_script(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=rendered(name), capture_output=True, text=True, check=False)
    assert checked.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_says_why_and_where_from(name: str) -> None:
    lines = [line for line in rendered(name).splitlines() if line]
    fixed = load_site(name).after_modules
    own = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "SUBMITIT_EXECUTOR", "https_proxy", "no_proxy")
    for before, line in pairwise(lines):
        found = re.match(r"export ([A-Za-z_0-9]+)=", line)
        if found and found[1] not in own and name != "local" and line not in fixed:
            assert before.startswith("# "), line


def test_slurm_takes_the_scripts(slurm: dict[str, str], tmp_path: Path) -> None:
    """All lines but the names of partitions, the features, the memory and the cores, which our nodes lack."""
    told = {}
    for name in CLUSTER:
        text = rendered(name).replace("/RUN", str(tmp_path)).replace("PYTHON", sys.executable)
        text = re.sub(r"#SBATCH --(partition|constraint|mem|reservation|nodes|gres|exclude)=.*\n", "", text)
        text = re.sub(r"#SBATCH --time=.*", "#SBATCH --time=10", text)
        script = tmp_path / f"{name}.sh"
        script.write_text(text)
        done = subprocess.run(
            ["sbatch", "--test-only", "--nodes=2", "--cpus-per-task=1", str(script)],
            env=slurm,
            capture_output=True,
            text=True,
            check=False,
        )
        told[name] = (done.returncode, done.stderr if done.returncode else "")
    assert told == dict.fromkeys(CLUSTER, (0, ""))
