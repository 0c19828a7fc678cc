"""Gradients reach exactly the last k iterations, whatever the injection, arithmetic and depths of the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.blocks import Positions
from pipeline.model import RecurrentDepthModel
from pipeline.trace import Trace
from tests.pipeline.small_models import plain_logits, small_batch, small_model

INJECTIONS = ["concat", "add", "gate", "diagonal"]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def assert_equal_gradients(ours: RecurrentDepthModel, theirs: RecurrentDepthModel, tolerance: float) -> None:
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert actual.grad is not None, name
        assert expected.grad is not None, name
        scale = float(expected.grad.abs().max())
        error = float((actual.grad - expected.grad).abs().max())
        assert error <= tolerance * scale + 1e-7, f"{name}: {error} of {scale}"


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("checkpointed", [False, True])
@settings(max_examples=6, deadline=None)
@given(n=st.integers(0, 6), k=st.integers(1, 4), seed=st.integers(0, 1000), autocast=st.booleans())
def test_truncated_gradients_equal_a_loop_that_detaches(
    injection: str, checkpointed: bool, n: int, k: int, seed: int, autocast: bool
) -> None:
    model = small_model(seed, checkpointed=checkpointed, injection=injection)
    plain = small_model(seed, injection=injection)
    ids = small_batch(2, seed)
    state = model.initial_state(torch.arange(2), 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, state, (n, k), ids.roll(-1, 1))
        expected = cross_entropy(plain_logits(plain, ids, state, n, k), ids.roll(-1, 1))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2 if autocast else 1e-5, atol=0.0)
    # bf16 keeps 8 bits, and the adapter's halves are summed in another order.
    assert_equal_gradients(model, plain, 0.1 if autocast else 1e-4)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_autocast_keeps_the_gradient_of_float32(injection: str) -> None:
    """Weights cast in iterations without gradient must not be those of the iterations with it."""
    ids, models = small_batch(2), [small_model(injection=injection) for _ in range(2)]
    for model, autocast in zip(models, (True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, model.initial_state(torch.arange(2), 12), (3, 2), ids.roll(-1, 1))
        loss.backward()
    for (name, low), full in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert low.grad is not None, name
        assert full.grad is not None, name
        if float(full.grad.norm()) > 1e-4:
            assert torch.nn.functional.cosine_similarity(low.grad.flatten(), full.grad.flatten(), 0) > 0.95, name


def monotone_depths(totals: list[int], most: int) -> list[tuple[int, int]]:
    return [(max(total - most, 0), min(total, most)) for total in totals]


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("documents", [False, True])
@settings(max_examples=6, deadline=None)
@given(totals=st.lists(st.integers(1, 7), min_size=2, max_size=5), most=st.integers(1, 4), checkpointed=st.booleans())
def test_per_sequence_depths_equal_each_sequence_alone(
    injection: str, documents: bool, totals: list[int], most: int, checkpointed: bool
) -> None:
    depths, rows = monotone_depths(totals, most), len(totals)
    model = small_model(checkpointed=checkpointed, injection=injection)
    alone = small_model(injection=injection)
    ids, state = small_batch(rows), model.initial_state(torch.arange(rows), 12)
    numbers = small_batch(rows, 5).div(16, rounding_mode="floor").cumsum(1) if documents else None
    loss = model(ids, state, depths, ids.roll(-1, 1), documents=numbers)
    loss.backward()
    losses = []
    for row, depth in enumerate(depths):
        piece = slice(row, row + 1)
        within = None if numbers is None else numbers[piece]
        losses.append(alone(ids[piece], state[piece], depth, ids[piece].roll(-1, 1), documents=within))
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert_equal_gradients(model, alone, 1e-4)


def test_no_iteration_is_computed_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    sizes: list[int] = []
    iterate = model.transformer.recurrence.iterate

    def counted(state: torch.Tensor, injected: torch.Tensor, positions: Positions) -> torch.Tensor:
        sizes.append(len(state))
        return iterate(state, injected, positions)

    monkeypatch.setattr(model.transformer.recurrence, "iterate", counted)
    model(small_batch(3), model.initial_state(torch.arange(3), 12), [(0, 1), (3, 2), (1, 2)])
    assert sum(sizes) == 1 + 5 + 3
    assert sizes == [2, 1, 1, 3, 2]


def test_a_trace_of_unequal_depths_follows_the_deepest() -> None:
    model, ids = small_model(), small_batch(3)
    state = model.initial_state(torch.arange(3), 12)
    together, alone = Trace(), Trace()
    model(ids, state, [(0, 1), (3, 2), (1, 2)], trace=together)
    model(ids[1:2], state[1:2], (3, 2), trace=alone)
    assert len(together.state_rms) == 5
    torch.testing.assert_close(torch.stack(together.state_rms), torch.stack(alone.state_rms))
    torch.testing.assert_close(torch.stack(together.relative_residual), torch.stack(alone.relative_residual))
