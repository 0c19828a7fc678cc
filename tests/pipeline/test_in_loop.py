"""What a run measures of itself while it trains: validation, cost, time by phase, a profile."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from data_prep.build import build_dataset
from data_prep.manifest import Manifest
from data_prep.world import World
from monitoring.runlog import read_events, read_metrics
from pipeline.config import load_config
from pipeline.depth import Depth
from pipeline.errors import ConfigError
from pipeline.evaluate import evaluate_checkpoint
from pipeline.flops import sequence_flops
from pipeline.validation import ValidationConfig, validation_depths, validation_rows
from tests.ranks import rookery

STDLIB = Path(sysconfig.get_path("stdlib"))
MEASURED = ("validation={every: 4, depths: [4, 1], budget: 1.0}", "data.validation=few", "train.profile.steps=[2, 3]")
PHASES = {"data", "forward", "backward", "optimizer"}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain/ without any of it, one/ on one rank, and two/ on two at stage 3, which shards what validation needs."""
    root = tmp_path_factory.mktemp("in-loop")
    for name in ("tokenizer", "data", "test.yaml"):
        (root / name).symlink_to(corpus / name)
    build_dataset([STDLIB / "wsgiref" / "types.py"], root / "tokenizer", 32, root / "few", World())
    launches = {
        "plain": (None, ["zero.stage=0"]),
        "one": (None, ["zero.stage=0", *MEASURED]),
        # Selective checkpointing is the one that tells what a validation leaves behind at stage 3.
        "two": (2, ["zero.stage=3", "train.activation_checkpointing=selective", *MEASURED]),
    }
    for name, (ranks, overrides) in launches.items():
        done = rookery("train", "test.yaml", f"run_dir={name}", "train.steps=10", *overrides, cwd=root, ranks=ranks)
        assert done.returncode == 0, done.stderr
    return root


def test_validation_disturbs_nothing_and_does_not_depend_on_the_world(runs: Path) -> None:
    plain, one, two = (read_metrics(runs / name) for name in ("plain", "one", "two"))
    assert [record["loss"] for record in plain] == [record["loss"] for record in one]
    assert [record["step"] for record in one if "validation" in record] == [4, 8, 10]
    for alone, both in zip(one, two, strict=True):
        if "validation" in alone:
            assert alone["validation"] == pytest.approx(both["validation"], rel=1e-4)
            assert alone["validation_tokens"] == both["validation_tokens"]


def test_validation_measures_what_an_evaluation_does(runs: Path) -> None:
    rows = Manifest.read(runs / "few").rows
    config = load_config(str(runs / "test.yaml"), [MEASURED[0]])
    assert validation_rows(config) >= rows  # so that both read all of them
    last = read_metrics(runs / "one")[-1]
    evaluated = evaluate_checkpoint(runs / "one", [1, 4])
    assert last["validation"] == pytest.approx(evaluated["loss"], rel=1e-6)
    assert last["validation_tokens"] == evaluated["evaluated_tokens"]


def test_every_step_says_what_it_cost(runs: Path) -> None:
    config = load_config(str(runs / "test.yaml"))
    flops = sequence_flops(config.model, "selective", length=32)
    for record in read_metrics(runs / "two"):
        depth = Depth(*record["num_steps"])
        assert record["model_flops"] == pytest.approx(8 * flops.model(depth))
        assert record["hardware_flops"] == pytest.approx(8 * flops.training(depth))
        assert record["mfu"] is record["hfu"] is None  # nobody knows the peak of a CPU
        assert record["memory_bytes"] > 100 * 2**20
        assert set(record["phases"]) >= PHASES
        assert sum(record["phases"][phase] for phase in PHASES) <= record["seconds"] * 1.001
        communication = record["phases"].pop("communication")
        assert 0.0 < communication < sum(record["phases"].values())
    assert any("checkpoint" in record["phases"] for record in read_metrics(runs / "two"))
    assert any("validation" in record["phases"] for record in read_metrics(runs / "two"))


def test_a_profile_is_a_trace_of_the_steps_that_were_named(runs: Path) -> None:
    (trace,) = (runs / "two" / "attempts" / "0001").glob("trace-*")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = [event["name"] for event in events if event.get("ph") == "X"]
    for phase in PHASES:
        assert spans.count(phase) >= 2, phase
    assert spans.count("optimizer") == 2 * 2  # one a micro-batch of two steps
    assert any(name.startswith("aten::") for name in spans)
    (event,) = (event for event in read_events(runs / "two") if event["kind"] == "profile")
    assert event["path"] == f"attempts/0001/{trace.name}"


def test_the_budget_of_validation_says_how_many_rows_are_read(runs: Path) -> None:
    config = load_config(str(runs / "test.yaml"), ["validation.every=10", "depth.mean_recurrence=16"])
    assert validation_depths(config) == [1, 8, 16, 32]
    rows = validation_rows(config)
    config.validation.budget *= 10
    assert rows * 10 <= validation_rows(config) <= rows * 10 + 10
    config.validation = ValidationConfig(every=1, depths=[10000])
    with pytest.raises(ConfigError, match=r"validation.budget: 0.02 of 1 steps does not pay for one row"):
        validation_rows(config)
