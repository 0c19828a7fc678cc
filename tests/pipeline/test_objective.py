"""The options of the loss against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.loader import IGNORED
from pipeline.objective import ObjectiveConfig, goldfish_labels, loss
from tests.pipeline.small_models import small_batch, small_model


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([[0, 1, 2, IGNORED, 4], [5, IGNORED, IGNORED, 6, 0]])


def by_hand(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0, z: float = 0.0) -> torch.Tensor:
    """Loss a token, 0 where there is no label."""
    denominator = logits.exp().sum(-1).log()
    log_probabilities = logits - denominator[..., None]
    target = log_probabilities.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    each = -(1 - smoothing) * target - smoothing * log_probabilities.mean(-1) + z * denominator**2
    return each * (labels != IGNORED)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, {}),
        ({"label_smoothing": 0.1}, {"smoothing": 0.1}),
        ({"z_loss": 1e-2}, {"z": 1e-2}),
        ({"label_smoothing": 0.2, "z_loss": 0.5}, {"smoothing": 0.2, "z": 0.5}),
    ],
)
def test_terms_are_their_definitions(
    logits: torch.Tensor, labels: torch.Tensor, options: dict[str, Any], terms: dict[str, float]
) -> None:
    expected = by_hand(logits, labels, **terms).sum() / 7
    torch.testing.assert_close(loss(logits, labels, ObjectiveConfig(**options), (3, 2)), expected)


def test_each_sequence_is_divided_by_its_own_backprop_depth(logits: torch.Tensor, labels: torch.Tensor) -> None:
    config = ObjectiveConfig(divide_by_backprop_depth=True)
    each = by_hand(logits, labels)
    torch.testing.assert_close(loss(logits, labels, config, (3, 4)), each.sum() / 4 / 7)
    expected = (each[0].sum() / 8 + each[1].sum() / 2) / 7
    torch.testing.assert_close(loss(logits, labels, config, [(3, 8), (0, 2)]), expected)
    torch.testing.assert_close(loss(logits, labels, config, (8, 0)), each.sum() / 7)


def test_a_batch_without_labels_costs_nothing(logits: torch.Tensor) -> None:
    logits.requires_grad_()
    value = loss(logits, torch.full((2, 5), IGNORED), ObjectiveConfig(z_loss=1.0), (0, 1))
    value.backward()
    assert float(value.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_model_minimises_the_objective_and_tells_the_cross_entropy() -> None:
    ids = small_batch(2)
    labels = ids.roll(-1, 1)
    config = ObjectiveConfig(z_loss=0.1, label_smoothing=0.1, divide_by_backprop_depth=True)
    plain, special = small_model(), small_model(objective=config)
    state = plain.initial_state(torch.arange(2), 12)
    torch.testing.assert_close(
        special(ids, state, (2, 3), labels), loss(plain(ids, state, (2, 3)), labels, config, (2, 3))
    )
    torch.testing.assert_close(special.cross_entropy, plain(ids, state, (2, 3), labels).detach())
    torch.testing.assert_close(special.cross_entropy, plain.cross_entropy)
    assert not special.cross_entropy.requires_grad


def test_goldfish_leaves_out_one_token_in_k() -> None:
    ids = torch.randint(0, 1000, (64, 256), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    kept = goldfish_labels(labels, ids, ObjectiveConfig(goldfish=4, goldfish_context=13))
    dropped = kept == IGNORED
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert not dropped[:, :12].any()
    assert float(dropped[:, 12:].float().mean()) == pytest.approx(1 / 4, abs=4 * math.sqrt(3 / 16 / dropped.numel()))
    assert torch.equal(goldfish_labels(labels, ids, ObjectiveConfig()), labels)


def test_goldfish_is_a_function_of_the_tokens_before() -> None:
    config = ObjectiveConfig(goldfish=3, goldfish_context=4)

    def dropped(ids: torch.Tensor) -> torch.Tensor:
        return goldfish_labels(ids.roll(-1, 1), ids, config) == IGNORED

    passages = torch.randint(0, 50, (64, 40), generator=torch.Generator().manual_seed(1))
    before = torch.randint(0, 50, (64, 9), generator=torch.Generator().manual_seed(2))
    here = dropped(passages)
    assert torch.equal(here[:, 3:], dropped(torch.cat((before, passages), 1))[:, 12:])
    changed = passages.clone()
    changed[:, 20] += 1
    positions = (dropped(changed) != here).any(0).nonzero().flatten().tolist()
    assert positions == [20, 21, 22, 23]
    swapped = passages.clone()
    swapped[:, [20, 21]] = passages[:, [21, 20]]
    assert not torch.equal(dropped(swapped)[:, 21:23], here[:, 21:23])


def test_rows_shorter_than_the_context_lose_no_token() -> None:
    ids = small_batch(2)
    assert torch.equal(goldfish_labels(ids, ids, ObjectiveConfig(goldfish=2, goldfish_context=13)), ids)


def test_the_penalty_does_not_depend_on_the_split_into_micro_batches() -> None:
    model, ids = small_model(objective=ObjectiveConfig(jacobian_penalty=0.5)), small_batch(4)
    state, labels = model.initial_state(torch.arange(4), ids.shape[1]), ids.roll(-1, 1)
    labels[0, 3:], labels[2] = IGNORED, IGNORED
    whole = model(ids, state, (1, 2), labels) * int((labels != IGNORED).sum())
    parts = [model(ids[i : i + 1], state[i : i + 1], (1, 2), labels[i : i + 1]) for i in range(4)]
    split = sum(part * int((labels[i] != IGNORED).sum()) for i, part in enumerate(parts))
    torch.testing.assert_close(split, whole)


def test_the_squared_gain_is_that_of_the_jacobian() -> None:
    model = small_model()
    ids = small_batch(1, length=4)
    state = model.latent(ids, model.initial_state(torch.arange(1), 4), (3, 0)).detach()
    positions = model._positions(ids, None)
    embedded = model._embed(ids, positions).detach()
    recurrence = model.transformer.recurrence
    prepared = recurrence.adapter.prepare(embedded)

    def iterate(flat: torch.Tensor) -> torch.Tensor:
        return recurrence.iterate(flat.view(1, 4, 16), prepared, positions).flatten()

    jacobian = torch.autograd.functional.jacobian(iterate, state.flatten())
    direction = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    pulled = direction.flatten() @ jacobian
    expected = (pulled / pulled.norm() @ jacobian).square().sum()
    actual = recurrence.squared_gain(state, embedded, positions, direction)
    torch.testing.assert_close(actual, expected[None], rtol=1e-4, atol=1e-6)
    assert float(actual.detach()) <= float(torch.linalg.matrix_norm(jacobian, 2)) ** 2 * 1.001


@pytest.mark.parametrize("injection", ["concat", "add", "gate", "diagonal"])
def test_the_jacobian_penalty_makes_the_loop_contract(injection: str) -> None:
    model = small_model(objective=ObjectiveConfig(jacobian_penalty=1.0), injection=injection)
    ids = small_batch(2)
    state = model.initial_state(torch.arange(2), 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    penalties = []
    for _ in range(12):
        total = model(ids, state, (2, 2), ids.roll(-1, 1))
        penalties.append(float(total.detach()) - float(model.cross_entropy))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert all(penalty > 0.0 for penalty in penalties)
    assert penalties[-1] < 0.9 * penalties[0]
    with torch.no_grad():
        assert float(model(ids, state, (4, 0), ids.roll(-1, 1))) == float(model.cross_entropy)


@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": -1.0},
        {"label_smoothing": 1.0},
        {"goldfish": 1},
        {"goldfish": -4},
        {"goldfish_context": 0},
        {"jacobian_penalty": -0.5},
    ],
)
def test_meaningless_values_are_refused_with_their_path(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"objective.{next(iter(options))}"):
        ObjectiveConfig(**options)
