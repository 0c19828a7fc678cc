"""What readers need of a run's configuration, which may be missing or broken; and what makes a directory a run."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from monitoring.runlog import RunLogError, attempts

FILE = "run.yaml"
_MOST_BYTES = 1 << 20
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def require_run(run_dir: Path) -> None:
    """Refuse a directory that is not that of a run, started or only submitted.

    Raises:
        RunLogError: it is none, or cannot be looked into.
    """
    try:
        names = {path.name for path in run_dir.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        names = set()
    except OSError as error:
        raise RunLogError(f"{run_dir} cannot be read: {error.strerror}; ask its owner for access") from None
    if not names & {FILE, "attempts", "metrics"}:
        raise RunLogError(
            f"no run directory {run_dir}: name the one that `rookery submit` or `rookery train` wrote (run_dir=...)"
        )
    attempts(run_dir)


def read_config(run_dir: Path) -> tuple[str, str | None]:
    """Return the text of run.yaml, empty if there is none, and what is wrong with it, None if nothing is."""
    try:
        with (run_dir / FILE).open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return "", None
    except OSError as error:
        return "", f"{FILE} cannot be read: {error.strerror or error}"
    return text, _parsed(text)[1]


def planned_steps(text: str) -> int | None:
    """Return train.steps of the text of run.yaml; None if it does not say."""
    return _parsed(text)[0]


def beyond_plan(step: int | None, planned: int | None) -> list[str]:
    """Return what is to be said of a newest step that is behind the last one planned."""
    if step is None or planned is None or step <= planned:
        return []
    return [f"step {step:,} is beyond the {planned:,} that {FILE} plans: the log or {FILE} is of another run"]


@lru_cache(maxsize=8)
def _parsed(text: str) -> tuple[int | None, str | None]:
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - C's safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        return None, f"{FILE} is broken{place}: {getattr(error, 'problem', None) or error}"
    if not isinstance(tree, dict):
        return None, f"{FILE} is broken: it holds no settings"
    train = tree.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if type(steps) is int else None, None
