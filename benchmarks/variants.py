"""Does the loss of the smoke model fall with every injection, sampler, optimizer and scope?

Trains the smoke configuration for a few steps, each variant from the same weights on the same samples, through the
command line. The corpus is Python's own standard library.
    python -m benchmarks.variants
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from benchmarks.harness import arguments, machine, publish
from data_prep.build import build_dataset
from data_prep.manifest import Manifest
from data_prep.tokenizer import save_tokenizer, train_tokenizer
from data_prep.world import World
from monitoring.runlog import read_metrics

VOCABULARY, LENGTH = 4096, 128
VARIANTS: dict[str, dict[str, list[str]]] = {
    "injection": {
        "concat": [],
        "add": ["model.injection=add"],
        "diagonal": ["model.injection=diagonal"],
        "gate": ["model.injection=gate"],
    },
    "block": {
        "pre_norm": ["model.block=pre_norm"],
        "parameter_free_sandwich": ["model.block=parameter_free_sandwich"],
    },
    "sampler": {
        "lognormal_poisson": [],
        "geometric": ["depth.sampler=geometric"],
        "sobol": ["depth.sampler=sobol"],
    },
    "optimizer": {
        "adamw": [],
        "ellis_adam": ["optimizer.kind=ellis_adam", "optimizer.eps=1e-6"],
        "muon": ["optimizer.kind=muon", "optimizer.muon.learning_rate=0.02"],
    },
    "scope": {
        "lockstep": [],
        "balanced": ["depth.scope=balanced"],
        "per_sequence": ["depth.scope=per_sequence"],
    },
}
WINDOW = 10


def main() -> None:
    options = arguments(__doc__ or "", steps=100)
    table, record = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        entropy = prepare(root)
        done: dict[tuple[str, ...], list[float] | str] = {}
        for kind, variants in VARIANTS.items():
            for name, overrides in variants.items():
                key = tuple(overrides)
                if key not in done:
                    done[key] = train(root, f"run-{len(done)}", options.steps, overrides)
                record[f"{kind}: {name}"] = done[key]
                table.append([kind, name, *judge(done[key])])
    title = f"Loss in nats over {options.steps} steps of the smoke model; the tokens' unigram entropy is {entropy:.2f}"
    header = ("variant of", "variant", f"first {WINDOW} steps", f"last {WINDOW} steps", "falls")
    publish(options.out, title, header, table, {"machine": machine("torch", "deepspeed"), "losses": record})


def prepare(root: Path) -> float:
    """Build the tokenizer and the datasets that the smoke configuration names; return the unigram entropy."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = (path.read_text(encoding="utf-8") for path in sorted((library / "asyncio").glob("*.py")))
    save_tokenizer(train_tokenizer(texts, VOCABULARY), root / "tokenizer")
    train_inputs = [library / name for name in ("asyncio", "email", "unittest", "multiprocessing", "importlib")]
    build_dataset(train_inputs, root / "tokenizer", LENGTH, root / "data/train", World())
    build_dataset([library / "json"], root / "tokenizer", LENGTH, root / "data/validation", World())
    return Manifest.load(root / "data/train").unigram_entropy


def train(root: Path, run_dir: str, steps: int, overrides: list[str]) -> list[float] | str:
    """Return the loss of every step, or the message of a run that failed."""
    command = [sys.executable, "-m", "rookery", "train", "smoke", f"run_dir={run_dir}", f"train.steps={steps}"]
    finished = subprocess.run([*command, *overrides], cwd=root, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        return finished.stderr.strip().splitlines()[-1] if finished.stderr.strip() else f"exit {finished.returncode}"
    return [record["loss"] for record in read_metrics(root / run_dir)]


def judge(losses: list[float] | str) -> list[str]:
    if isinstance(losses, str):
        return ["", "", f"no: {losses}"]
    first, last = sum(losses[:WINDOW]) / WINDOW, sum(losses[-WINDOW:]) / WINDOW
    return [f"{first:.3f}", f"{last:.3f}", "yes" if last < first - 0.5 else "no"]


if __name__ == "__main__":
    main()
