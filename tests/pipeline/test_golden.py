"""The model agrees with the reference's numbers (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.model import ModelConfig, RecurrentDepthModel, reference_name

GOLDEN = Path(__file__).parents[1] / "golden" / "raven_tiny"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
TOLERANCE = 1e-5


def golden_model(*, activation_checkpointing: str = "none") -> RecurrentDepthModel:
    record = json.loads((GOLDEN / "config.json").read_text())
    config = ModelConfig(**{name: record[name] for name in ModelConfig.__dataclass_fields__ if name in record})
    model = RecurrentDepthModel(config, activation_checkpointing=activation_checkpointing)
    weights = load_file(GOLDEN / "weights.safetensors")
    torch.testing.assert_close(model.rotary(64, torch.device("cpu")), weights.pop("freqs_cis"))
    assert torch.equal(weights.pop("lm_head.weight"), weights["transformer.wte.weight"])
    model.load_state_dict(weights, strict=True)
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.abs().max().detach())


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_logits_and_latent_states_agree(depth: int) -> None:
    model = golden_model()
    with torch.no_grad():
        state = model.latent(EXPECTED["input_ids"], EXPECTED["initial_state"], (0, depth))
        assert relative_error(model.transformer.ln_f(state), EXPECTED[f"latent_state.r{depth}"]) < TOLERANCE
        assert relative_error(model.logits(state), EXPECTED[f"logits.r{depth}"]) < TOLERANCE


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_logits_stay_close_in_bf16(depth: int) -> None:
    model, expected = golden_model(), EXPECTED[f"logits.r{depth}"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(EXPECTED["input_ids"], EXPECTED["initial_state"], (0, depth))
    assert relative_error(logits, expected) < 1e-2
    assert float((logits - expected).norm() / expected.norm()) < 1e-2
    # Weights that are kept in bf16, as under ZeRO, are rounded before anything is computed: 8e-3 by itself.
    with torch.no_grad():
        logits = model.bfloat16()(EXPECTED["input_ids"], EXPECTED["initial_state"].bfloat16(), (0, depth))
    assert float((logits - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("activation_checkpointing", ["none", "iteration", "block", "selective"])
def test_truncated_backprop_loss_and_every_gradient_agree(activation_checkpointing: str) -> None:
    model = golden_model(activation_checkpointing=activation_checkpointing)
    loss = model(EXPECTED["input_ids"], EXPECTED["initial_state"], (3, 2), EXPECTED["labels"])
    loss.backward()
    assert relative_error(loss, EXPECTED["loss.n3.k2"][0]) < TOLERANCE
    gradients = load_file(GOLDEN / "gradients.safetensors")
    parameters = {reference_name(name): parameter for name, parameter in model.named_parameters()}
    assert parameters.keys() == gradients.keys()
    for name, expected in gradients.items():
        actual = parameters[name].grad
        assert actual is not None
        assert relative_error(actual, expected) < TOLERANCE, name


def test_state_dict_carries_the_reference_names() -> None:
    expected = set(load_file(GOLDEN / "weights.safetensors")) - {"freqs_cis", "lm_head.weight"}
    assert set(golden_model().state_dict()) == expected
