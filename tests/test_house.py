"""House rules that no linter knows. Each rule is a function from a file to its offences, so that it is tested too."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("benchmarks", "data_prep", "kernels", "monitoring", "pipeline", "rookery", "slurm", "tests")
TEXT_SUFFIXES = {"", ".cfg", ".ini", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
VENDOR = re.compile(r"nvidia-smi|rocm-smi|amd-smi|\bpynvml\b|\bamdsmi\b|torch\.cuda\.|torch\.version\.|\.cuda\(\)")
UNSAFE_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
REGISTRY = re.compile(
    r"https?://\S*(pypi|hosted\.org|npm|conda|deb\.|/simple\b|/wheels?\b)|--(extra-)?index-url|--find-links"
)


def _python_files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def _text_files() -> list[Path]:
    top = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for folder in (*ROOMS, "docs", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in top + below if path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts)


def _long_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines (at most {MAX_FUNCTION_LINES})"


def _unsafe_loads(source: str) -> Iterator[str]:
    """Everything that could run code found in a file: unpickling, and torch.load or numpy.load that may unpickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in UNSAFE_MODULES:
                    yield f"{node.lineno}: imports {module}"
        elif isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            is_true = {name: isinstance(value, ast.Constant) and value.value is True for name, value in given.items()}
            if ast.unparse(node.func) == "torch.load" and not is_true.get("weights_only"):
                yield f"{node.lineno}: torch.load without weights_only=True"
            if is_true.get("allow_pickle"):
                yield f"{node.lineno}: allow_pickle=True"


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if found := pattern.search(line):
            yield f"{number}: {found.group()}"


def _report(path: Path, offences: Iterator[str]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{offence}" for offence in offences]


def test_files_are_short_and_none_is_a_drawer_for_odds_and_ends() -> None:
    files = _python_files()
    assert files
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert not [path for path in lengths if path.stem in {"utils", "util", "helpers", "misc"}]


def test_functions_are_short() -> None:
    assert not [line for path in _python_files() for line in _report(path, _long_functions(path.read_text()))]


def test_only_the_accelerator_module_knows_the_vendors() -> None:
    exempt = {ROOT / "pipeline" / "accelerator.py", Path(__file__).resolve()}
    files = [path for path in _python_files() if path not in exempt]
    assert not [line for path in files for line in _report(path, _matches(VENDOR, path.read_text()))]


def test_nothing_unpickles() -> None:
    # An unpickler that finds plain data and our own records and no other name, and the attacks on it.
    exempt = {ROOT / "pipeline" / "gloo_control.py", ROOT / "tests" / "pipeline" / "test_launch.py"}
    files = [path for path in _python_files() if path not in exempt]
    assert not [line for path in files for line in _report(path, _unsafe_loads(path.read_text()))]


def test_no_file_names_a_package_registry() -> None:
    files = [path for path in _text_files() if path != Path(__file__).resolve()]
    assert not [line for path in files for line in _report(path, _matches(REGISTRY, path.read_text()))]


def test_sources_are_ascii() -> None:
    files = [path for path in _python_files() if "tests" not in path.relative_to(ROOT).parts]
    assert not [path.relative_to(ROOT) for path in files if not path.read_text().isascii()]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_the_unpickling_rule_sees(source: str) -> None:
    assert list(_unsafe_loads(source))


def test_the_unpickling_rule_lets_safe_loads_pass() -> None:
    assert not list(_unsafe_loads("import torch\ntorch.load('x', weights_only=True)"))


def test_the_length_rule_counts_every_line_of_a_function() -> None:
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert not list(_long_functions("def f():\n" + body))
    assert list(_long_functions("def f():\n" + body + "    y = 2\n"))


def test_the_pattern_rules_see() -> None:
    assert list(_matches(VENDOR, "subprocess.run(['nvidia-smi'])\n"))
    assert list(_matches(VENDOR, "torch.cuda.synchronize()"))
    assert list(_matches(REGISTRY, "pip install --extra-index-url somewhere"))
    assert list(_matches(REGISTRY, "https://example.org/simple/torch"))
    assert not list(_matches(REGISTRY, "https://arxiv.org/abs/2502.05171"))


@pytest.mark.parametrize(
    ("ci", "outcome"),
    [(True, "1 failed, 1 passed, 2 errors"), (False, "1 passed, 3 skipped")],
    ids=["ci", "elsewhere"],
)
def test_a_skip_fails_the_run_in_ci_and_shows_its_reason(tmp_path: Path, ci: bool, outcome: str) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -rsfE --continue-on-collection-errors\n")
    for name, text in {
        "mark": "@pytest.mark.skip(reason='no mark')\ndef test_a(): ...\n",
        "call": "def test_a(): pytest.skip('no call')\n",
        "module": "pytest.skip('no module', allow_module_level=True)\n",
        "plain": "def test_a(): ...\n",
    }.items():
        (tmp_path / f"test_{name}.py").write_text("import pytest\n" + text)
    env = {name: value for name, value in os.environ.items() if name != "CI"} | ({"CI": "true"} if ci else {})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "."]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert outcome in run.stdout.splitlines()[-1], run.stdout
    assert (run.returncode != 0) == ci
    assert all(f"no {reason}" in run.stdout for reason in ("mark", "call", "module")), run.stdout
