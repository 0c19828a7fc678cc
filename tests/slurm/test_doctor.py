import json
import sys
from pathlib import Path
from typing import Any

import pytest

from slurm.doctor import examine, torch_build
from slurm.node_trial import try_node
from slurm.site import SiteError
from tests.slurm.cluster import Cluster


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the user's own profiles; the working directory is a new one too."""
    folder = tmp_path / "config/rookery/sites"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return folder


def _checks(name: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in examine(name)["checks"]}


def test_this_machine_is_ready(profiles: Path) -> None:
    answer = examine("local")
    assert answer["ok"], answer
    assert answer["devices"] == []
    assert {check["name"] for check in answer["checks"]} >= {"python", "mpi", "paths", "clock", "space", "compilers"}
    assert json.loads(json.dumps(answer)) == answer


def test_what_fails_says_what_to_do(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    (profiles / "mine.yaml").write_text(
        "extends: local\ntitle: mine\nunverified: [a]\naccelerator: rocm\naccount_required: true\n"
        "modules: [no-such-module/1]\nscratch: $NOT_SET_ANYWHERE/x\n"
    )
    answer = examine("mine")
    found = {check["name"]: check for check in answer["checks"]}
    assert not answer["ok"]
    assert not answer["unhealthy"]
    assert found["profile"]["remedy"] == "read them: rookery sites show mine"
    assert "install a build of torch for rocm" in found["python"]["remedy"]
    assert "module load no-such-module/1" in found["modules"]["found"]
    assert "--account NAME" in found["account"]["found"]
    assert "NOT_SET_ANYWHERE" in found["paths"]["found"]
    failed = {name for name, check in found.items() if check["verdict"] == "fail"}
    assert failed == {"python", "modules", "account", "paths"}


def test_the_network_plugin_is_looked_for_after_the_modules(profiles: Path, tmp_path: Path) -> None:
    text = (
        "extends: local\ntitle: mine\naccelerator: cuda\n"
        f"after_modules: ['export LD_LIBRARY_PATH={tmp_path}/lib:$LD_LIBRARY_PATH']\n"
        "env: {NCCL_NET: {value: OFI, why: w, source: s}}\n"
    )
    (profiles / "mine.yaml").write_text(text)
    assert _checks("mine")["plugin"]["verdict"] == "fail"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libnccl-net-ofi.so").touch()
    assert _checks("mine")["plugin"] == {
        "name": "plugin",
        "verdict": "ok",
        "found": f"{tmp_path}/lib/libnccl-net-ofi.so",
        "remedy": "",
    }


def test_mpi_that_is_on_the_devices_too_is_warned_of(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    text = "extends: local\ntitle: mine\naccelerator: cuda\n"
    (profiles / "mine.yaml").write_text(text)
    assert _checks("mine")["gpu-aware mpi"]["verdict"] == "warn"
    set_off = "env: {MPICH_GPU_SUPPORT_ENABLED: {value: '0', why: w, source: s}}\n"
    (profiles / "mine.yaml").write_text(text + set_off)
    assert _checks("mine")["gpu-aware mpi"]["verdict"] == "ok"


def test_the_queue_must_have_the_partitions_and_the_pmi_of_the_profile(
    cluster: Cluster, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    text = "extends: local\ntitle: mine\nscheduler: slurm\nsrun: [--mpi={mpi}]\nqueues: [{{partition: {partition}}}]\n"
    (profiles / "mine.yaml").write_text(text.format(mpi="pmi2", partition="batch"))
    found = _checks("mine")
    assert [found[name]["verdict"] for name in ("queue", "pmi")] == ["ok", "ok"]
    (profiles / "mine.yaml").write_text(text.format(mpi="pmi9", partition="gpu"))
    found = _checks("mine")
    assert [found[name]["verdict"] for name in ("queue", "pmi")] == ["fail", "fail"]
    assert "no partition gpu; there are batch" in found["queue"]["found"]


def test_an_unknown_site_is_refused(profiles: Path) -> None:
    with pytest.raises(SiteError, match="frontier"):
        examine("frontierr")


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    from torch import version

    assert torch_build() == ("rocm" if version.hip else "cuda" if version.cuda else "cpu")


def test_a_node_is_tried_on_all_its_devices() -> None:
    answer = try_node(2)
    assert (answer["problem"], answer["unhealthy"]) == (None, False)
    assert len(answer["devices"]) == 2
    assert all(device["gemm_flops"] > 0 for device in answer["devices"])
    assert set(answer["devices"][0]["allreduce_gb_per_second"]) == {"1", "4"}


def test_a_trial_that_breaks_blames_no_node_and_one_that_hangs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.node_trial._SECONDS_AFTER_A_FAILURE", 0.1)
    broken = "import os, time; time.sleep(60) if os.environ['RANK'] == '0' else 1 / 0"
    answer = try_node(2, [sys.executable, "-c", broken])
    assert "ZeroDivisionError" in answer["problem"]
    assert not answer["unhealthy"]
    answer = try_node(1, [sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.3)
    assert "did not end" in answer["problem"]
    assert answer["unhealthy"]
