"""The commands of README.md, CONTRIBUTING.md and docs/ are run here as a reader would type them.

A fenced block marked `sh` runs in one bash that stops at the first failing command; the blocks of one document share
an empty working directory and run in order, so that a tutorial builds on itself. `sh make` holds `make` commands,
which CI runs itself, and `sh needs=NAME` what only another machine can do; both are checked without running them.

The `rookery` of the tests is forked from a process that has imported everything; all else is as for a reader.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.fork_server import fork_server

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK_SECONDS = 400

# What a `needs=` block may ask for, and why no test can give it.
NEEDS = {
    "slurm": "a SLURM cluster",
    "gpu": "an accelerator",
    "git": "a clone from wherever the reader finds the project",
}
# Targets that documents name and .ci/run does not: the reason that this is enough.
COVERED = {
    "soak": "hours long",
    "bench": "timings on a machine of one's own",
    "clean": "removes the environment that the tests run in",
    "help": "prints the list",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins (`README.md:12`), its info string and its text."""

    where: str
    info: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    """Fenced blocks of a Markdown file in order, dedented by their fence; an unclosed fence is an error."""
    blocks: list[Block] = []
    opened: tuple[int, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"(\s*)(?:```+|~~~+)\s*(.*)$", line)
        if opened is None and fence:
            opened, lines = (number, fence[1], fence[2].strip()), []
        elif opened is not None and fence and not fence[2]:
            blocks.append(Block(f"{document.name}:{opened[0]}", opened[2], "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            lines.append(line.removeprefix(opened[1]))
    if opened is not None:
        raise AssertionError(f"{document.name}:{opened[0]}: this fence is never closed")
    return blocks


def run_block(block: Block, directory: Path) -> None:
    """Runs a block; fails the test with its place and output if a command fails or time runs out."""
    path = (str(fork_server().programs()), str(Path(sys.executable).parent), os.environ["PATH"])
    env = os.environ | {"PATH": os.pathsep.join(path)}
    output = directory.with_suffix(".output")
    with output.open("w") as sink:
        # A session of its own, so that ranks and servers that a block left behind end with it.
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=BLOCK_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"no end after {BLOCK_SECONDS} s"
        finally:
            _end_session(process)
    if status != 0:
        printed = output.read_text(errors="replace")[-8000:]
        pytest.fail(f"{block.where}: exit {status}\n{block.text}--- output ---\n{printed}", pytrace=False)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def check_make_block(block: Block) -> None:
    """Every line is `make TARGET [NAME=VALUE]`, of a target that exists and that CI runs (or COVERED says why not)."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    in_ci = set(re.findall(r"\bmake ([a-z]+)", (ROOT / ".ci" / "run").read_text()))
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "make", f"{block.where}: a `sh make` block holds only make commands, not {line!r}"
        for target in (word for word in words[1:] if "=" not in word):
            assert target in targets, f"{block.where}: the Makefile has no target {target!r}"
            assert target in in_ci | COVERED.keys(), f"{block.where}: neither .ci/run nor COVERED has {target!r}"


def check_needs_block(block: Block, name: str) -> None:
    """The need is one that NEEDS explains, and the block is at least valid bash."""
    assert name in NEEDS, f"{block.where}: unknown need {name!r}; add it to NEEDS with a reason"
    syntax = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True, check=False)
    assert syntax.returncode == 0, f"{block.where}: {syntax.stderr}"


def check_document(document: Path, directory: Path) -> None:
    """Runs or checks every shell block of a document, as its info string says."""
    directory.mkdir()
    for block in blocks_of(document):
        language, *marks = block.info.split() or [""]
        assert language not in {"bash", "shell", "console", "zsh"}, f"{block.where}: mark it `sh`, so that it is tested"
        if language != "sh":
            continue
        match marks:
            case []:
                run_block(block, directory)
            case ["make"]:
                check_make_block(block)
            case [mark] if mark.startswith("needs="):
                check_needs_block(block, mark.removeprefix("needs="))
            case _:
                pytest.fail(f"{block.where}: unknown mark {block.info!r}")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of(document: Path, tmp_path: Path) -> None:
    check_document(document, tmp_path / "reader")


def _document(folder: Path, *blocks: tuple[str, str]) -> Path:
    path = folder / "page.md"
    path.write_text("\n".join(f"Text.\n\n```{info}\n{text}\n```\n" for info, text in blocks))
    return path


def test_blocks_share_their_directory_and_run_in_order(tmp_path: Path) -> None:
    page = _document(
        tmp_path, ("sh", "echo one > a\nexport X=1"), ("python", "1 / 0"), ("sh", 'cat a; [ -z "${X:-}" ]')
    )
    check_document(page, tmp_path / "reader")
    assert (tmp_path / "reader" / "a").read_text() == "one\n"


def test_the_environment_of_the_tests_comes_first_on_the_path(tmp_path: Path) -> None:
    page = _document(tmp_path, ("sh", f'[ "$(command -v python)" = "{Path(sys.executable).parent}/python" ]'))
    check_document(page, tmp_path / "reader")


@pytest.mark.parametrize(
    "commands", ["echo broken >&2; exit 3", "echo broken; false; echo on", "echo broken; false | cat"]
)
def test_a_failing_command_shows_its_place_and_output(tmp_path: Path, commands: str) -> None:
    page = _document(tmp_path, ("sh", "true"), ("sh", commands))
    with pytest.raises(pytest.fail.Exception, match=r"(?s)page\.md:9: exit .*--- output ---\nbroken\n"):
        check_document(page, tmp_path / "reader")


def test_what_a_block_leaves_running_ends_with_it(tmp_path: Path) -> None:
    page = _document(tmp_path, ("sh", "sleep 600 & echo $! > pid"))
    check_document(page, tmp_path / "reader")
    status = Path("/proc") / (tmp_path / "reader" / "pid").read_text().strip() / "status"
    end = time.monotonic() + 10
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ("bash", "true"),
        ("sh later", "true"),
        ("sh make", "make nonsense"),
        ("sh make", "make setup && rm -r x"),
        ("sh make", "rookery smoke"),
        ("sh needs=luck", "true"),
        ("sh needs=slurm", "if true"),
    ],
)
def test_a_block_that_would_escape_the_tests_is_refused(tmp_path: Path, info: str, text: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_document(_document(tmp_path, (info, text)), tmp_path / "reader")


def test_an_unclosed_fence_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\ntrue\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: .* never closed"):
        blocks_of(page)
