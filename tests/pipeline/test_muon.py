"""Muon: orthogonal updates of matrices, Adam for the rest, owners with equal work, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.model import build_meta_model, reference_name
from pipeline.muon import Muon, orthogonalize, owners
from pipeline.optim import MuonConfig, OptimizerConfig, build_optimizer, check_optimizer


def model_of(**parameters: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, value in parameters.items():
        module.register_parameter(name, nn.Parameter(value))
    return module


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4)])
def test_newton_schulz_brings_the_singular_values_near_one_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(shape[0], 4))[0], torch.linalg.qr(torch.randn(shape[1], 4))[0]
    done = orthogonalize(left @ torch.diag(torch.tensor([5.0, 1.0, 0.5, 0.2])) @ right.T, 5)
    assert done.shape == torch.Size(shape)
    values = torch.diag(left.T @ done @ right)
    assert values.min() > 0.6
    assert values.max() < 1.3
    torch.testing.assert_close(left @ torch.diag(values) @ right.T, done, atol=1e-4, rtol=0.0)


def test_a_step_moves_matrices_by_the_rate_times_a_fifth_and_vectors_as_adam_does() -> None:
    torch.manual_seed(0)
    module = model_of(matrix=torch.zeros(32, 64), vector=torch.zeros(5))
    config = OptimizerConfig(
        kind="muon", learning_rate=0.01, weight_decay=0.0, eps=0.0, muon=MuonConfig(learning_rate=0.1)
    )
    optimizer = build_optimizer(config, module)
    gradients = {"matrix": torch.randn(32, 64), "vector": torch.randn(5)}
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    moved = dict(module.named_parameters())
    rms = moved["matrix"].detach().square().mean().sqrt()
    assert 0.7 * 0.02 < rms < 1.2 * 0.02
    torch.testing.assert_close(moved["vector"].detach(), -0.01 * gradients["vector"].sign())


def test_matrices_are_muons_and_the_embedding_norms_and_biases_are_adams() -> None:
    model = build_meta_model(load_config("smoke").model)
    optimizer = build_optimizer(OptimizerConfig(kind="muon", learning_rate=1.0), model)
    assert isinstance(optimizer, Muon)
    muon, adam = ({whole.name for whole in group["tensors"]} for group in optimizer.param_groups)
    assert {name.split(".")[-2] for name in muon} == {"Wqkv", "proj", "fc", "adapter"}
    assert "transformer.wte.weight" in adam
    assert muon | adam == {reference_name(name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("transformer.ln_f.weight", r"transformer\.ln_f\.weight of shape"),
        ("transformer.core_block.*", "orthogonal; name 2-d tensors only"),
        ("*.attn.qk_bias", "qk_bias of shape"),
        ("transformer.core.*", "names no tensor"),
    ],
)
def test_what_is_not_a_matrix_is_refused_by_name(pattern: str, reason: str) -> None:
    model = build_meta_model(load_config("smoke").model)
    config = OptimizerConfig(kind="muon", learning_rate=1.0, muon=MuonConfig(tensors=["*.mlp.fc.weight", pattern]))
    with pytest.raises(ConfigError, match=reason):
        check_optimizer(config, model)


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_the_work_of_the_owners_is_even(ranks: int) -> None:
    shapes = [torch.Size(shape) for shape in [(64, 64), (192, 64), (352, 64), (64, 176)] * 8]
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    work = [0] * ranks
    for owner, cost in zip(owners(shapes, ranks), costs, strict=True):
        work[owner] += cost
    assert max(work) <= math.ceil(sum(costs) / ranks) + max(costs)
    assert max(work) <= 1.15 * sum(costs) / ranks
