"""The shapes that ship, the variants, the initial weights and states, and what the loop shows of itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.blocks import PreNormBlock
from pipeline.config import CONFIGS
from pipeline.errors import ConfigError
from pipeline.injection import DiagonalInjection
from pipeline.model import (
    ModelConfig,
    RecurrentDepthModel,
    build_meta_model,
    count_parameters,
    decays,
    reference_name,
    reference_problem,
)
from pipeline.objective import ObjectiveConfig
from pipeline.trace import Trace
from tests.pipeline.small_models import SMALL, plain_logits, small_batch, small_config, small_model

VARIANTS: list[dict[str, Any]] = [
    *({"injection": kind} for kind in ("concat", "add", "gate", "diagonal")),
    *({"block": kind} for kind in ("pre_norm", "parameter_free_sandwich")),
    *({"state_init": kind} for kind in ("zero", "unit")),
    {"prelude_norm": True},
    {"injection": "diagonal", "prelude_norm": False},
    {"scale_embedding": False},
    {"tie_embeddings": False},
    {"block": "parameter_free_sandwich", "injection": "add", "scale_embedding": False},
]


def preset(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((CONFIGS / "models" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny", 856_416),
        ("huginn-150m", 151_032_832),
        ("huginn-1b", 941_222_400),
        ("huginn-3.5b", 3_564_976_800),
        # Without the adapter and the blocks' norms: the number in the reference's registry.
        ("huginn-3.5b-bad-run-1", 3_509_051_040),
        # Two norms fewer in each of the eight blocks.
        ("huginn-3.5b-bad-run-2", 3_564_976_800 - 8 * 2 * 5280),
    ],
)
def test_shipped_shapes_have_their_parameter_counts(name: str, parameters: int) -> None:
    model = build_meta_model(preset(name))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert count_parameters(model) == parameters


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_is_its_definition_and_trains(changes: dict[str, Any]) -> None:
    model, ids = small_model(**changes), small_batch(2)
    state = model.initial_state(torch.arange(2), 12)
    torch.testing.assert_close(model(ids, state, (1, 2)), plain_logits(model, ids, state, 1, 2), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(ids, state, (1, 2), ids.roll(-1, 1))
    first.backward()
    # A single iteration from zero gives the state's half of the adapter nothing; here there are three.
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    assert float(model(ids, state, (1, 2), ids.roll(-1, 1)).detach()) < float(first.detach())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_runs_in_bf16(changes: dict[str, Any], autocast: bool) -> None:
    """With weights in bf16, as under ZeRO, and with those in float32 under autocast; sequences of their own depths."""
    full, ids, depths = small_model(**changes), small_batch(3), [(2, 2), (0, 1), (1, 2)]
    low = small_model(**changes, objective=ObjectiveConfig(jacobian_penalty=0.1))
    low = low if autocast else low.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = low(ids, low.initial_state(torch.arange(3), 12), depths, ids.roll(-1, 1))
    loss.backward()
    full(ids, full.initial_state(torch.arange(3), 12), depths, ids.roll(-1, 1))
    torch.testing.assert_close(low.cross_entropy, full.cross_entropy, rtol=1e-2, atol=0.0)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in low.parameters())


def test_pre_norm_leaves_the_residual_stream_alone() -> None:
    block = small_model(block="pre_norm").transformer.prelude[0]
    assert isinstance(block, PreNormBlock)
    torch.nn.init.zeros_(block.attn.proj.weight)
    torch.nn.init.zeros_(block.mlp.proj.weight)
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0)) * 7
    assert torch.equal(block(x, small_model()._positions(small_batch(1), None)), x)


def test_parameter_free_norms_have_no_weights_and_pin_the_state() -> None:
    model, ids = small_model(block="parameter_free_sandwich"), small_batch(1)
    assert not [name for name in model.state_dict() if "norm_" in name]
    state = model.latent(ids, model.initial_state(torch.arange(1), 12) * 50, (0, 1))
    torch.testing.assert_close(state.pow(2).mean(-1), torch.ones(1, 12), rtol=1e-4, atol=0.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-6, 3, width=32), min_size=2, max_size=2))
def test_the_diagonal_injection_never_grows_the_state(rates: list[float]) -> None:
    injection = DiagonalInjection(4)
    torch.nn.init.constant_(injection.delta, rates[0])
    torch.nn.init.constant_(injection.A_log, rates[1])
    decay = injection.decay()
    assert (decay > 0.0).all()
    assert (decay < 1.0).all()
    expected = math.exp(-math.log1p(math.exp(rates[0])) * math.exp(rates[1]))
    torch.testing.assert_close(decay, torch.full((4,), expected))
    state = torch.randn(1, 3, 4)
    assert (injection(state, torch.zeros(1, 3, 4)).abs() <= state.abs()).all()


def test_documents_are_as_if_each_were_alone_in_its_row() -> None:
    model, ids = small_model(), small_batch(2)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [7] * 3, [3] * 12])
    state = model.initial_state(torch.arange(2), 12)
    logits = model(ids, state, (0, 3), documents=documents)
    for row, piece in ((0, slice(0, 5)), (0, slice(5, 9)), (0, slice(9, 12)), (1, slice(0, 12))):
        alone = model(ids[row : row + 1, piece], state[row : row + 1, piece], (0, 3))
        torch.testing.assert_close(logits[row : row + 1, piece], alone)
    assert not torch.allclose(logits[0, 5:], model(ids, state, (0, 3))[0, 5:], atol=1e-3)


def test_a_trace_follows_the_loop_without_touching_it() -> None:
    model = small_model()
    ids = torch.arange(12)[None]
    state = model.initial_state(torch.tensor([7]), 12)
    trace = Trace(keep=frozenset({2, 5}))
    traced = model(ids, state, (3, 2), trace=trace)
    torch.testing.assert_close(traced, model(ids, state, (3, 2)), rtol=0, atol=0)
    assert len(trace.state_rms) == len(trace.relative_residual) == 5
    assert set(trace.states) == {2, 5}
    torch.testing.assert_close(model.logits(trace.states[2]), model(ids, state, (0, 2)), rtol=0, atol=0)
    last, before = trace.states[5], model.latent(ids, state, (4, 0))
    expected = ((last - before).norm(dim=-1) / last.norm(dim=-1)).mean()
    torch.testing.assert_close(trace.relative_residual[-1], expected)


def test_initial_states_are_what_they_are_called() -> None:
    keys = torch.arange(64)
    truncated, zero, unit = (
        small_model(state_init=kind, n_embd=64).initial_state(keys, 12) for kind in ("truncated_normal", "zero", "unit")
    )
    # A normal cut at 3 sigma keeps 0.9866 of its standard deviation.
    assert float(truncated.std()) == pytest.approx(0.9866 * math.sqrt(2 / 5), rel=0.01)
    assert zero.shape == truncated.shape
    assert not zero.any()
    torch.testing.assert_close(unit.mean(-1), torch.zeros(64, 12), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(unit.var(-1), torch.ones(64, 12))


@pytest.mark.parametrize(("init", "depth"), [("takase", 1 + 2 * 8 + 1), ("scaled", 1 + 2 + 1)])
def test_initial_weights_have_the_deviation_of_their_kind(init: str, depth: int) -> None:
    config = small_config(n_embd=96, n_heads=4, intermediate_size=256, vocab_size=512, init=init, tie_embeddings=False)
    model = RecurrentDepthModel(config)
    model.init_weights(1, mean_recurrence=8)
    weights = model.state_dict()
    inward = 0.9866 * math.sqrt(2 / (5 * 96))
    outward = inward / math.sqrt(2 * depth)
    for name in ("transformer.wte", "lm_head", "transformer.adapter"):
        assert float(weights[f"{name}.weight"].std()) == pytest.approx(inward, rel=0.03), name
    for block in ("prelude.0", "core_block.0", "core_block.1", "coda.0"):
        prefix = f"transformer.{block}"
        for name in (f"{prefix}.attn.Wqkv", f"{prefix}.mlp.fc"):
            assert float(weights[f"{name}.weight"].std()) == pytest.approx(inward, rel=0.03), name
        for name in (f"{prefix}.attn.proj", f"{prefix}.mlp.proj"):
            assert float(weights[f"{name}.weight"].std()) == pytest.approx(outward, rel=0.03), name
        for norm in range(1, 5):
            assert torch.equal(weights[f"{prefix}.norm_{norm}.weight"], torch.ones(96))
        assert torch.equal(weights[f"{prefix}.attn.qk_bias"], torch.zeros(2, 1, 4, 24))
    assert torch.equal(weights["transformer.ln_f.weight"], torch.ones(96))


def test_the_effective_depth_of_the_reference_is_four_r_plus_four() -> None:
    assert preset("huginn-3.5b").effective_depth(32) == 4 * 32 + 4


def test_the_diagonal_injection_begins_as_an_average_of_state_and_input() -> None:
    weights = small_model(injection="diagonal").state_dict()
    for name in ("adapter", "readout"):
        assert torch.equal(weights[f"transformer.{name}.weight"], torch.eye(16))
    for name in ("A_log", "delta"):
        assert not weights[f"transformer.adapter.{name}"].any()
    torch.testing.assert_close(DiagonalInjection(16).decay(), torch.full((16,), 0.5))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (small_model(seed) for seed in (1, 1, 2))
    for (name, ours), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(ours, same)
        if ours.dim() == 2:
            assert not torch.equal(ours, different), name
    variant = small_model(1, injection="gate").state_dict()
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in variant.items())


def test_weight_decay_spares_norms_biases_and_rates() -> None:
    model = small_model(injection="diagonal", tie_embeddings=False)
    spared = {reference_name(name) for name, parameter in model.named_parameters() if not decays(name, parameter)}
    kinds = {name.split(".", 1)[1] if "." in name else name for name in spared}
    assert kinds == {
        *(f"{block}.norm_{norm}.weight" for block in BLOCKS for norm in range(1, 5)),
        *(f"{block}.attn.qk_bias" for block in BLOCKS),
        "adapter.A_log",
        "adapter.delta",
        "prelude_norm.weight",
        "ln_f.weight",
    }


BLOCKS = ("prelude.0", "core_block.0", "core_block.1", "coda.0")


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 3},
        {"n_heads": 16},
        {"vocab_size": 0},
        {"n_layers_in_coda": -1},
        {"injection": "concatenate"},
        {"block": "post_norm"},
        {"state_init": "normal"},
        {"init": "kaiming"},
        {"state_init": "zero", "injection": "gate"},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused_with_their_path(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.{next(iter(change))}"):
        small_config(**change)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants_that_the_reference_has_not_name_their_key(changes: dict[str, Any]) -> None:
    known = {"injection": "concat", "tie_embeddings": False}
    problem = reference_problem(small_config(**changes))
    if all(known.get(key) == value for key, value in changes.items()):
        assert problem is None
    else:
        assert problem is not None
        assert any(f"model.{key}" in problem for key in changes)


def test_the_reference_is_the_default() -> None:
    assert reference_problem(SMALL) is None
    assert small_model().state_dict().keys() == small_model(state_init="unit", init="scaled").state_dict().keys()
