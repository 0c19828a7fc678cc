"""What a run's jobs write down, and the nodes that it avoids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import joblog
from slurm.quarantine import FILE, excludable, quarantine, quarantined
from tests.slurm.cluster import Cluster


def test_records_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    assert joblog.read(tmp_path) == []
    assert joblog.append(tmp_path, "submitted", jobs=["7"])
    assert joblog.append(tmp_path, "began", job="7", nodes=["n1"])
    first, second = joblog.read(tmp_path)
    assert (first["kind"], first["jobs"], second["nodes"]) == ("submitted", ["7"], ["n1"])
    assert first["time"] <= second["time"]


def test_many_writers_leave_whole_lines(tmp_path: Path) -> None:
    script = "import sys, pathlib\nfrom slurm import joblog\nfor n in range(50):\n"
    script += "    joblog.append(pathlib.Path(sys.argv[1]), 'began', job=sys.argv[2], number=n, filler='x' * 500)"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = joblog.read(tmp_path)
    for number in range(3):
        assert [record["number"] for record in found if record["job"] == str(number)] == list(range(50))


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    joblog.append(tmp_path, "began", job="7")
    with (tmp_path / joblog.FILE).open("ab") as file:
        file.write(b'{"kind":"ended","co')
    joblog.append(tmp_path, "over", code=0)
    assert [record["kind"] for record in joblog.read(tmp_path)] == ["began", "over"]


def test_what_cannot_be_written_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert not joblog.append_line(Path("/dev/full"), {"kind": "began", "job": "7"})
    assert '"job": "7"' in capsys.readouterr().err
    assert not joblog.append(Path("/proc/no/such/run"), "began", job="8")
    assert "No such file" in capsys.readouterr().err


def test_a_submission_by_a_person_opens_a_new_chain(tmp_path: Path) -> None:
    for kind, fields in (
        ("submitted", {"first_link": 1, "continues": False}),
        ("over", {"code": 11}),
        ("submitted", {"first_link": 1, "continues": False}),
        ("began", {}),
        ("submitted", {"first_link": 1, "continues": True}),
        ("submitted", {"first_link": 2, "continues": True}),
    ):
        joblog.append(tmp_path, kind, **fields)
    chain = joblog.current_chain(joblog.read(tmp_path))
    assert [record["kind"] for record in chain] == ["submitted", "began", "submitted", "submitted"]
    assert joblog.current_chain([{"kind": "cancelled"}]) == [{"kind": "cancelled"}]


def test_a_verdict_on_a_node_expires(tmp_path: Path) -> None:
    assert quarantined(tmp_path, 72.0, 0.0) == {}
    quarantine(tmp_path, "n2", "slow", "7")
    [line] = (tmp_path / FILE).read_text().splitlines()
    record = json.loads(line)
    assert (record["node"], record["reason"], record["job"]) == ("n2", "slow", "7")
    assert quarantined(tmp_path, 72.0, record["time"] + 71 * 3600) == {"n2": "slow"}
    assert quarantined(tmp_path, 72.0, record["time"] + 73 * 3600) == {}
    quarantine(tmp_path, "n3", "lost", "8")
    quarantine(tmp_path, "n2", "slow again", "9")
    assert list(quarantined(tmp_path, 72.0, record["time"] + 1).items()) == [("n3", "lost"), ("n2", "slow again")]


def test_a_job_is_kept_off_known_nodes_as_long_as_enough_are_left(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    assert excludable(["n3", "elsewhere", "n1"], None, 1) == ["n3", "n1"]
    assert excludable(["n3", "elsewhere", "n1"], "batch", 2) == ["n1"]
    assert excludable(["n3", "n1"], "low", 1, also=["n2"]) == ["n1"]
    assert excludable(["n3", "n1"], "low", 3) == []
    monkeypatch.setenv("PATH", str(tmp_path))  # nobody to ask
    assert excludable(["n3", "elsewhere"], None, 3) == ["n3", "elsewhere"]


def test_a_person_may_add_a_node_by_hand(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"node": "n3"}\nnot a record\n{"node": 3}\n')
    assert quarantined(tmp_path, 72.0, 1e12) == {"n3": ""}
