"""The probes of the recurrence: the formulas as they are defined, and what a forward pass leaves in a trace."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.manifest import SHARD_FILE, Manifest
from data_prep.shards import RowReader
from data_prep.world import World
from pipeline.config import load_config
from pipeline.depth_gain import DepthGain
from pipeline.loader import open_training_data
from pipeline.model import RecurrentDepthModel, stream_key
from pipeline.probes import contraction, effective_rank, gram, token_correlation
from pipeline.recurrence import Steps
from pipeline.trace import Trace
from tests.pipeline.small_models import injected, small_batch, small_model
from tests.pipeline.test_golden import EXPECTED, golden_model

# What the reference's own telemetry says of the golden model's pass of 3 + 2 iterations (seal-rg/recurrent-pretraining,
# RavenForCausalLM and its `monitor_module`).
REFERENCE = {
    "hidden_correlation": -0.009599212557077408,
    "token_correlation": -0.008611775934696198,
    "hidden_norm": 5.4288249015808105,
    "state_norm": 5.349220275878906,
    "state_minus_input": 7.95775032043457,
    "state_change": 1.6063951253890991,
    "reference_residual": 0.3010143041610718,
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlation_by_matrix(x: torch.Tensor) -> float:
    """The mean of the S x S matrix of cosines."""
    x = x.double() - x.double().mean(-1, keepdim=True)
    unit = x / x.norm(dim=-1, keepdim=True)
    return float((unit @ unit.transpose(1, 2)).mean()) - 1 / x.shape[1]


@given(st.integers(1, 4), st.integers(1, 40), st.integers(2, 48), st.floats(0, 50), st.integers(0, 2**32))
def test_token_correlation_is_the_mean_of_the_matrix_of_cosines(
    b: int, s: int, h: int, common: float, seed: int
) -> None:
    x = noise(b, s, h, seed=seed) + common * noise(b, 1, h, seed=seed + 1)
    assert float(token_correlation(x)) == pytest.approx(correlation_by_matrix(x), abs=2e-5)


def test_equal_tokens_correlate_fully_and_constant_ones_not_at_all() -> None:
    assert float(token_correlation(noise(2, 1, 16).expand(2, 64, 16))) == pytest.approx(1 - 1 / 64, abs=1e-6)
    assert float(token_correlation(torch.ones(1, 64, 16))) == pytest.approx(-1 / 64, abs=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(5, 16), (40, 12), (600, 300)])
def test_effective_rank_is_the_exponential_of_the_entropy_of_squared_singular_values(tokens: int, width: int) -> None:
    x = noise(3, tokens, width) * torch.linspace(1, 0.01, width)
    spaced = x[0, [i * tokens // 256 for i in range(256)]] if tokens > 256 else x[0]
    shares = torch.linalg.svdvals(spaced.double()).square()
    shares = shares / shares.sum()
    assert effective_rank(gram(x)) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-4)


def test_effective_rank_counts_directions() -> None:
    for directions in (1, 4, 16):
        x = torch.eye(16)[[i % directions for i in range(64)]]
        assert effective_rank(gram(x[None])) == pytest.approx(directions, rel=1e-5)
    assert math.isnan(effective_rank(gram(torch.zeros(1, 4, 4))))
    assert math.isnan(effective_rank(gram(torch.full((1, 4, 4), math.inf))))


def test_contraction_is_the_mean_factor_between_successive_changes() -> None:
    changes = [9.0, 1.0, 50.0, *(0.7**i for i in range(9)), 1e9, 1e9]  # only iterations 4 to 12 count
    assert contraction(changes) == pytest.approx(0.7)
    assert contraction([1.0] * 3 + [2.0, 8.0, 18.0]) == pytest.approx(3.0)
    assert contraction(changes[:5]) is None
    assert contraction([*changes[:6], math.nan]) == math.inf
    assert contraction([1.0] * 5 + [0.0]) == 0.0


def test_changes_of_rounding_size_say_nothing_of_the_contraction() -> None:
    settled = [1.0, 1.0, 1.0, 1e-1, 1e-3, 1e-5, *[1e-7] * 6]
    assert contraction(settled) == pytest.approx(10 ** (-6 / 8))
    assert contraction(settled, floor=1e-6) == pytest.approx(1e-2)
    assert contraction([1.0] * 3 + [1e-7] * 9, floor=1e-6) == 0.0
    assert contraction([1.0] * 3 + [1e-7 * 3**i for i in range(9)], floor=1e-6) == pytest.approx(3.0)
    # A loop whose state no longer moves but for the last bit.
    trace, state = Trace(), noise(1, 4, 16)
    for _ in range(12):
        trace.record(state, state * (1 + 1e-7))
    assert trace.to_record()["contraction"] == 0.0


def run(model: RecurrentDepthModel, ids: torch.Tensor, state: torch.Tensor, steps: Steps) -> dict[str, Any]:
    trace = Trace()
    model(ids, state, steps, ids.roll(-1, 1), trace).backward()
    return trace.to_record()


def test_the_references_telemetry_agrees() -> None:
    trace = Trace()
    golden_model()(EXPECTED["input_ids"], EXPECTED["initial_state"], (3, 2), EXPECTED["labels"], trace)
    record = trace.to_record()
    assert {name: record[name] for name in REFERENCE} == pytest.approx(REFERENCE, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("variant", [{}, {"injection": "diagonal"}, {"block": "pre_norm", "injection": "add"}])
def test_a_trace_says_what_the_loop_did(variant: dict[str, Any]) -> None:
    model, ids = small_model(1, **variant), small_batch(2)
    state = model.initial_state(torch.arange(2), 12)
    record = run(model, ids, state, (5, 3))
    states = [state.double()]
    with torch.no_grad():
        embedded = model._embed(ids, model._positions(ids, None))
        for _ in range(8):
            state = injected(model, state, embedded)
            for block in model.transformer.recurrence.core_block:
                state = block(state, model._positions(ids, None))
            states.append(state.double())
        readout = model.transformer.readout
        after = model.transformer.ln_f(state if readout is None else readout(state)).double()
    changes = [float((b - a).norm()) for a, b in pairwise(states)]
    expected = {
        "initial_rms": float(states[0].square().mean().sqrt()),
        "injected_rms": float(embedded.double().square().mean().sqrt()),
        "first_jump": float(states[1].norm() / states[0].norm()),
        "contraction": math.exp((math.log(changes[7]) - math.log(changes[3])) / 4),
        "token_correlation": correlation_by_matrix(after),
        "state_norm": float(after.norm(dim=-1).mean()),
        "state_minus_input": float((after - embedded).norm(dim=-1).mean()),
        "state_change": float((after - states[-2]).norm(dim=-1).mean()),
        "reference_residual": float(((after - states[-2]).norm(dim=-1) / after.norm(dim=-1)).mean()),
        "effective_rank": effective_rank(gram(state)),
    }
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert record["state_rms"] == pytest.approx([float(s.square().mean().sqrt()) for s in states[1:]], rel=1e-5)
    residuals = [float(((b - a).norm(dim=-1) / b.norm(dim=-1)).mean()) for a, b in pairwise(states)]
    assert record["relative_residual"] == pytest.approx(residuals, rel=1e-4)


def test_of_unequal_sequences_a_trace_follows_the_deepest() -> None:
    model, ids = small_model(1), small_batch(4)
    state = model.initial_state(torch.arange(4), 12)
    together = run(model, ids, state, [(0, 2), (4, 3), (1, 3), (4, 3)])
    alone = run(model, ids[[1, 3]], state[[1, 3]], (4, 3))
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_trace_changes_no_bit_and_measures_bf16_in_float32() -> None:
    model, ids = small_model(1), small_batch(2)
    state = model.initial_state(torch.arange(2), 12)
    exact = run(model, ids, state, (2, 3))
    traced = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(ids, state, (2, 3), ids.roll(-1, 1)).backward()
    for with_trace, without in zip(traced, (parameter.grad for parameter in model.parameters()), strict=True):
        assert with_trace is not None
        assert without is not None
        assert torch.equal(with_trace, without)
    trace = Trace()
    model.bfloat16()(ids, state.bfloat16(), (2, 3), ids.roll(-1, 1), trace)
    assert all(value.dtype == torch.float32 for value in [*trace.scalars.values(), *trace.changes])
    assert trace.to_record()["state_rms"] == pytest.approx(exact["state_rms"], rel=1e-2)


@pytest.mark.parametrize("policy", ["iteration", "block", "selective"])
def test_what_is_computed_again_is_not_measured_again(policy: str) -> None:
    model, ids = small_model(1), small_batch(2)
    state = model.initial_state(torch.arange(2), 12)
    plain = run(model, ids, state, (2, 3))
    model.transformer.recurrence.activation_checkpointing = policy
    again = run(model, ids, state, (2, 3))
    assert again.keys() == plain.keys()
    for name, value in plain.items():
        assert again[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_forward_pass_with_a_trace_never_waits_for_the_device() -> None:
    model = small_model().to("meta")
    ids, state = torch.zeros(2, 12, dtype=torch.int64, device="meta"), torch.zeros(2, 12, 16, device="meta")
    trace = Trace()
    model(ids, state, (1, 2), ids, trace)  # to read a tensor that has no data is an error
    assert len(trace.state_rms) == 3


def test_the_depth_gain_is_of_the_first_row_of_the_validation_data(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workdir)
    config = load_config("test.yaml")
    model = RecurrentDepthModel(config.model)
    model.init_weights(0, 4.0)
    engine = SimpleNamespace(module=model, zero_optimization_stage=lambda: 0)
    gain = DepthGain(config, open_training_data(config), World(), torch.device("cpu")).measure(engine)

    reader = RowReader(Path("data/validation"), Manifest.load(Path("data/validation")))
    row = torch.from_numpy(reader.row(0).astype("int64"))[None]
    reader.close()
    state = model.initial_state(torch.tensor([stream_key(config.seed, "evaluation", 0)]), 32)
    with torch.no_grad():
        logits = [model(row[:, :-1], state, (depth, 0)).flatten(0, 1) for depth in (1, 4)]
    shallow, deep = (float(torch.nn.functional.cross_entropy(each, row[0, 1:])) for each in logits)
    assert gain == pytest.approx({"shallow": shallow, "deep": deep, "depth": 4}, rel=1e-5)

    # A run that never validates may do without the shards of its validation data.
    shutil.copytree(Path("data/validation"), "bare")
    next(Path("bare").rglob(SHARD_FILE)).unlink()
    config.data.validation = str(workdir / "bare")
    other = DepthGain(config, open_training_data(config), World(), torch.device("cpu")).measure(engine)
    assert other["shallow"] != gain["shallow"]
    assert other["shallow"] == pytest.approx(gain["shallow"], abs=0.5)
