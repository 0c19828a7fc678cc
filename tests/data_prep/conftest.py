"""Real text, a tokenizer trained on it, and a small dataset: made once for the tests of this room."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from data_prep.build import build_dataset
from data_prep.config import BuildConfig
from data_prep.tokenizer import save_tokenizer, train_tokenizer
from data_prep.world import World

MODULES = ("ast", "bdb", "calendar", "cmd", "codecs", "colorsys", "configparser", "contextlib", "copy", "csv")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten modules of the running interpreter, a few hundred kB of English and Python."""
    directory = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib"), f"{name}.py"), directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "bpe"
    texts = (path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir()))
    save_tokenizer(train_tokenizer(texts, 600), out)
    return out


@pytest.fixture(scope="session")
def pristine(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several parts. Not for a test that changes it: those take `dataset`."""
    out = tmp_path_factory.mktemp("dataset") / "pristine"
    build_dataset([corpus], tokenizer_dir, 255, out, World(), config=BuildConfig(unit_bytes=30_000))
    return out


@pytest.fixture
def dataset(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "dataset")
