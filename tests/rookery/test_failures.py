"""How the command line says that something failed."""

from __future__ import annotations

import pytest

from pipeline.errors import RunError
from rookery.cli import _report_failure
from rookery.display import evaluation_table


def test_a_run_that_cannot_go_on_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report_failure(RunError("runs/one: the probe batch has another loss")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rookery: runs/one: the probe batch has another loss (")
    assert "failure-*.json" in line


def test_what_nobody_foresaw_is_shown_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report_failure(RuntimeError("odd")) == 1
    assert "RuntimeError: odd" in capsys.readouterr().err


def test_a_path_is_not_broken_over_the_lines_of_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "runs/with-a-long-name/checkpoints/step-00000100"
    evaluation_table({"checkpoint": path, "evaluated_tokens": 1000, "loss": {"1": 2.0}, "relative_residual": [0.1]})
    assert f"{path} on 1,000 tokens" in capsys.readouterr().out
