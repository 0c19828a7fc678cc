"""What `rookery plan` says is what a pass really keeps, and what DeepSpeed was seen to hold."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError
from pipeline.model import RecurrentDepthModel, build_meta_model, count_parameters
from pipeline.plan import _measure, activation_bytes, plan, state_bytes
from pipeline.recompute import POLICIES
from tests.pipeline.small_models import kept_bytes

SMALL = [
    "model.n_embd=64",
    "model.n_heads=4",
    "model.intermediate_size=160",
    "model.vocab_size=512",
    "model.block_size=64",
    "train.global_batch_size=16",
    "train.micro_batch_size=2",
    "depth.mean_recurrence=8",
    "depth.mean_backprop_depth=4",
    "train.steps=20",
]


def small(*changes: str) -> RunConfig:
    return load_config("smoke", [*SMALL, *changes])


def kept_for_the_backward_pass(config: RunConfig, policy: str, k: int) -> int:
    """Bytes of all storages that autograd of a real pass keeps, but the weights'."""
    model = RecurrentDepthModel(config.model, activation_checkpointing=policy)
    model.init_weights(0, 4)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    return kept_bytes(model, ids, ids, k)


@pytest.mark.parametrize("policy", ["none", "iteration", "block"])
def test_the_peak_is_what_a_real_pass_keeps_and_its_temporaries(policy: str) -> None:
    config = small("train.precision=fp32")
    peak, each = activation_bytes(config, policy, 4)
    kept = kept_for_the_backward_pass(config, policy, 4)
    assert each == kept - kept_for_the_backward_pass(config, policy, 3)
    logits = 2 * 64 * 512 * 4
    assert kept < peak < kept + 4 * logits + activation_bytes(config, "none", 1)[0]


def test_every_iteration_adds_the_same() -> None:
    peak, each = activation_bytes(small(), "selective", 2)
    assert _measure(small(), "selective", 5) == peak + 3 * each


# Bytes a parameter on each of two ranks with AdamW, from the tensors of a real engine in mid-pass; of the core apart.
SEEN = {
    ("fp32", 2): (4 + 2 + 4 + 2, 4),
    ("bf16", 1): (2 + 4 + 2 + 2 + 4, 0),
    ("bf16", 2): (2 + 2 + 2 + 4, 2),
    ("bf16", 3): (1 + 2 + 2 + 4, 2 + 2),
}


@pytest.mark.parametrize(("precision", "stage"), SEEN)
def test_the_state_is_what_deepspeed_was_seen_to_hold(precision: str, stage: int) -> None:
    config = small(f"train.precision={precision}", f"zero.stage={stage}", "optimizer={learning_rate: 0.001}")
    state = state_bytes(config, 2, accumulation=4)
    parameters = count_parameters(build_meta_model(config.model))
    with torch.device("meta"):
        core = sum(p.numel() for p in RecurrentDepthModel(config.model).transformer.recurrence.parameters())
    whole, of_core = SEEN[precision, stage]
    assert state.on_device - state.buckets == pytest.approx(whole * parameters + of_core * core, rel=1e-3)


def test_a_plan_says_what_fits() -> None:
    found = plan(small("zero.stage=2", "zero.scope=node", "train.document_mask=true"), 8, 2, memory_gb=80.0)
    assert found["shards"] == 2
    assert found["accumulation"] == 1
    sizes = {policy: entry["total"] for policy, entry in found["policies"].items()}
    assert sizes["block"] < sizes["iteration"] < sizes["selective"] < sizes["none"]
    assert set(sizes) == set(POLICIES)
    assert all(entry["fits"] for entry in found["policies"].values())


def test_offload_goes_to_the_host() -> None:
    config = small("zero.stage=2", "zero.offload_optimizer=true")
    offloaded, kept = state_bytes(config, 8, 1), state_bytes(small("zero.stage=2"), 8, 1)
    assert offloaded.on_host > offloaded.optimizer + offloaded.master
    assert offloaded.on_device + offloaded.on_host == kept.on_device

    # DeepSpeed sums whole gradients at stage 1 in bf16, unless the optimizer is on the host.
    bf16 = ("train.precision=bf16", "zero.stage=1")
    whole, sharded = (state_bytes(small(*bf16, f"zero.offload_optimizer={given}"), 8, 1) for given in ("false", "true"))
    assert sharded.gradients < whole.gradients / 2


def test_one_node_is_a_world() -> None:
    nodes, world = small("zero.scope=node"), small()
    assert plan(nodes, 2, 8)["state"] == plan(world, 2, 2)["state"]


def test_wrong_ranks_and_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--ranks 6: is not a multiple of --ranks-per-node 4"):
        plan(small(), 6, 4)
    with pytest.raises(ConfigError, match=r"--ranks 0: is not positive"):
        plan(small(), 0, 1)
    with pytest.raises(ConfigError, match=r"--memory-gb -1"):
        plan(small(), 1, 1, memory_gb=-1)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: 16 is not a multiple"):
        plan(small(), 3, 3)
