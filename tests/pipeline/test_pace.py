"""A slow rank is named by what it computes itself, though all ranks wait equally long for each other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.world import World
from pipeline.launch import node_name
from pipeline.pace import Pace, _ratios
from slurm.local import rank_command, rank_environment
from tests.pipeline.slow_rank import SLOWER
from tests.ranks import forked_python

ROOT = Path(__file__).parents[2]


def test_the_slow_rank_is_named_though_both_wait_for_each_other(tmp_path: Path) -> None:
    command = rank_command(2, [*forked_python(), "-m", "tests.pipeline.slow_rank", str(tmp_path / "said")])
    environment = rank_environment(2) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said").read_text())
    first, second = said["seconds"]
    assert first == pytest.approx(second, rel=0.1)  # a step takes both of them as long
    slowest = said["found"]["slowest"]
    assert (slowest["rank"], slowest["host"]) == (1, "n1")
    assert slowest["ratio"] == said["found"]["nodes"]["n1"] == pytest.approx(SLOWER, rel=0.15)
    assert said["found"]["nodes"]["n0"] == 1.0


@settings(max_examples=30)
@given(st.tuples(*[st.floats(0.01, 10.0)] * 3), st.integers(0, 2**32 - 1), st.integers(3, 9), st.floats(1.05, 4.0))
def test_the_ratio_is_how_much_longer_a_rank_takes_at_its_own_depths(
    cost: tuple[float, float, float], seed: int, ranks: int, factor: float
) -> None:
    generator = np.random.default_rng(seed)
    pause = generator.integers(0, 20, ranks)  # one step of each rank, in which the machine did something else
    steps = []
    for rank in range(ranks):
        counts = np.column_stack([np.full(20, 2), generator.integers(1, 60, 20), generator.integers(1, 9, 20)])
        seconds = counts @ np.array(cost) * (factor if rank == 1 else 1.0)
        seconds[pause[rank]] *= 1.5
        steps.append(np.column_stack([counts, seconds]))
    ratios = _ratios(steps)
    assert np.argmax(ratios) == 1
    assert ratios[1] == pytest.approx(factor, rel=0.1)
    assert np.delete(ratios, 1) == pytest.approx(1.0, rel=0.1)


def test_nothing_is_said_of_a_few_steps_and_the_first_may_compile() -> None:
    pace = Pace(World())
    for seconds in (1000.0, *[1.0] * 6, float("nan"), 0.0):
        pace.add(1, 8.0, 4.0, seconds)
    assert pace.read() == {}
    for _ in range(9):
        pace.add(1, 8.0, 4.0, 1.0)
    assert pace.read() == {
        "nodes": {node_name(): pytest.approx(1.0)},
        "slowest": {"rank": 0, "host": node_name(), "ratio": pytest.approx(1.0)},
    }
