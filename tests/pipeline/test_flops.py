"""The formula counts what torch's own counter sees."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.depth import Depth, DepthConfig, DepthSchedule
from pipeline.flops import sequence_flops
from pipeline.model import ModelConfig, RecurrentDepthModel
from pipeline.recompute import POLICIES

LENGTH = 48


def counted(config: ModelConfig, depth: Depth, policy: str, sequences: int) -> float:
    model = RecurrentDepthModel(config, activation_checkpointing=policy)
    model.init_weights(0, 4)
    ids = torch.randint(0, config.vocab_size, (sequences, LENGTH))
    state = model.initial_state(torch.arange(sequences), LENGTH)
    # The counter knows no fused attention on CPU, but the products of the plain one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, state, depth, ids).backward()
    return float(counter.get_total_flops())


def drawn(mean: int, steps: int) -> list[Depth]:
    schedule = DepthSchedule(DepthConfig(mean_recurrence=mean, mean_backprop_depth=4), seed=1)
    return [schedule.at(step) for step in range(steps)]


@pytest.mark.parametrize("injection", ["concat", "add", "gate", "diagonal"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_costs_what_torch_counts(injection: str, policy: str) -> None:
    config = ModelConfig(
        n_embd=64, n_heads=4, intermediate_size=160, vocab_size=500, block_size=64,
        n_layers_in_prelude=1, n_layers_in_recurrent_block=2, n_layers_in_coda=2, injection=injection,
    )  # fmt: skip
    flops = sequence_flops(config, policy, length=LENGTH, causal=False)
    for depth in (Depth(0, 1), *drawn(5, 3)):
        assert 3 * flops.training(depth) == pytest.approx(counted(config, depth, policy, 3), rel=0.01)


def test_a_step_of_several_depths_costs_their_mean() -> None:
    config = ModelConfig(
        n_embd=64, n_heads=4, intermediate_size=160, vocab_size=500, block_size=64,
        n_layers_in_prelude=1, n_layers_in_recurrent_block=2, n_layers_in_coda=2,
    )  # fmt: skip
    flops, depths = sequence_flops(config, "iteration"), drawn(9, 20)
    model, hardware = flops.mean(depths)
    assert model == pytest.approx(sum(flops.model(depth) for depth in depths) / 20)
    assert hardware == pytest.approx(sum(flops.training(depth) for depth in depths) / 20)
    assert hardware > model


def test_the_published_model_costs_what_was_computed_by_hand() -> None:
    """TFLOP of one sequence of 4,096: 14.1 an iteration of the core, about 864 a mean step with recomputation."""
    config = ModelConfig(
        n_embd=5280, n_heads=55, intermediate_size=17920, vocab_size=65536, block_size=4096,
        n_layers_in_prelude=2, n_layers_in_recurrent_block=4, n_layers_in_coda=2,
    )  # fmt: skip
    flops = sequence_flops(config, "iteration")
    assert flops.iteration / 1e12 == pytest.approx(13.9, abs=0.3)
    assert flops.training(Depth(25, 8)) / 1e12 == pytest.approx(864, rel=0.03)
    assert flops.forward(33) < flops.training(Depth(25, 8))
