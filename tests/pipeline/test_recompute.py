"""What the backward pass computes again changes memory and FLOPs, and not one bit of the gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.depth import Depth
from pipeline.flops import sequence_flops
from pipeline.model import RecurrentDepthModel
from pipeline.objective import ObjectiveConfig
from pipeline.recompute import POLICIES
from pipeline.recurrence import Steps
from tests.pipeline.small_models import kept_bytes, small_batch, small_config

CASES: dict[str, tuple[Steps, bool, float]] = {
    "lockstep": ((2, 3), False, 0.0),
    "one iteration, documents": ((0, 1), True, 0.0),
    "depth of each sequence, documents": ([(2, 3), (0, 1), (0, 2), (2, 3)], True, 0.0),
    "penalty": ((1, 2), False, 0.5),
}


def gradients(policy: str, steps: Steps, masked: bool, penalty: float) -> list[torch.Tensor]:
    model = RecurrentDepthModel(
        small_config(), activation_checkpointing=policy, objective=ObjectiveConfig(jacobian_penalty=penalty)
    )
    model.init_weights(0, 4)
    ids = small_batch(4)
    documents = small_batch(4, 5).div(16, rounding_mode="floor").cumsum(1) if masked else None
    model(ids, model.initial_state(torch.arange(4), 12), steps, ids.roll(-1, 1), documents=documents).backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "none"])
def test_gradients_are_the_same_bit_for_bit(policy: str, case: str) -> None:
    for actual, expected in zip(gradients(policy, *CASES[case]), gradients("none", *CASES[case]), strict=True):
        assert torch.equal(actual, expected)


def saved_bytes(policy: str, k: int) -> int:
    """Bytes of all storages that autograd keeps between the passes, but weights and inputs."""
    model = RecurrentDepthModel(small_config(), activation_checkpointing=policy)
    model.init_weights(0, 4)
    ids = small_batch(4)
    return kept_bytes(model, ids, ids.roll(-1, 1), k)


def test_an_iteration_keeps_its_state_alone_and_a_block_its_inputs() -> None:
    state = 4 * 12 * 16 * 4
    each = {policy: saved_bytes(policy, 4) - saved_bytes(policy, 3) for policy in ("none", "iteration", "block")}
    assert each["iteration"] == state
    assert each["block"] == (1 + 2) * state  # the adapter's input, and those of two blocks
    assert each["none"] > 10 * each["block"]


def counted(policy: str, depth: Depth) -> float:
    model = RecurrentDepthModel(small_config(), activation_checkpointing=policy)
    model.init_weights(0, 4)
    ids = small_batch(2)
    # The counter knows no fused attention on CPU, but the products of the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, model.initial_state(torch.arange(2), 12), depth, ids).backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_formula_counts_what_is_computed_again(policy: str) -> None:
    depth = Depth(3, 4)
    flops = sequence_flops(small_config(), policy, length=12, causal=False)
    assert 2 * flops.training(depth) == pytest.approx(counted(policy, depth), rel=0.01)
    assert 2 * flops.model(depth) == pytest.approx(counted("none", depth), rel=0.01)
