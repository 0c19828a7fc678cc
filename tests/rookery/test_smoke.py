"""The smoke chain through its command, as `make smoke` runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rookery.smoke import failed_checks
from tests.ranks import rookery


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    if log := os.environ.get("ROOKERY_SMOKE_LOG"):  # .ci/run has just run it
        return Path(log).parent / "smoke", Path(log).read_text()
    root = tmp_path_factory.mktemp("smoke")
    done = rookery("smoke", "--workdir", "here", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "here", done.stdout


def test_the_summary_holds_the_promised_figures(smoke: tuple[Path, str]) -> None:
    summary = json.loads((smoke[0] / "summary.json").read_text())
    assert summary["ok"] is True
    assert summary["resume_max_abs_loss_diff"] == 0.0
    assert summary["replayed_steps"] >= 1
    assert summary["resumed_from_step"] > 0
    assert summary["export_max_abs_logit_diff"] <= 1e-5
    assert summary["last_loss"] < summary["first_loss"]
    assert list(summary["eval"]) == ["1", "2", "4", "8", "16"]
    assert summary["eval"]["8"] <= summary["eval"]["1"] - 0.05
    assert summary["eval"][str(summary["mean_recurrence"])] < summary["unigram_entropy"]
    assert summary["tokens_per_second"] > 0
    stages = ["corpus", "tokenizer", "data", "train", "resume", "eval", "export", "report"]
    assert list(summary["stage_seconds"]) == stages
    assert summary["peak_memory_bytes"] < 4 * 2**30


def test_every_artefact_is_there_and_every_stage_is_shown(smoke: tuple[Path, str]) -> None:
    workdir, output = smoke
    for name in (
        "run.yaml",
        "tokenizer/tokenizer.json",
        "data/train/manifest.json",
        "export/model.safetensors",
        "report.html",
    ):
        assert (workdir / name).is_file(), name
    for stage in ("1/8 corpus", "4/8 train", "5/8 resume", "8/8 report", "peak memory"):
        assert stage in output


def test_a_directory_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = rookery("smoke", "--workdir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 12
    assert "holds files that are not an earlier smoke run's" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"resume_max_abs_loss_diff": 1e-9}, "replayed losses differ"),
        ({"resume_max_abs_loss_diff": None}, "no step was replayed"),
        ({"export_max_abs_logit_diff": 1e-4}, "the export's logits differ"),
        ({"eval": {"1": 4.0, "8": 3.96}}, "is not 0.05 below"),
        ({"unigram_entropy": 3.0}, "is not below the unigram entropy"),
    ],
)
def test_each_figure_that_falls_short_fails_the_run(change: dict[str, object], problem: str) -> None:
    good = {
        "resume_max_abs_loss_diff": 0.0,
        "export_max_abs_logit_diff": 0.0,
        "eval": {"1": 4.0, "8": 3.5},
        "mean_recurrence": 8,
        "unigram_entropy": 6.0,
    }
    assert failed_checks(good) == []
    (found,) = failed_checks({**good, **change})
    assert problem in found
