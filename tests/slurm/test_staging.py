"""Files that a job brings to its nodes, with the real sbcast and srun."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.job_variables import STAGED_KERNELS
from slurm.request import JobRequest
from slurm.site import NodeLocal, Site
from slurm.staging import StagingError, remove_staged, stage
from tests.slurm.cluster import Cluster

NODES = ["n1", "n2"]


@pytest.fixture(scope="module")
def job(running_cluster: Cluster) -> Iterator[str]:
    """A job that holds two nodes."""
    command = ["salloc", "--no-shell", "--nodes=2", "--ntasks-per-node=1"]
    said = subprocess.run(command, env=running_cluster.environment, capture_output=True, text=True, check=True).stderr
    number = said.split("Granted job allocation ")[1].split()[0]
    yield number
    running_cluster.sh("scancel", number)


@pytest.fixture
def node_disk(tmp_path: Path, job: str, running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of every node's own; what runs in this process is in the job."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("PATH", running_cluster.environment["PATH"])
    monkeypatch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("TEST_DISK", str(tmp_path / "nvme"))
    # What the batch script asked for; no step with a task a node could be started with it.
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "9")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "99")
    monkeypatch.setenv("SLURM_TRES_PER_TASK", "cpu=99")
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


@pytest.fixture
def method(running_cluster: Cluster) -> str:
    return "sbcast" if running_cluster.can_broadcast else "copy"


def site(method: str, python: str | None = None) -> Site:
    return Site(
        name="test", title="", accelerator="cpu", ranks_per_node=1, cores_per_node=2, cores_per_rank=1, python=python,
        stage_method=method, node_local=NodeLocal(path="$TEST_DISK", notes=""),
    )  # fmt: skip


def request(*files: Path) -> JobRequest:
    return JobRequest(
        name="test", run_dir="/nowhere", site="test", nodes=2, spares=0, ranks_per_node=1, minutes=1, links=1,
        chain="requeue", partition=None, qos=None, account=None, reservation=None, signal_seconds=1, digest="",
        stage=[str(file) for file in files], eval_every=None, eval_depths="", eval_minutes=1, sbatch={}, command=[],
    )  # fmt: skip


def packed_environment(folder: Path) -> Path:
    """An archive as conda-pack makes it: a python, and conda-unpack, which must be run once."""
    (folder / "env/bin").mkdir(parents=True)
    (folder / "env/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "env/bin/conda-unpack").write_text("open(__file__.replace('bin/conda-unpack', 'unpacked'), 'w')\n")
    for program in (folder / "env/bin").iterdir():
        program.chmod(0o755)
    with tarfile.open(folder / "env.tar.gz", "w:gz") as archive:
        archive.add(folder / "env", "")
    return folder / "env.tar.gz"


def test_files_arrive_and_are_put_to_their_use(tmp_path: Path, node_disk: Path, job: str, method: str) -> None:
    environment, plugin, image = packed_environment(tmp_path), tmp_path / "librccl-net.so.0", tmp_path / "torch.sif"
    plugin.write_bytes(os.urandom(100_000))
    image.write_bytes(b"image")
    with tarfile.open(tmp_path / "torch-2.tar", "w") as kernels:
        kernels.add(plugin, "inductor/a.so")
    wanted = request(environment, plugin, tmp_path / "torch-2.tar")
    staged = stage(site(method), wanted, NODES, job)
    folder = node_disk / f"rookery-{job}"
    assert (folder / "librccl-net.so.0").read_bytes() == plugin.read_bytes()
    assert (folder / "env/unpacked").exists()
    assert staged.python == str(folder / "env/bin/python")
    assert subprocess.run([staged.python, "-c", "print(1)"], capture_output=True, check=True).stdout == b"1\n"
    assert staged.environment == {
        "NCCL_NET_PLUGIN": str(folder / "librccl-net.so.0"),
        STAGED_KERNELS: str(folder),
    }
    assert (folder / "torch-2.tar").read_bytes() == (tmp_path / "torch-2.tar").read_bytes()
    assert staged.what == ["env.tar.gz", "librccl-net.so.0", "torch-2.tar"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # what runs from here must not be another user's

    (folder / "librccl-net.so.0").unlink()
    again = stage(site(method), wanted, NODES[:1], job)  # as when the training starts again in the same job
    assert replace(again, seconds=0) == replace(staged, seconds=0)
    assert not (folder / "librccl-net.so.0").exists(), "nothing is copied twice in a job"
    os.utime(plugin)
    stage(site(method), wanted, NODES, job)
    assert (folder / "librccl-net.so.0").exists(), "a file that changed is copied anew"

    in_image = site(method, python=f"run --bind /x {image} python")
    assert stage(in_image, request(image), NODES, job).python == f"run --bind /x {folder}/torch.sif python"
    remove_staged(site(method), wanted, NODES, job)
    assert list(node_disk.iterdir()) == []


def test_every_way_to_fail_is_told_with_its_reason(
    tmp_path: Path, node_disk: Path, job: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(wanted: JobRequest, by: str = method) -> str:
        with pytest.raises(StagingError) as caught:
            stage(site(by), wanted, NODES, job)
        return str(caught.value)

    file, huge, folder = tmp_path / "file", tmp_path / "huge.tar.gz", node_disk / f"rookery-{job}"
    file.write_bytes(b"x" * 1000)
    assert refused(request(tmp_path / "gone")) == f"{tmp_path}/gone: No such file or directory"
    assert refused(request(file), "none").startswith("site test names no directory of the nodes' own")
    with huge.open("wb") as sparse:
        sparse.truncate(2 * shutil.disk_usage(tmp_path).free)
    said = refused(request(huge))
    assert f"n1: {folder} has room for " in said
    # The archive, and what may be in it.
    assert f", and {-(-5 * huge.stat().st_size // 2**20)} MiB are needed; n2: " in said
    broken = tmp_path / "env.tar.gz"
    broken.write_bytes(b"no archive")
    assert refused(request(broken)).startswith("n1: gzip: stdin: ")
    (folder / "file").mkdir()
    where = f"{folder}/file is not there"
    assert refused(request(file), "copy") == f"n1: {where}; n2: {where}"
    node_disk.rename(tmp_path / "away")
    assert refused(request(file)) == f"n1: there is no directory {node_disk}; n2: there is no directory {node_disk}"
    monkeypatch.delenv("TEST_DISK")
    assert refused(request(file)) == "node_local.path $TEST_DISK: a variable in it is not set in this job"


def test_a_directory_that_is_not_ours_is_not_trusted(tmp_path: Path, node_disk: Path, job: str, method: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    wanted, folder = request(tmp_path / "file"), node_disk / f"rookery-{job}"
    stage(site(method), wanted, NODES, job)
    [marker] = folder.glob(".staged-*")
    marker.write_text(f"new\npython {tmp_path}/theirs\n")
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(
        StagingError, match=r"n1: .* is a link or another user's, and not trusted; remove it, or set node"
    ):
        stage(site(method), wanted, NODES, job)
    folder.unlink()
    if os.geteuid() == 0:
        folder.mkdir()
        os.chown(folder, 1, 1)
        with pytest.raises(StagingError, match="not trusted"):
            stage(site(method), wanted, NODES, job)
        folder.rmdir()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('"{sbcast}" "$@"; printf y | dd of="{target}" bs=1 seek=500 conv=notrunc', "file is damaged: its SHA-256 is"),
        ('"{sbcast}" "$@"; truncate -s 10 "{target}"', "file has 10 bytes instead of 1000"),
        ('"{sbcast}" "$3" /nowhere/file', "file: sbcast failed: sbcast: error: REQUEST_FILE_BCAST(n"),
    ],
)  # fmt: skip
def test_a_broadcast_that_goes_wrong_is_noticed(
    tmp_path: Path, node_disk: Path, job: str, running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch,
    lines: str, reason: str,
) -> None:  # fmt: skip
    if not running_cluster.can_broadcast:
        pytest.skip("sbcast needs munge and root")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    faulty = tmp_path / "bin/sbcast"
    faulty.parent.mkdir()
    target = node_disk / f"rookery-{job}" / "file"
    faulty.write_text("#!/bin/sh\n" + lines.format(sbcast=shutil.which("sbcast"), target=target) + "\n")
    faulty.chmod(0o755)
    monkeypatch.setenv("PATH", f"{faulty.parent}:{os.environ['PATH']}")
    with pytest.raises(StagingError) as caught:
        stage(site("sbcast"), request(tmp_path / "file"), NODES, job)
    assert reason in str(caught.value)
