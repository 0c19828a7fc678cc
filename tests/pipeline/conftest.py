"""A small real dataset and the configuration that trains on it."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from data_prep.build import build_dataset
from data_prep.tokenizer import save_tokenizer, train_tokenizer
from data_prep.world import World

STDLIB = Path(sysconfig.get_path("stdlib"))

CONFIG = """
name: test
run_dir: run
model: {preset: tiny, n_embd: 32, intermediate_size: 64, vocab_size: 512, block_size: 32}
depth: {mean_recurrence: 4, mean_backprop_depth: 2}
optimizer: {learning_rate: 2.0e-3}
schedule: {warmup_steps: 2, cooldown_steps: 4}
data: {train: data/train, validation: data/validation, tokenizer: tokenizer}
train: {steps: 12, global_batch_size: 8, micro_batch_size: 2, precision: fp32}
monitor: {probe_every: 4}
checkpoint: {every: 4, keep_last: 2}
"""


def write_corpus(root: Path) -> Path:
    """Fill a directory with tokenizer/ (512 tokens), data/train, data/validation (rows of 33) and test.yaml."""
    texts = (path.read_text(encoding="utf-8") for path in sorted((STDLIB / "json").glob("*.py")))
    save_tokenizer(train_tokenizer(texts, 512), root / "tokenizer")
    build_dataset([STDLIB / "json"], root / "tokenizer", 32, root / "data" / "train", World())
    build_dataset([STDLIB / "wsgiref"], root / "tokenizer", 32, root / "data" / "validation", World())
    (root / "test.yaml").write_text(CONFIG)
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `write_corpus` fills it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def workdir(corpus: Path, tmp_path: Path) -> Path:
    """A directory of the test's own in which the configuration's relative paths lead to the shared data."""
    for name in ("tokenizer", "data", "test.yaml"):
        (tmp_path / name).symlink_to(corpus / name)
    return tmp_path
