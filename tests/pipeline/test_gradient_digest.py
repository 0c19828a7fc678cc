"""A repeated step has the digest of the first; a changed one has another."""

from __future__ import annotations

import pytest
import torch

from pipeline.gradient_digest import GradientDigest
from pipeline.model import RecurrentDepthModel
from tests.pipeline.small_models import small_batch, small_model


def step(model: RecurrentDepthModel, micro_batches: int = 2) -> None:
    for index in range(micro_batches):
        ids = small_batch(2, seed=index)
        model(ids, model.initial_state(torch.arange(2), 12), (2, 2), ids.roll(-1, 1)).backward()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_equal_steps_have_equal_digests_and_the_gradients_stay_as_they_are(precision: torch.dtype) -> None:
    watched, plain = (small_model(3, checkpointed=True).to(precision) for _ in range(2))
    digest = GradientDigest(watched)
    step(watched)
    step(plain)
    first = digest.read()
    assert first[1]
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    digest.reset()
    step(watched)
    assert digest.read() == first
    digest.reset()
    step(watched, micro_batches=1)
    assert digest.read()[0] != first[0]


def test_an_error_in_any_tensor_changes_it() -> None:
    model = small_model(3)
    digest = GradientDigest(model)
    step(model, 1)
    seen = {digest.read()[0]}
    # In the result of one linear layer, deep inside the last iteration of the first sequence.
    layer = model.get_submodule("transformer.recurrence.core_block.1.mlp.proj")
    hook = layer.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * (1 + 1e-5),))  # type: ignore[index]
    digest.reset()
    step(model, 1)
    hook.remove()
    seen.add(digest.read()[0])
    assert len(seen) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_single_value_that_is_not_finite_is_found(value: float) -> None:
    model = small_model(3)
    weight = model.get_parameter("transformer.coda.0.mlp.fc.weight")
    bad = torch.zeros_like(weight)
    bad[5, 7] = value
    hook = weight.register_hook(lambda gradient: gradient + bad)  # before the digest's own
    digest = GradientDigest(model)
    step(model, 1)
    assert not digest.read()[1]
    hook.remove()
    digest.reset()
    step(model, 1)
    assert digest.read()[1]


def test_hooks_go_when_it_is_closed() -> None:
    model = small_model(3)
    digest = GradientDigest(model)
    untouched = digest.read()
    digest.close()
    step(model, 1)
    assert digest.read() == untouched
