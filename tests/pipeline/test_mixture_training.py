"""Training on a mixture with padding and loss masks: every token weighs the same, and only the past is held fast."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.manifest import Manifest
from data_prep.shards import RowReader, write_part
from monitoring.runlog import read_metrics
from pipeline.attempt import check_resumable
from pipeline.checkpoints.manifest import CheckpointManifest, Progress
from pipeline.config import load_config
from pipeline.errors import CheckpointError, ConfigError
from pipeline.loader import open_training_data
from tests.ranks import rookery

MIXTURE = "data.train={json: {path: data/train, weight: 3}, chat: {path: chat, weight: 2, max_epochs: 50}}"


@pytest.fixture(scope="module")
def chat(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 40 rows: some tokens masked, some rows half padded, three rows masked whole."""
    source = Manifest.load(corpus / "data/train")
    rows = RowReader(corpus / "data/train", source).rows(np.arange(40)).copy()
    pad_id = list(source.special_ids.values())[2]
    trainable = np.random.default_rng(0).random(rows.shape) < 0.6
    rows[5:9, 14:], trainable[5:9, 14:] = pad_id, False
    trainable[20:23] = False
    directory = tmp_path_factory.mktemp("chat") / "chat"
    directory.mkdir()
    part = write_part(directory, "part-00000", rows, trainable)
    dataclasses.replace(source, parts=(part,), padding_tokens=4 * 19).write(directory)
    return directory


@pytest.fixture
def mixed(workdir: Path, chat: Path) -> Path:
    (workdir / "chat").symlink_to(chat)
    return workdir


def test_the_curve_does_not_depend_on_how_masked_tokens_fall_on_ranks_and_micro_batches(mixed: Path) -> None:
    for run_dir, ranks, micro_batch in (("one", None, 8), ("two", 2, 1)):
        done = rookery(
            "train", "test.yaml", MIXTURE, "train.steps=6", f"run_dir={run_dir}",
            f"train.micro_batch_size={micro_batch}", cwd=mixed, ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = read_metrics(mixed / "one"), read_metrics(mixed / "two")
    assert [record["tokens"] for record in one] == [record["tokens"] for record in two]
    assert one[-1]["tokens"] < 6 * 8 * 32
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in one] == pytest.approx([record[name] for record in two], rel=1e-4)


def test_a_batch_without_any_target_is_an_event_and_not_the_end(mixed: Path) -> None:
    done = rookery(
        "train", "test.yaml", "data.train=chat", "train.steps=40", "run_dir=sparse", "train.global_batch_size=1",
        "train.micro_batch_size=1", cwd=mixed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read_metrics(mixed / "sparse")
    empty = [record["step"] for record in records if math.isnan(record["loss"])]
    assert len(empty) == 3
    events = [json.loads(line) for line in (mixed / "sparse/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "no_targets"] == empty


def test_the_future_of_a_mixture_may_change_and_its_past_may_not(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mixed)
    config = load_config("test.yaml", [MIXTURE])
    data = open_training_data(config)
    saved = CheckpointManifest(
        progress=Progress(step=50, samples=400, tokens=1),
        config=dataclasses.asdict(config),
        data_fingerprint=data.mixture.fingerprint(400),
        tokenizer_sha256=data.tokenizer_sha256,
        world_size=1,
        optimizer_state=["exp_avg"],
        shapes={},
        fragments={},
        files={},
    )

    def resume(*overrides: str) -> dict[str, list[Any]]:
        changed = load_config("test.yaml", [MIXTURE, *overrides])
        changes: dict[str, list[Any]] = check_resumable(saved, changed, open_training_data(changed))
        return changes

    assert resume() == {}
    assert resume("data.schedule=[{sample: 400, weights: {chat: 0}}]").keys() == {"data.schedule"}
    assert resume("data.train.late={path: data/validation, weight: 0}").keys() == {"data.train.late"}
    for change in (
        "data.schedule=[{sample: 399, weights: {chat: 0}}]",
        "data.train.json.weight=4",
        "data.train.chat.path=data/validation",
    ):
        with pytest.raises(CheckpointError, match=r"data\.train: the training data of .* trained on so far"):
            resume(change)


def test_a_run_longer_than_its_epochs_allow_is_refused_with_the_longest_possible(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mixed)
    limited = "data.train={chat: {path: chat, max_epochs: 2.5}}"
    with pytest.raises(ConfigError, match=r"the datasets give 100 samples, .* needs 104; .* set train\.steps=12"):
        open_training_data(load_config("test.yaml", [limited, "train.steps=13"]))
    open_training_data(load_config("test.yaml", [limited, "train.steps=12"]))


def test_datasets_of_different_row_lengths_do_not_mix(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mixed)
    short = dataclasses.replace(Manifest.load(mixed / "data/train"), sequence_length=30, parts=())
    (mixed / "short").mkdir()
    part = write_part(mixed / "short", "part-00000", np.zeros((3, 31), dtype=np.uint16))
    dataclasses.replace(short, parts=(part,)).write(mixed / "short")
    with pytest.raises(ConfigError, match=r"data\.train\.b: .*/short has sequences of 30 tokens, the first .* of 32"):
        open_training_data(load_config("test.yaml", ["data.train={a: {path: chat}, b: {path: short}}"]))
