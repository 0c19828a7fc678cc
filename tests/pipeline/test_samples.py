"""`rookery data order` and `rookery data show` say which samples a step takes, and what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from data_prep.manifest import Manifest
from data_prep.order import sample_rows
from data_prep.shards import RowReader
from data_prep.tokenizer import Tokenizer
from rookery.cli import app
from tests.ranks import rookery

MIXTURE = "data.train={json: {path: data/train, weight: 3}, more: {path: data/validation, max_epochs: 4}}"
LIMITED = "data.train={json: {path: data/train, max_epochs: 3}}"


def data(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["data", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


@pytest.fixture
def here(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workdir)
    return workdir


def test_the_ranks_of_a_step_share_its_global_batch(here: Path) -> None:
    whole = json.loads(data("order", "test.yaml", "--step", "1000", "--json", MIXTURE))["samples"]
    assert [sample["sample"] for sample in whole] == list(range(8000, 8008))
    assert [sample["dataset"] for sample in whole].count("json") == 6
    for world in (1, 2, 8):
        parts = [
            json.loads(
                data("order", "test.yaml", MIXTURE, *f"--step 1000 --rank {rank} --world {world} --json".split())
            )
            for rank in range(world)
        ]
        assert [sample for part in parts for sample in part["samples"]] == whole


def test_show_prints_the_text_of_the_samples_that_order_names(here: Path) -> None:
    samples = json.loads(data("order", "test.yaml", MIXTURE, "--step", "7", "--json"))["samples"]
    shown = json.loads(data("show", "test.yaml", MIXTURE, "--step", "7", "--json"))["samples"]
    assert [{name: value for name, value in sample.items() if name != "text"} for sample in shown] == samples
    tokenizer = Tokenizer.load(here / "tokenizer")
    for sample in shown:
        reader = RowReader(Path(sample["directory"]), Manifest.load(Path(sample["directory"])))
        assert sample["text"] == tokenizer.decode(reader.row(sample["row"]))
    plain = data("show", "test.yaml", MIXTURE, "--step", "7", "--rank", "1", "--world", "8")
    assert plain == f"--- sample 57: {_place(samples[1])}\n{shown[1]['text']}\n"


def _place(sample: dict[str, Any]) -> str:
    return f"{sample['dataset']} epoch {sample['epoch']} row {sample['row']}"


def test_a_dataset_alone_has_the_order_of_a_run_on_it(here: Path) -> None:
    rows = Manifest.load(here / "data/train").rows
    printed = json.loads(data("order", "data/train", "--step", "90", "--world", "4", "--rank", "3", "--json"))
    assert (printed["seed"], printed["global_batch_size"]) == (233, 4)
    assert [sample["row"] for sample in printed["samples"]] == sample_rows(np.array([363]), rows, 233).tolist()
    configured = json.loads(data("order", "test.yaml", "--step", "90", "--json"))
    alone = json.loads(data("order", "data/train", "--step", "90", "--global-batch-size", "8", "--json"))
    assert [s["row"] for s in alone["samples"]] == [s["row"] for s in configured["samples"]]


def test_a_row_of_a_dataset_is_shown(here: Path) -> None:
    row = RowReader(here / "data/train", Manifest.load(here / "data/train")).row(3)
    text = Tokenizer.load(here / "tokenizer").decode(row)
    assert data("show", "data/train", "3", "--tokenizer", "tokenizer") == text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["order", "test.yaml", "--step", "-1"], "need a step >= 0"),
        (["order", "test.yaml", "--step", "1", "--rank", "2", "--world", "2"], "a rank below --world"),
        (["order", "test.yaml", "--step", "1", "--world", "3"], "3 ranks do not divide the global batch of 8"),
        (["order", "nowhere", "--step", "1"], "nowhere"),
        (["order", "test.yaml", "--step", "1", "--seed", "4"], "use overrides such as seed=7"),
        (["order", "test.yaml", "--step", "9999", LIMITED], "max_epochs end after \\d+ samples"),
        (["show", "data/train"], "either the index of a row, or --step"),
        (["show", "data/train", "3", "--step", "3"], "either the index of a row, or --step"),
        (["show", "data/train", "3", "seed=7"], "overrides are for a configuration"),
        (["order", "data/train", "--step", "3", "--global-batch-size", "0"], "needs at least one sequence"),
        (["order", "data/train", "--step", "99999999999999999999"], "beyond any run"),
        (["show", "data/train", "999999", "--tokenizer", "tokenizer"], "ROW 999999: data/train has rows 0 to"),
        (["show", "test.yaml", "3", MIXTURE], "of which dataset"),
    ],
)
def test_bad_questions_are_refused(here: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(*arguments)


def test_a_refusal_on_the_command_line_is_exit_12(workdir: Path) -> None:
    done = rookery("data", "order", "data/train", "--step", "5", "--world", "0", cwd=workdir)
    assert done.returncode == 12
    assert done.stderr == "rookery: --step 5 --rank 0 --world 0: need a step >= 0 and a rank below --world\n"
