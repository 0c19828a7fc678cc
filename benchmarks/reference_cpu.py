"""Training tokens a second on CPU: our model against the reference's own code.

Same shape, weights, tokens, initial state, depth, checkpointing of each iteration, AdamW; one process each, which take
turns, so that what disturbs the machine disturbs all. The reference's code is not part of this repository: DIR holds
its raven_modeling_minimal.py and raven_config_minimal.py (recpre/ of seal-rg/recurrent-pretraining), and PYTHON is an
interpreter with torch and a transformers that it works with (4.52 or 4.57).
    python -m benchmarks.reference_cpu --reference DIR --reference-python PYTHON [--bf16] [--policy none]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "narrow": {"n_embd": 256, "n_heads": 4, "intermediate_size": 768, "vocab_size": 4096, "block_size": 256},
    "wide": {"n_embd": 768, "n_heads": 12, "intermediate_size": 2560, "vocab_size": 8192, "block_size": 512},
}
LAYERS = {"n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1}
ROWS = 2
CASES = ("reference", "reference compiled", "rookery", "rookery compiled")


def main() -> None:
    options = _options()
    if options.worker is not None:
        _work(options)
        return
    from benchmarks.harness import in_turn, machine, median, publish, ratio

    workers = {case: _start(case, options) for case in options.cases}
    losses = {case: _ask(worker)["loss"] for case, worker in workers.items()}  # compiles, too
    seconds = in_turn({case: functools.partial(_seconds, worker) for case, worker in workers.items()}, options.rounds)
    for worker in workers.values():
        worker.communicate()
    tokens = ROWS * SHAPES[options.shape]["block_size"]
    first = options.cases[0]
    table = [
        [case, f"{tokens / median(times):.0f}", f"{ratio(seconds[first], times):.2f}", f"{losses[case]:.5f}"]
        for case, times in seconds.items()
    ]
    title = (
        f"{options.shape} ({SHAPES[options.shape]['n_embd']} wide), {ROWS} x"
        f" {SHAPES[options.shape]['block_size']} tokens,"
        f" n = {options.n}, k = {options.k}, policy {options.policy}, {'bf16' if options.bf16 else 'fp32'},"
        f" {options.threads} threads"
    )
    header = ("model", "tokens/s", f"over {first}", "first loss")
    record = {
        "machine": machine("torch"),
        "seconds": seconds,
        "losses": losses,
        "shape": SHAPES[options.shape] | LAYERS,
    }
    publish(options.out, title, header, table, record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR")
    parser.add_argument("--reference-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--out", "--json", type=Path, default=Path("runs/benchmarks/reference_cpu.json"))
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--policy", choices=("none", "iteration"), default="iteration")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--bf16", action="store_true", help="weights and activations in bf16")
    for name, value in {"rounds": 7, "n": 8, "k": 4, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _start(case: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    python = options.reference_python if case.startswith("reference") else sys.executable
    command = [python, "-m", "benchmarks.reference_cpu", "--reference", str(options.reference), "--worker", case]
    for name in ("shape", "policy", "n", "k", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--bf16"] if options.bf16 else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    answer: dict[str, float] = json.loads(worker.stdout.readline())
    return answer


def _seconds(worker: subprocess.Popen[str]) -> float:
    return _ask(worker)["seconds"]


def _work(options: argparse.Namespace) -> None:
    """Answer every line with one training step: its loss and seconds."""
    torch.set_num_threads(options.threads)
    build = _reference if options.worker.startswith("reference") else _rookery
    loss_of, model = build(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        print(json.dumps({"loss": float(loss.detach()), "seconds": time.perf_counter() - started}), flush=True)


def _inputs(options: argparse.Namespace) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return our model, in which both have their weights, tokens and initial state."""
    from pipeline.model import ModelConfig, RecurrentDepthModel

    shape: dict[str, Any] = SHAPES[options.shape]
    model = RecurrentDepthModel(ModelConfig(**(shape | LAYERS)), activation_checkpointing=options.policy)
    model.init_weights(0, 8)
    if options.bf16:
        model.bfloat16()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape["vocab_size"], (ROWS, shape["block_size"]), generator=generator)
    return model, ids, model.initial_state(torch.arange(ROWS), shape["block_size"])


def _rookery(options: argparse.Namespace) -> tuple[Any, torch.nn.Module]:
    from pipeline.compilation import compile_core

    model, ids, state = _inputs(options)
    if options.worker.endswith("compiled"):
        compile_core(model)
    return lambda: model(ids, state, (options.n, options.k), ids.roll(-1, 1)), model


def _reference(options: argparse.Namespace) -> tuple[Any, torch.nn.Module]:
    ours, ids, state = _inputs(options)
    sys.path.insert(0, str(options.reference.absolute().parent))
    package = options.reference.name
    RavenConfig = importlib.import_module(f"{package}.raven_config_minimal").RavenConfig  # noqa: N806
    modeling = importlib.import_module(f"{package}.raven_modeling_minimal")
    model = modeling.RavenForCausalLM(RavenConfig(**SHAPES[options.shape], **LAYERS, n_layers=4))
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) <= {"freqs_cis", "lm_head.weight"}, missing
    assert not unexpected, unexpected
    if options.bf16:
        table = model.freqs_cis
        model.bfloat16()
        model.freqs_cis = table
    model.train()
    model.gradient_checkpointing = options.policy == "iteration"
    if options.worker.endswith("compiled"):
        for block in (*model.transformer.prelude, *model.transformer.core_block, *model.transformer.coda):
            block.compile()
    num_steps = torch.tensor([options.n, options.k])
    details = dict.fromkeys(("return_logits", "return_latents", "return_head", "return_stats"), False)

    def loss_of() -> torch.Tensor:
        output = model(ids, input_states=state, labels=ids.roll(-1, 1), num_steps=num_steps, output_details=details)
        loss: torch.Tensor = output.loss
        return loss

    return loss_of, model


if __name__ == "__main__":
    main()
