"""`rookery watch`: what it prints, how it ends, and its screen on terminals of any size."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from monitoring.reading.run_reader import RunReader
from monitoring.standing import standing
from rookery.screen import picture
from tests.monitoring.sample_run import build_long_run, build_run

COMMAND = [sys.executable, "-m", "rookery", "watch"]
NOW = 1_800_000_200.0


def test_the_address_it_prints_is_the_page_and_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    run = build_run(tmp_path / "night-run")
    process = subprocess.Popen([*COMMAND, run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(6)]
    url = next(line for line in lines if line.startswith("http://127.0.0.1:"))
    with urllib.request.urlopen(url) as answer:
        assert "night-run" in answer.read().decode()
    port = url.split(":")[2].split("/")[0]
    assert any(f"ssh -N -L {port}:127.0.0.1:{port} " in line for line in lines)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == 0


def test_without_torch_one_json_object_says_how_it_stands(tmp_path: Path) -> None:
    script = (
        "import sys; from rookery.cli import main; code = main();"
        " sys.exit(code or ' '.join({'torch', 'deepspeed', 'plotly'} & set(sys.modules)) or 0)"
    )
    command = [sys.executable, "-c", script, "watch", "--json", str(build_run(tmp_path / "run"))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["run"], answer["state"], answer["step"]) == ("run", "finished", 100)


def test_a_missing_run_is_bad_input(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, tmp_path / "nowhere"], check=False, capture_output=True, text=True)
    assert done.returncode == 12
    assert done.stderr.startswith(f"rookery: no run directory {tmp_path / 'nowhere'}")


@pytest.mark.parametrize(("width", "height"), [(30, 12), (80, 24), (200, 60)])
def test_the_screen_fits_any_terminal(tmp_path: Path, width: int, height: int) -> None:
    shown = _screen(build_long_run(tmp_path / "run", steps=2000), width, height)
    assert max(map(len, shown.splitlines())) <= width
    for word in ("finished", "2,000", "recurrence", "correlation", "slow nodes", "node007", "incidents", "rollback"):
        assert word in shown, shown


def test_the_screen_of_a_run_without_anything_yet(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    shown = _screen(tmp_path, 80, 24)
    assert "no loss logged yet" in shown
    assert "none yet" in shown


def _screen(run: Path, width: int, height: int) -> str:
    reader = RunReader(run)
    reader.poll(64 << 20)
    view = reader.view(NOW)
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(picture(view, standing(run, view, NOW), NOW, None, width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
