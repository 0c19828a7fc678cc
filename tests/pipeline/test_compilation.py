"""The compiled core computes what the eager one does, whatever the depth, and is compiled once."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from monitoring.runlog import read_metrics
from pipeline import job_variables
from pipeline.compilation import CompileConfig, KernelCache, cache_key, compile_core, compiler_problem
from pipeline.errors import ConfigError
from pipeline.model import RecurrentDepthModel
from pipeline.recompute import POLICIES
from pipeline.recurrence import Steps
from tests.pipeline.small_models import small_batch, small_config
from tests.ranks import rookery

CPU = torch.device("cpu")
DEEP_AND_SHALLOW: list[Steps] = [(0, 1), (0, 3), (5, 4), (36, 4)]
SHRINKING: list[Steps] = [
    [(2, 4), (0, 1), (4, 4), (0, 3)],
    [(0, 1)] * 4,
    [(2, 4), (3, 4), (1, 4), (5, 4)],
    [(0, 2), (0, 1), (0, 1), (0, 1)],
]


def model_with(policy: str) -> RecurrentDepthModel:
    model = RecurrentDepthModel(small_config(n_layers_in_recurrent_block=1), activation_checkpointing=policy)
    model.init_weights(0, 4)
    return model


def passed(model: RecurrentDepthModel, steps: Steps) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    ids = small_batch(4)
    loss = model(ids, model.initial_state(torch.arange(4), 12), steps, ids.roll(-1, 1))
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_compiles_once(policy: str, warm_up: list[Steps], depths: list[Steps], graphs: int) -> None:
    torch.compiler.reset()
    counters.clear()
    compiled, eager = model_with(policy), model_with("none")
    compile_core(compiled, sequences_vary=warm_up != [(1, 2)])
    for steps in warm_up:
        passed(compiled, steps)
    assert counters["stats"]["unique_graphs"] == graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in depths:
            (loss, gradients), (expected, others) = passed(compiled, steps), passed(eager, steps)
            torch.testing.assert_close(loss, expected)
            for actual, other in zip(gradients, others, strict=True):
                torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and split the graphs as ever, but run them as they are: kernels take a minute to compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("policy", POLICIES)
def test_depths_1_3_9_and_40_are_two_graphs_and_eager_numbers(policy: str) -> None:
    assert_compiles_once(policy, [(1, 2)], DEEP_AND_SHALLOW, graphs=2)


@pytest.mark.usefixtures("graphs_alone")
def test_a_batch_that_shrinks_is_four_graphs() -> None:
    """With and without gradient: one for all numbers of sequences, one for a single sequence."""
    assert_compiles_once("iteration", [[(2, 4), (1, 3), (0, 1), (0, 1)]], SHRINKING, graphs=4)


def test_a_compiled_run_goes_on_with_the_kernels_that_it_kept(workdir: Path) -> None:
    """Each process has a folder of its own; the archive is all that they share."""
    short = "train.steps=3", "schedule.cooldown_steps=0", "monitor.probe_every=9", "model.n_layers_in_recurrent_block=1"
    kept = "train.compile={enabled: true, cache_dir: kernels}"

    def train(*overrides: str) -> None:
        done = rookery("train", "test.yaml", *overrides, cwd=workdir, environment={"TMPDIR": str(workdir)})
        assert done.returncode == 0, done.stderr

    train(*short, kept)
    (archive,) = (workdir / "kernels").iterdir()
    written = archive.stat().st_mtime_ns
    train(*short, kept, "train.steps=6")
    assert archive.stat().st_mtime_ns == written  # nothing was compiled
    train(*short, "train.steps=6", "run_dir=eager")
    compiled, eager = ([record["loss"] for record in read_metrics(workdir / name)] for name in ("run", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert not list(workdir.glob("rookery-kernels-*"))


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "restored afterwards")


def kernel() -> Path:
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "kernel.so"


def publish(directory: Path) -> Path:
    kernels = KernelCache(directory, CPU, "default")
    kernel().parent.mkdir()
    kernel().write_bytes(b"code" * 10_000)
    assert kernels.publish()
    assert kernels.archive is not None
    return kernels.archive


@pytest.mark.usefixtures("folders")
def test_a_damaged_archive_is_passed_over_and_written_anew(tmp_path: Path) -> None:
    archive = tmp_path / f"{cache_key(CPU, 'default')}.tar"
    archive.write_bytes(b"half" * 100)
    publish(tmp_path)
    assert KernelCache(tmp_path, CPU, "default").passed_over is None
    assert kernel().read_bytes() == b"code" * 10_000
    os.truncate(archive, archive.stat().st_size // 2)  # in the middle of a file
    assert str(archive) in str(KernelCache(tmp_path, CPU, "default").passed_over)
    assert not kernel().exists()


@pytest.mark.usefixtures("folders")
def test_the_copy_on_the_node_is_read_and_the_shared_archive_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, node = tmp_path / "shared", tmp_path / "node"
    node.mkdir()
    publish(shared).rename(node / f"{cache_key(CPU, 'default')}.tar")
    monkeypatch.setenv(job_variables.STAGED_KERNELS, str(node))
    kernels = KernelCache(shared, CPU, "default")
    assert kernel().read_bytes() == b"code" * 10_000
    assert not kernels.publish()
    kernel().with_name("other.so").write_bytes(b"more")
    assert kernels.publish()
    assert [path.name for path in shared.iterdir()] == [f"{cache_key(CPU, 'default')}.tar"]


@pytest.mark.usefixtures("folders")
def test_an_archive_that_others_could_have_written_is_passed_over(tmp_path: Path) -> None:
    archive = publish(tmp_path)
    archive.chmod(0o664)
    assert "mode -rw-rw-r--" in str(KernelCache(tmp_path, CPU, "default").passed_over)
    archive.chmod(0o644)
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(archive, os.getuid() + 1, -1)
    assert f"belongs to user {os.getuid() + 1}" in str(KernelCache(tmp_path, CPU, "default").passed_over)
    assert not kernel().exists()


@pytest.mark.usefixtures("folders")
def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended, alive = (tmp_path / f"rookery-kernels-{pid}-x" for pid in (2**22 + 1, os.getpid()))
    ended.mkdir()
    alive.mkdir()
    KernelCache(None, CPU, "default")
    assert alive.exists()
    assert not ended.exists()


def test_the_key_names_mode_and_torch() -> None:
    assert cache_key(CPU, "default") == cache_key(CPU, "default")
    assert cache_key(CPU, "default") != cache_key(CPU, "max-autotune-no-cudagraphs")
    assert torch.__version__ in cache_key(CPU, "default")


def test_a_folder_that_the_environment_names_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert not KernelCache(None, CPU, "default").publish()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    monkeypatch.delenv("TRITON_CACHE_DIR")


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile\.mode: 'reduce-overhead' is not one of default"):
        CompileConfig(mode="reduce-overhead")
    with pytest.raises(ConfigError, match=r"zero\.stage = 3.*use zero\.stage=2"):
        CompileConfig(enabled=True).check(3)
    CompileConfig(enabled=True).check(2)
    CompileConfig().check(3)
    assert compiler_problem() is None
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    assert "install g++" in str(compiler_problem())
