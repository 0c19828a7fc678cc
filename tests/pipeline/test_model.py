"""The shapes that ship, the initial weights, and gradients through the truncated loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.model import ModelConfig, RecurrentDepthModel, Trace, build_meta_model, count_parameters

SMALL = ModelConfig(
    n_embd=16,
    n_heads=2,
    intermediate_size=24,
    vocab_size=32,
    block_size=12,
    n_layers_in_prelude=1,
    n_layers_in_recurrent_block=2,
    n_layers_in_coda=1,
)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("tiny", 856_416), ("huginn-150m", 151_032_832), ("huginn-1b", 941_222_400), ("huginn-3.5b", 3_564_976_800)],
)
def test_shipped_shapes_have_their_parameter_counts(preset: str, parameters: int) -> None:
    model = build_meta_model(load_config("smoke", [f"model={preset}"]).model)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert count_parameters(model) == parameters


def small_model(seed: int = 0, *, checkpoint_iterations: bool = False) -> RecurrentDepthModel:
    model = RecurrentDepthModel(SMALL, checkpoint_iterations=checkpoint_iterations)
    model.init_weights(seed, mean_recurrence=4)
    return model


def loss_of_a_plain_loop(
    model: RecurrentDepthModel, ids: torch.Tensor, state: torch.Tensor, n: int, k: int
) -> torch.Tensor:
    """The definition: iterate the concatenating adapter and the blocks, detach after n iterations."""
    transformer = model.transformer
    rotary = model.rotary(ids.shape[1], ids.device)
    embedded = transformer.wte(ids) * math.sqrt(SMALL.n_embd)
    for block in transformer.prelude:
        embedded = block(embedded, rotary)
    for index in range(n + k):
        if index == n:
            state = state.detach()
        state = transformer.recurrence.adapter(torch.cat((state, embedded), dim=-1))
        for block in transformer.recurrence.core_block:
            state = block(state, rotary)
    labels = ids.roll(-1, 1)
    return torch.nn.functional.cross_entropy(model.logits(state).flatten(0, 1), labels.flatten())


@settings(max_examples=15)
@given(n=st.integers(0, 6), k=st.integers(1, 4), seed=st.integers(0, 1000), checkpointed=st.booleans())
def test_truncated_gradients_equal_a_loop_that_detaches(n: int, k: int, seed: int, checkpointed: bool) -> None:
    model = small_model(seed, checkpoint_iterations=checkpointed)
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(seed))
    state = model.initial_state(torch.arange(2), 12)
    loss = model(ids, state, (n, k), ids.roll(-1, 1))
    loss.backward()
    plain = small_model(seed)
    expected = loss_of_a_plain_loop(plain, ids, state, n, k)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


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


def test_initial_weights_follow_takase_and_depend_on_seed_and_name_alone() -> None:
    config = load_config("smoke").model
    first, again, other = (RecurrentDepthModel(config) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        model.init_weights(seed, mean_recurrence=8)
    for (name, ours), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(ours, same)
        if ours.dim() == 2:
            assert not torch.equal(ours, different), name
    depth = 1 + 2 * 8 + 1
    weights = first.state_dict()
    core = "transformer.core_block.0"
    # A normal cut at 3 sigma keeps 0.9866 of its standard deviation.
    inward, outward = (0.9866 * math.sqrt(variance) for variance in (2 / (5 * 96), 1 / (5 * 96 * depth)))
    for name in ("transformer.wte", "transformer.adapter", f"{core}.attn.Wqkv", f"{core}.mlp.fc"):
        assert float(weights[f"{name}.weight"].std()) == pytest.approx(inward, rel=0.03), name
    for name in (f"{core}.attn.proj", f"{core}.mlp.proj", "transformer.prelude.0.attn.proj"):
        assert float(weights[f"{name}.weight"].std()) == pytest.approx(outward, rel=0.03), name
    assert torch.equal(weights[f"{core}.norm_1.weight"], torch.ones(96))
    assert torch.equal(weights[f"{core}.attn.qk_bias"], torch.zeros(2, 1, 4, 24))


@pytest.mark.parametrize("change", [{"n_heads": 3}, {"n_heads": 16}, {"vocab_size": 0}, {"n_layers_in_coda": -1}])
def test_impossible_shapes_are_refused_with_their_path(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"model.{next(iter(change))}"):
        ModelConfig(**{**vars(SMALL), **change})
