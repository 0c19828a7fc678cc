"""Ranks find each other and their devices, or say by name what is in the way."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from data_prep.manifest import Part
from data_prep.world import LaunchError, World
from monitoring.runlog import read_metrics, read_outcome
from pipeline import gloo_control, launch
from pipeline.config import load_config
from pipeline.errors import ConfigError, UnhealthyNodeError
from pipeline.gloo_control import _announce, _ask, _decode, _encode, _group, _store, connect
from pipeline.launch import CommConfig, DeviceChoice, _judge_problems, address_of, judge_devices, roll_call
from pipeline.train import train
from slurm.local import rank_environment
from tests.ranks import rookery

ROOT = Path(__file__).parents[2]


def torchrun(ranks: int, *command: str, cwd: Path, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = rank_environment(ranks) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_torchrun_trains_as_mpiexec_does_although_the_port_is_taken(workdir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        held = ("train.steps=2", "comm.interface=lo", f"comm.port={port}")
        with_mpi = rookery("train", "test.yaml", *held, cwd=workdir, ranks=2)
        assert with_mpi.returncode == 0, with_mpi.stderr
        assert f"comm.port: {port} is taken on {socket.gethostname()}; the ranks meet at {port + 1}" in with_mpi.stderr
        without = torchrun(2, "-m", "rookery", "train", "test.yaml", *held, "run_dir=torchrun", cwd=workdir)
        assert without.returncode == 0, without.stderr
    ours, theirs = ([record["loss"] for record in read_metrics(workdir / name)] for name in ("torchrun", "run"))
    assert ours == theirs
    assert len(ours) == 2


PROGRAM = """
import os, sys, time
import numpy as np
from data_prep.world import PeerError, World
from pipeline.gloo_control import connect
from pipeline.launch import CommConfig, ranks_of_nodes, roll_call, start_process_group, stop_process_group
world = World.discover(connect)
start_process_group(world, CommConfig())
nodes = ranks_of_nodes(world)
values = np.full(3, 0.1 * (world.rank + 1))
sums = {tuple(world.sum(values)) for _ in range(5)} | {tuple(world.start_sum(values).wait())}
assert len(sums) == 1, sums
ranks = range(world.size)
assert world.exchange([(world.rank, other) for other in ranks]) == [(other, world.rank) for other in ranks]
assert world.gather("x" * world.rank) == (["x" * other for other in ranks] if world.rank == 0 else None)
assert world.broadcast({"root": world.rank}, root=1) == {"root": 1}
assert world.meet(30.0)
answers = roll_call("here", f"I am {world.rank}", 3.0) if world.rank != 2 else {}
os.write(1, (repr((world.rank, nodes, world.allgather(world.rank), answers)) + "\\n").encode())
try:
    with world.guard("phase"):
        if world.rank == 1:
            raise ValueError("mine")
except ValueError as error:
    assert "mine" in str(error), error
    assert world.rank == 1 or f"(rank 1 on {os.uname().nodename}, phase)" in str(error), error
world.meet(60.0)
stop_process_group()
if world.rank == 1:
    world.abort(7)
try:
    world.allgather(0)
except PeerError as error:
    assert "the connection to another rank broke" in str(error)
else:
    raise AssertionError
