"""Small models of every variant, and the loop written out as its definition."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.injection import ConcatInjection, DiagonalInjection
from pipeline.model import ModelConfig, RecurrentDepthModel
from pipeline.objective import ObjectiveConfig

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


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**vars(SMALL), **changes})


def small_model(
    seed: int = 0, *, checkpointed: bool = False, objective: ObjectiveConfig | None = None, **changes: Any
) -> RecurrentDepthModel:
    model = RecurrentDepthModel(
        small_config(**changes),
        activation_checkpointing="iteration" if checkpointed else "none",
        objective=objective or ObjectiveConfig(),
    )
    model.init_weights(seed, mean_recurrence=4)
    return model


def small_batch(rows: int, seed: int = 0, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def kept_bytes(model: RecurrentDepthModel, ids: torch.Tensor, labels: torch.Tensor, k: int) -> int:
    """Bytes of all storages that autograd keeps between the passes of k iterations, but the weights'."""
    known = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    state = model.initial_state(torch.arange(len(ids)), ids.shape[1])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, state, (0, k), labels)
    assert torch.isfinite(loss)
    return sum(kept.values())


def injected(model: RecurrentDepthModel, state: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """The injections as they are defined."""
    adapter, kind = model.transformer.recurrence.adapter, model.config.injection
    if isinstance(adapter, ConcatInjection):
        return torch.nn.functional.linear(torch.cat((state, embedded), -1), adapter.weight)
    if kind == "add":
        return state + embedded
    if kind == "gate":
        return state * embedded
    assert isinstance(adapter, DiagonalInjection)
    step = torch.log1p(adapter.delta.exp())
    return torch.exp(-step * adapter.A_log.exp()) * state + step * (embedded @ adapter.weight.T)


def plain_logits(model: RecurrentDepthModel, ids: torch.Tensor, state: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Iterate injection and blocks n + k times, detaching after n."""
    transformer, config = model.transformer, model.config
    positions = model._positions(ids, None)
    embedded = transformer.wte(ids) * (math.sqrt(config.n_embd) if config.scale_embedding else 1.0)
    for block in transformer.prelude:
        embedded = block(embedded, positions)
    if transformer.prelude_norm is not None:
        embedded = transformer.prelude_norm(embedded)
    for index in range(n + k):
        if index == n:
            state = state.detach()
        state = injected(model, state, embedded)
        for block in transformer.recurrence.core_block:
            state = block(state, positions)
    return model.logits(state)
