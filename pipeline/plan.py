"""What a run needs of every device, before anything is allocated: state by ZeRO stage, activations by policy.

Shapes: B micro-batch, S sequence, V vocabulary. All sizes are bytes of one rank.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.depth import Depth
from pipeline.errors import ConfigError
from pipeline.flops import sequence_flops
from pipeline.forecast import forecast
from pipeline.model import RecurrentDepthModel, build_meta_model, count_parameters
from pipeline.optim import build_optimizer
from pipeline.recompute import POLICIES

if TYPE_CHECKING:
    from pipeline.config import RunConfig

_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MASTER = 4
# DeepSpeed's own default: elements of a buffer of gradients that are reduced together.
_BUCKET = 500_000_000


@dataclass(frozen=True, kw_only=True)
class State:
    """What a rank holds besides activations, in bytes.

    Attributes:
        weights: in the precision that computes; at stage 3 the shard, and the core whole while the loop runs.
        gradients: sums in float32, and those of the pass that runs, in the precision that computes.
        master: float32 weights.
        optimizer: moments and the like, float32.
        buckets: gradients on their way to other ranks.
        on_host: bytes of these that are in host memory.
    """

    weights: int
    gradients: int
    master: int
    optimizer: int
    buckets: int
    on_host: int

    @property
    def on_device(self) -> int:
        """Bytes in the device's memory."""
        return self.weights + self.gradients + self.master + self.optimizer + self.buckets - self.on_host


def state_of_rank(config: RunConfig, ranks: int, ranks_per_node: int) -> tuple[State, int, int]:
    """Return what a rank holds, over how many ranks ZeRO spreads it, and the micro-batches of a rank in a step."""
    nodes = config.zero.scope == "node" and ranks > ranks_per_node  # a single node is a world
    shards = 1 if config.zero.stage == 0 else ranks_per_node if nodes else ranks
    accumulation = config.train.global_batch_size // (ranks * config.train.micro_batch_size)
    return state_bytes(config, shards, accumulation, ranks_per_node if nodes else None), shards, accumulation


def plan(config: RunConfig, ranks: int, ranks_per_node: int, memory_gb: float | None = None) -> dict[str, Any]:
    """Return what one rank of a run needs.

    Args:
        config: the resolved configuration.
        ranks: of the whole run.
        ranks_per_node: ranks (devices) of a node.
        memory_gb: memory of a device in GB of 10^9 bytes, to say what fits.

    Returns:
        name, ranks, ranks_per_node, shards (ranks over which ZeRO spreads), precision, parameters, sequence_length,
        micro_batch_size, accumulation (micro-batches of a rank in a step), backprop_depth (k that is planned for, the
        largest), tokens_per_step; state (`State`, and its sum on the device); logits (one float32 copy); policies: by
        name activations (the peak of a pass), iteration (what each further iteration with gradient adds), total, fits
        (None without `memory_gb`), flops (mean of a sequence, with what is computed again); configured (policy);
        memory_gb; model_flops (mean of a step).

    Raises:
        ConfigError: ranks that do not divide the batch, nodes or memory without a meaning.
    """
    _check(config, ranks, ranks_per_node, memory_gb)
    ranks_per_node = min(ranks, ranks_per_node)
    state, shards, accumulation = state_of_rank(config, ranks, ranks_per_node)
    depth = largest_backprop_depth(config)
    drawn = forecast(config, config.train.steps, ranks)["curve"]
    mean = Depth(sum(drawn["n"]) / len(drawn["n"]), sum(drawn["k"]) / len(drawn["k"]))
    policies = {}
    for policy in POLICIES:
        peak, iteration = activation_bytes(config, policy, depth)
        total = state.on_device + peak
        policies[policy] = {
            "activations": peak,
            "iteration": iteration,
            "total": total,
            "fits": None if memory_gb is None else total <= memory_gb * 1e9,
            "flops": sequence_flops(config.model, policy).mean([mean])[1],
        }
    sequences = config.train.global_batch_size
    return {
        "name": config.name,
        "ranks": ranks,
        "ranks_per_node": ranks_per_node,
        "shards": shards,
        "precision": config.train.precision,
        "parameters": count_parameters(build_meta_model(config.model)),
        "sequence_length": config.model.block_size,
        "micro_batch_size": config.train.micro_batch_size,
        "accumulation": accumulation,
        "backprop_depth": depth,
        "tokens_per_step": sequences * config.model.block_size,
        "state": {**vars(state), "on_device": state.on_device},
        "logits": 4 * config.train.micro_batch_size * config.model.block_size * config.model.vocab_size,
        "policies": policies,
        "configured": config.train.activation_checkpointing,
        "memory_gb": memory_gb,
        "model_flops": sequences * sequence_flops(config.model).mean([mean])[0],
    }