"""


def test_ranks_agree_without_mpi(tmp_path: Path) -> None:
    """Three ranks, started by four variables of the environment, of which one misses the roll call and then dies."""
    environment = rank_environment(3) | {"PYTHONPATH": str(ROOT), "LOCAL_WORLD_SIZE": "1"}
    place = environment | {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=place | {"RANK": str(rank)}, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 7, 0], outputs
    lines = sorted("".join(out for out, _ in outputs).splitlines())
    heard = {0: "I am 0", 1: "I am 1"}
    assert lines == [repr((rank, [[0], [1], [2]], [0, 1, 2], {} if rank == 2 else heard)) for rank in range(3)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_two_jobs_with_one_port_do_not_join_each_other() -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    met = threading.Event()
    of_the_first = [_store(place, rank, met) for rank in (0, 1)]
    with pytest.raises(LaunchError, match=rf"rank 0 on .* cannot listen on port {place['MASTER_PORT']}: .*MASTER_PORT"):
        connect(place | {"RANK": "0"})
    with pytest.raises(LaunchError, match="another rank 1 was there before; two jobs may have the same MASTER_PORT"):
        connect(place | {"RANK": "1"})
    del of_the_first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "RANK: 'x' is not a whole number in 0..1"),
        ({"RANK": "2"}, "RANK: '2' is not a whole number in 0..1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is not a whole number in 1.."),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: '99999' is not a whole number in 1..65535"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "MASTER_PORT: is not set"),
        ({}, "MASTER_PORT: is not set"),
    ],
)
def test_a_launcher_s_variable_without_a_meaning_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        connect({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **changes})


def test_rank_0_answers_until_all_have_come_whoever_else_knocks() -> None:
    first, met = free_port(), threading.Event()
    _announce(first, "job", 5555, met)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", first)) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
    assert [_ask("127.0.0.1", first, "job") for _ in range(40)] == [5555] * 40
    (thread,) = (each for each in threading.enumerate() if each.name == "rendezvous")
    met.set()
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_rank_that_does_not_come_ends_the_wait_and_one_that_is_late_with_a_message_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gloo_control, "_SECONDS_TO_MEET", 1.0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(RuntimeError, match="timeout"):
        _group(PrefixStore("alone", store), 0, 2, environment)

    def late() -> None:
        other = TCPStore("127.0.0.1", store.port, is_master=False)
        group: Any = _group(PrefixStore("both", other), 1, 2, environment)
        time.sleep(1.5)
        group.allreduce([torch.ones(1)]).wait()

    thread = threading.Thread(target=late)
    thread.start()
    value = torch.ones(1)
    group: Any = _group(PrefixStore("both", store), 0, 2, environment)
    group.allreduce([value]).wait()
    thread.join()
    assert value.item() == 2.0


def test_a_store_out_of_reach_leaves_the_roll_call_empty_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    monkeypatch.setattr(launch, "_SECONDS_TO_CONNECT", 0.2)
    monkeypatch.setattr(launch, "_meeting", [launch._Meeting("127.0.0.1", free_port(), 0, ["n1"])])
    assert roll_call("here", "I am 0", 1.0) == {}
    assert said == []


GPU = DeviceChoice("n1", "h1", visible=2)


def choices(*of_n2: DeviceChoice) -> list[DeviceChoice]:
    """Return two ranks with a GPU each on n1, and those of n2."""
    first = [GPU._replace(identity="a"), GPU._replace(identity="b")]
    return first + [each._replace(node="n2", host="h2") for each in of_n2]


def test_ranks_with_a_device_each_pass_and_so_do_ranks_without_any() -> None:
    judge_devices(choices(GPU._replace(identity="a"), GPU._replace(identity="b")))
    judge_devices([DeviceChoice("n1", "h1")] * 3)


@pytest.mark.parametrize(
    ("ill", "reason"),
    [
        (GPU._replace(visible=0), r"n2, rank 2: it sees no device \(0 visible, 2 elsewhere\); exclude n2 and"),
        (
            GPU._replace(visible=1, crowded="local rank 1 has no device"),
            "n2, rank 2: local rank 1 has no device .1 vis",
        ),
        (GPU._replace(problem="its device does not start: CUDA error"), "n2, rank 2: its device does not start: CUDA"),
    ],
)
def test_the_node_whose_device_is_missing_or_sick_is_named(ill: DeviceChoice, reason: str) -> None:
    with pytest.raises(UnhealthyNodeError, match=reason) as caught:
        judge_devices(choices(ill, GPU._replace(identity="b")))
    assert caught.value.hosts == ["n2"]


def test_more_ranks_than_devices_on_whole_nodes_are_a_mistake_and_not_an_illness() -> None:
    with pytest.raises(ConfigError, match="no device: 2 are visible"):
        judge_devices(choices(GPU._replace(crowded="no device: 2 are visible"), GPU._replace(visible=1, crowded="x")))
    with pytest.raises(ConfigError, match="several ranks on h1 have the same device"):
        judge_devices([GPU._replace(visible=1, identity="a")] * 2)
    with pytest.raises(UnhealthyNodeError, match="several ranks on h2 have the same device"):
        judge_devices(choices(*[GPU._replace(visible=1, identity="a")] * 2))


def test_a_device_that_does_not_start_ends_with_the_host_s_name_in_the_outcome(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sick(local_rank: int) -> torch.device:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    for name, value in (("OMP_NUM_THREADS", "1"), ("GLOO_SOCKET_IFNAME", "lo")):  # which the launch else sets for good
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "select_device", sick)
    monkeypatch.chdir(workdir)
    with pytest.raises(UnhealthyNodeError, match="does not start: CUDA error: uncorrectable ECC"):
        train(load_config("test.yaml", []), World())
    outcome = read_outcome(workdir / "run", 1)
    assert outcome is not None
    assert (outcome["exit_code"], outcome["hosts"]) == (13, [launch.node_name()])


def test_what_is_no_data_is_not_read_from_the_network() -> None:
    part = Part(**dict.fromkeys(Part.__dataclass_fields__, 0))  # type: ignore[arg-type]
    value = {"a": [1, None, (2.5, "x")], "path": Path("/x"), "array": np.arange(3), "part": part}
    read = _decode(_encode(value))
    assert {key: read[key] for key in ("a", "path", "part")} == {key: value[key] for key in ("a", "path", "part")}
    assert read["array"].tolist() == [0, 1, 2]
    for attack in (os.system, eval, subprocess.Popen, Path.unlink, json.dumps):
        with pytest.raises(pickle.UnpicklingError, match="is no data"):
            _decode(_encode(attack))


def test_what_all_nodes_lack_is_the_configurations_fault_and_what_some_lack_theirs() -> None:
    _judge_problems([("a", None), ("b", None)], World())
    with pytest.raises(ConfigError, match="no hsn0 on a; no hsn0 on b"):
        _judge_problems([("a", "no hsn0 on a"), ("a", "no hsn0 on a"), ("b", "no hsn0 on b")], World())
    with pytest.raises(UnhealthyNodeError) as refused:
        _judge_problems([("a", None), ("a", None), ("b", "no hsn0 on b")], World())
    assert refused.value.hosts == ["b"]


def test_an_unknown_interface_is_refused_with_those_that_exist() -> None:
    assert address_of("lo") == address_of("lo,lo") == "127.0.0.1"
    for names in ("hsn0", "lo,hsn0", "hsn0,lo"):
        with pytest.raises(ConfigError, match=r"comm.interface: 'hsn0' is no network interface .*; it has .*lo"):
            address_of(names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70000}, "comm.port: 70000 is not in 1..65535"),
        ({"timeout_minutes": 0.0}, "comm.timeout_minutes: 0.0 is not positive"),
        ({"transport": "carrier"}, "comm.transport: 'carrier' is not one of collective, mpi"),
        ({"chunk_mb": 0}, "comm.chunk_mb: 0 is not positive"),
        ({"gpu_aware_mpi": True}, "comm.gpu_aware_mpi: needs comm.transport=mpi"),
    ],
)
def test_values_without_a_meaning_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CommConfig(**values)  # type: ignore[arg-type]