def largest_backprop_depth(config: RunConfig) -> int:
    """Return the most iterations with gradient that any step of the run has."""
    return config.depth.mean_recurrence if config.depth.sampler == "full" else config.depth.mean_backprop_depth


def state_bytes(config: RunConfig, shards: int, accumulation: int, ranks_per_node: int | None = None) -> State:
    """Return what DeepSpeed 0.19 was seen to hold, at its peak in a backward pass; `accumulation` micro-batches a step.

    `ranks_per_node` is that of a run in nodes, None for one over the whole world.
    With bf16 at stage 1 it sums whole gradients in float32 beside the 16-bit ones of the pass, which stay until its
    end; in nodes and in float32 it needs whole sums only between micro-batches. The gradients of the core become final
    with its first iteration, and are whole until then at every stage.
    """
    with FakeTensorMode(), torch.device("cpu"):
        model = RecurrentDepthModel(config.model)
        groups = build_optimizer(config.optimizer, model).param_groups
    moments = sum(4 * tensor.numel() * len(group["state_names"]) for group in groups for tensor in group["params"])
    parameters, core = count_parameters(model), count_parameters(model.transformer.recurrence)
    stage, width, offload = config.zero.stage, _WIDTHS[config.train.precision], config.zero.offload_optimizer
    if stage == 0:
        return State(
            weights=4 * parameters, gradients=4 * parameters, master=0, optimizer=moments, buckets=0, on_host=0
        )
    wrapped = stage == 1 and config.train.precision == "bf16" and ranks_per_node is None and not offload
    shard = _MASTER * parameters // shards
    summed = _MASTER * parameters if wrapped or (stage == 1 and accumulation > 1) else shard
    elements = _BUCKET if ranks_per_node is None else 2 * config.comm.chunk_mb * 2**20 // 4 * ranks_per_node
    master, optimizer = shard, moments // shards
    return State(
        weights=width * (parameters // shards + core if stage == 3 else parameters),
        gradients=summed + width * (parameters if wrapped else core),
        master=master,
        optimizer=optimizer,
        buckets=0 if wrapped else (4 if stage == 3 else width) * elements,
        on_host=master + optimizer + shard if offload else 0,
    )


def activation_bytes(config: RunConfig, policy: str, depth: int) -> tuple[int, int]:
    """Return (peak of activations in a pass with `depth` iterations with gradient, what each further one adds).

    Measured on tensors without storage: forward and backward pass run, and every storage that they make is followed.
    Weights and their gradients are not among them. From the second iteration on each adds the same.
    """
    few = min(depth, 2)
    peak = _measure(config, policy, few)
    each = peak - _measure(config, policy, few - 1) if few > 1 else 0
    return peak + (depth - few) * each, each


def _measure(config: RunConfig, policy: str, k: int) -> int:
    rows, length = config.train.micro_batch_size, config.model.block_size
    attention = "sdpa"  # flash keeps the same tensors
    with FakeTensorMode(), torch.device("cpu"):
        torch.set_default_dtype(_DTYPES[config.train.precision])  # tensors without storage cannot be cast in place
        try:
            model = RecurrentDepthModel(config.model, attention, policy, config.objective)
        finally:
            torch.set_default_dtype(torch.float32)
        model.rotary(length, torch.device("cpu"))
        ids = torch.zeros(rows, length, dtype=torch.int64)
        documents = ids if config.train.document_mask else None
        embedded: list[torch.Tensor] = []

        def cut(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
            # Of the backward pass only what follows is asked for, so that no gradient of a weight is made.
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        model.transformer.wte.register_forward_hook(cut)
        state = torch.zeros(rows, length, config.model.n_embd, dtype=_DTYPES[config.train.precision])
        with _Storages() as storages:
            loss = model(ids, state, (1, k), ids, documents=documents)
            torch.autograd.backward(loss, inputs=embedded)
    return int(storages.peak)


class _Storages(TorchDispatchMode):
    """Adds up the bytes of all storages made under it while they live.

    Attributes:
        peak: the most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._living = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if id(storage) not in known and storage not in self._seen:
                self._seen.add(storage)
                self._living += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self._living)
        return output

    def _release(self, nbytes: int) -> None:
        self._living -= nbytes


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _check(config: RunConfig, ranks: int, ranks_per_node: int, memory_gb: float | None) -> None:
    for name, value in (("--ranks", ranks), ("--ranks-per-node", ranks_per_node)):
        if value < 1:
            raise ConfigError(f"{name} {value}: is not positive")
    if ranks % ranks_per_node and ranks > ranks_per_node:
        raise ConfigError(f"--ranks {ranks}: is not a multiple of --ranks-per-node {ranks_per_node}")
    if memory_gb is not None and not memory_gb > 0.0:
        raise ConfigError(f"--memory-gb {memory_gb}: is not positive")
    config.train.check_world_size(ranks, config.schedule)
