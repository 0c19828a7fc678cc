"""DeepSpeed behind a few functions: construction, steps, and where each rank's share of the state lies."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn

from data_prep.world import World
from pipeline.accelerator import has_accelerator, sharding_problem
from pipeline.errors import ConfigError, RunError
from pipeline.launch import CommConfig
from pipeline.model import reference_name
from pipeline.shard_gradients import require, sharded_gradients
from pipeline.sharding import Piece, ShardedOptimizer, Sharers
from pipeline.two_level import (
    NODE,
    Levels,
    ShardAverage,
    WholeAverage,
    build_levels,
    build_transport,
    check_levels,
    chunk_numel,
)
from pipeline.update_gate import UpdateGate

SCOPES = ("world", "node")
# The module that holds the whole loop, and a size that no parameter group reaches.
_LEAF = "transformer.recurrence"
_ONE_SUB_GROUP = 2**60
# Attributes of DeepSpeed's `DynamicLossScaler`.
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO (arXiv 1910.02054): what is sharded over the ranks."""

    stage: int = 1
    """0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    scope: str = "world"
    """Shard over all ranks of the world, or over those of a node, whose shards are averaged between nodes."""
    offload_optimizer: bool = False
    """Keep optimizer state and float32 weights in host memory, and update them there."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero.stage: {self.stage} is not one of 0, 1, 2, 3")
        if self.scope not in SCOPES:
            raise ConfigError(f"zero.scope: {self.scope!r} is not one of {', '.join(SCOPES)}")
        if self.offload_optimizer and self.stage == 0:
            raise ConfigError("zero.offload_optimizer: stage 0 keeps its state beside the weights; use zero.stage=1")


def check_sharding(zero: ZeroConfig, comm: CommConfig, precision: str) -> None:
    """Refuse combinations that cannot work, or have no effect.

    Raises:
        ConfigError: with the reason and what to set instead.
    """
    if precision != "fp32" and zero.stage == 0:
        raise ConfigError(
            f"zero.stage: 0 keeps no float32 master weights for train.precision = {precision}; use zero.stage=1"
        )
    if comm.transport == "mpi" and zero.scope != "node":
        raise ConfigError("comm.transport: mpi carries what zero.scope=node sends between nodes; set zero.scope=node")
    if problem := sharding_problem(zero.stage):
        raise ConfigError(f"zero.stage: {problem}")


def check_ranks(zero: ZeroConfig, comm: CommConfig, world: World) -> None:
    """Refuse ranks that `zero.scope` cannot divide into nodes; a collective, before a process group is started.

    Raises:
        ConfigError: the nodes have different numbers of ranks; on every rank.
        LaunchError: comm.transport is mpi, but the ranks were not started by MPI.
    """
    if zero.scope == "node":
        check_levels(comm, world)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse arithmetic that the device does not have; after the process group has started.

    Raises:
        ConfigError: fp16 where DeepSpeed's accelerator lacks it, as on most CPUs.
    """
    if precision == "fp16":
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise ConfigError(
                f"train.precision: fp16 is not in the arithmetic of this device ({device.type}); use bf16 or fp32"
            )


@dataclass(kw_only=True)
class Fragment:
    """A contiguous piece of one parameter's float32 state that this rank owns.

    Attributes:
        parameter: the reference's name.
        start: first element in the flattened parameter.
        weight: (numel,) float32 master weights.
        optimizer_state: name -> (numel,) tensors of the optimizer, empty before the first step.
    """

    parameter: str
    start: int
    weight: torch.Tensor
    optimizer_state: dict[str, torch.Tensor]


class _NodeParallel:
    """What DeepSpeed asks of its argument `mpu`: data parallelism over the ranks of a node, no model parallelism."""

    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    def get_data_parallel_group(self) -> Any:
        return self._levels.node

    def get_data_parallel_world_size(self) -> int:
        return self._levels.size

    def get_data_parallel_rank(self) -> int:
        return self._levels.place

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def build_engine(  # noqa: PLR0913 (all of it decides what DeepSpeed does)
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    zero: ZeroConfig,
    comm: CommConfig,
    precision: str,
    gradient_clipping: float,
    global_batch_size: int,
    micro_batch_size: int,
    world: World,
) -> Any:
    """Return a `deepspeed.DeepSpeedEngine` around `model`; a collective. The process group must have been started.

    Raises:
        ConfigError: unequal nodes with zero.scope = node.
        LaunchError: comm.transport = mpi without MPI.
    """
    import deepspeed
    from deepspeed.utils import groups, logger, set_z3_leaf_module

    levels = build_levels(comm, world) if zero.scope == "node" else None
    device = next(model.parameters()).device
    if zero.stage == 3:
        set_z3_leaf_module(model.get_submodule(_LEAF), True)
    settings = {
        "train_batch_size": global_batch_size // (1 if levels is None else levels.nodes),
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": gradient_clipping if zero.stage > 0 else 0.0,  # stage 0: `optimizer_step`
        "zero_optimization": _zero_settings(zero, comm, levels),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload without its compiled Adam
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0},  # 0: dynamic
        # Sums over thousands of ranks and micro-batches lose too much in 16 bits.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    groups.mpu = None  # DeepSpeed keeps it for the process; an engine before this one may have had nodes
    mpu = None if levels is None else _NodeParallel(levels)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    with contextlib.redirect_stdout(io.StringIO()), _shards_of_gradients_in_bf16(levels):  # it prints its memory
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)
    logger.setLevel(level)
    engine.rookery_levels = levels
    engine.rookery_gate = UpdateGate(base_optimizer(engine))
    engine.rookery_average = None if levels is None else _average_between_nodes(engine, levels, comm, world, device)
    if isinstance(optimizer, ShardedOptimizer):
        group = torch.distributed.group.WORLD if levels is None else levels.node
        name = "world" if levels is None else NODE
        sharers = Sharers(group=group, name=name, device=device) if zero.stage > 0 else None
        optimizer.place(dict(pieces(engine)), sharers)
    return engine


def _zero_settings(zero: ZeroConfig, comm: CommConfig, levels: Levels | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"stage": zero.stage}
    if zero.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": has_accelerator()}
    if zero.stage == 3:
        # A leaf is gathered once a pass. Without it the trace of gathers is invalidated whenever the number of
        # iterations changes, and every iteration gathers the core anew. Persistent parameters would be gathered one
        # by one, and several sub-groups would be several steps of the optimizer.
        settings |= {"stage3_param_persistence_threshold": 0, "sub_group_size": _ONE_SUB_GROUP}
    if levels is not None:
        # The node reduces while the backward pass goes on, in buckets that complete about one chunk of every shard.
        settings |= {"overlap_comm": True, "reduce_bucket_size": chunk_numel(comm) * levels.size}
    return settings


@contextlib.contextmanager
def _shards_of_gradients_in_bf16(levels: Levels | None) -> Iterator[None]:
    """Make DeepSpeed treat bf16 at stage 1 as it treats fp16 and float32, in nodes.

    By default it takes an optimizer for it that sums whole gradients on every rank and clips by a norm over them; of
    those only this rank's shard would be averaged between nodes.
    """
    if levels is None:
        yield
        return
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine

    require(DeepSpeedEngine, "_do_optimizer_sanity_check")  # chooses the wrapper of the optimizer
    original = DeepSpeedEngine._do_optimizer_sanity_check  # noqa: SLF001

    def choose(engine: Any, optimizer: Any) -> Any:
        chosen = original(engine, optimizer)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = choose  # noqa: SLF001
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = original  # noqa: SLF001


def _average_between_nodes(
    engine: Any, levels: Levels, comm: CommConfig, world: World, device: torch.device
) -> ShardAverage | WholeAverage:
    transport = build_transport(comm, levels, world, device)
    parameters = list(engine.module.parameters())
    stage = engine.zero_optimization_stage()
    if stage == 0:
        require(engine, "enable_backward_allreduce")  # whether it reduces gradients at stage 0 at all
        engine.enable_backward_allreduce = False
        return WholeAverage(parameters, levels, transport, comm)
    found = dict(pieces(engine))
    names = [reference_name(name) for name, _ in engine.module.named_parameters()]
    numbered = [(number, found[name]) for number, name in enumerate(names) if name in found]
    gradients = sharded_gradients(stage, engine.optimizer, parameters, numbered)
    return ShardAverage(gradients, transport, levels.nodes, comm)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Use `learning_rate` in the next optimizer step; groups with a peak of their own follow in proportion."""
    for group in base_optimizer(engine).param_groups:
        group["lr"] = learning_rate * group["rate_ratio"]


def set_accumulation(engine: Any, micro_batches: int) -> None:
    """Make the next optimizer step one of `micro_batches` micro-batches a rank; between steps only."""
    if micro_batches != engine.gradient_accumulation_steps():
        engine.set_train_batch_size(
            micro_batches * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size  # a node's with scope node
        )
        # DeepSpeed takes the end of a step from the number of all micro-batches so far, as if it had never changed.
        engine.micro_steps = 0


def optimizer_step(engine: Any, gradient_clipping: float) -> float:
    """Advance one micro-batch, the optimizer with the last one; return the norm of the whole gradient before clipping.

    With the last one `engine.rookery_gate` may hold the weights; what it asks finds the norm in `whole_norm`.

    The norm is nan before the last micro-batch, and inf if it was not finite: then the weights are left as they were
    (`step_skipped`), as in fp16 whenever the loss scale is too large. Without ZeRO DeepSpeed clips but does not say
    the norm, so it is done here.

    Raises:
        RunError: fp16 gradients overflow although the loss scale is as small as it gets.
    """
    sharded, boundary = engine.zero_optimization_stage() > 0, engine.is_gradient_accumulation_boundary()
    norm = math.nan
    if boundary and engine.rookery_average is not None:
        engine.rookery_average.finish()
    if boundary and not sharded:
        norm = float(nn.utils.clip_grad_norm_(engine.module.parameters(), gradient_clipping or math.inf))
        engine.rookery_norm = norm
    scaler = _dynamic_scaler(engine)
    smallest = scaler is not None and scaler.cur_scale <= scaler.min_scale and scaler.cur_hysteresis <= 1
    if smallest:
        scaler.raise_error_at_min_scale = False  # its own error has no type and no advice
    engine.step()
    if boundary and step_skipped(engine):
        if smallest:
            raise RunError(
                "train.precision: fp16 gradients overflow at the smallest loss scale; start again with"
                " train.precision=bf16 or a lower optimizer.learning_rate"
            )
        if hasattr(engine.optimizer, "averaged_gradients"):
            # With offload, stages 1 and 2 of DeepSpeed 0.19 would add the next gradients to those that overflowed.
            engine.optimizer.averaged_gradients.clear()
    return float(engine.get_global_grad_norm()) if boundary and sharded else norm


def whole_norm(engine: Any) -> float:
    """Return the norm of the whole gradient before clipping, as the optimizer's step begins."""
    if engine.zero_optimization_stage() == 0:
        return float(engine.rookery_norm)
    require(engine.optimizer, "_global_grad_norm")  # the engine's public name has it only after the step
    return float(engine.optimizer._global_grad_norm)  # noqa: SLF001


def step_skipped(engine: Any) -> bool:
    """Return whether the last optimizer step left the weights as they were because the gradient was not finite."""
    return bool(getattr(engine.optimizer, "overflow", False))


def loss_scale_state(engine: Any) -> dict[str, float]:
    """Return what the next loss scales follow from, for a checkpoint: empty if no loss was scaled or step skipped."""
    state = {"skipped_steps": float(engine.skipped_steps)} if engine.skipped_steps else {}
    scaler = _dynamic_scaler(engine)
    if scaler is not None:
        state = {"skipped_steps": float(engine.skipped_steps)}
        state |= {name: float(getattr(scaler, name)) for name in _SCALER_STATE}
    return state


def restore_loss_scale(engine: Any, state: dict[str, float]) -> None:
    """Go on from what `loss_scale_state` returned, at another precision too.

    Before or after `allocate_optimizer_state`, which counts the run's steps: skipped ones are none of the optimizer's.
    """
    skipped = int(state.get("skipped_steps", 0))
    _count_steps(engine, engine.skipped_steps - skipped)
    engine.skipped_steps = skipped
    scaler = _dynamic_scaler(engine)
    for name in _SCALER_STATE if scaler is not None else ():
        if name in state:
            kind = type(getattr(scaler, name))
            setattr(scaler, name, kind(state[name]))


def _dynamic_scaler(engine: Any) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _count_steps(engine: Any, steps: int) -> None:
    """Add `steps` to the number of steps that the optimizer believes to have done, if it has done any."""
    optimizer = base_optimizer(engine)
    if not optimizer.state:
        return
    if isinstance(optimizer, ShardedOptimizer):
        for group in optimizer.param_groups:
            group["steps_done"] += steps
    else:
        for _, flat in _flat_parameters(engine):
            optimizer.state[flat]["step"] += steps


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer under DeepSpeed's wrapper."""
    wrapped: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return wrapped


def owned_fragments(engine: Any, rank: int) -> Iterator[Fragment]:
    """Yield the pieces that this rank has to save; together the ranks save each element once."""
    levels: Levels | None = engine.rookery_levels
    # With zero.scope = node every node holds the same shards.
    if rank == 0 or (engine.zero_optimization_stage() > 0 and (levels is None or levels.index == 0)):
        yield from local_fragments(engine)


def local_fragments(engine: Any) -> Iterator[Fragment]:
    """Yield the pieces of weights and optimizer state that this rank works on: its shard, or all without ZeRO."""
    optimizer = base_optimizer(engine)
    for name, piece in pieces(engine):
        yield Fragment(
            parameter=name,
            start=piece.start,
            weight=piece.of(piece.flat),
            optimizer_state={key: piece.of(value) for key, value in _tensors_like(piece.flat, optimizer)},
        )


def pieces(engine: Any) -> Iterator[tuple[str, Piece]]:
    """Yield (reference's name, this rank's piece) for every parameter of which it has one.

    Stages 1 and 2: DeepSpeed flattens every parameter group and gives each rank an equal range of it; `_hp_mapping`
    says which piece of which parameter lies in this rank's range. Stage 3 cuts every parameter in equal parts, the
    last one padded; `grad_position` says where this rank's part lies in its flat vector. DeepSpeed's universal
    checkpoint is made from the same addresses.
    """
    stage, wrapper, levels = engine.zero_optimization_stage(), engine.optimizer, engine.rookery_levels
    place = torch.distributed.get_rank() if levels is None else levels.place
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            piece = Piece(flat=parameter, offset=0, start=0, numel=parameter.numel())
        elif stage == 3:
            group, offset, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = part * place
            flat = wrapper.fp32_partitioned_groups_flat[group]
            piece = Piece(flat=flat, offset=offset, start=start, numel=min(part, parameter.ds_numel - start))
        else:
            mapping = parameter._hp_mapping  # noqa: SLF001 (DeepSpeed has no public name for it)
            if mapping is None:
                continue
            piece = Piece(
                flat=base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0],
                offset=mapping.hp_fragment_address.start,
                start=mapping.lp_fragment_address.start,
                numel=mapping.hp_fragment_address.numel,
            )
        if piece.numel > 0:
            yield reference_name(name), piece


def publish_weights(engine: Any) -> None:
    """Give every rank the model's weights from the master shards that `local_fragments` filled; a collective."""
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        for index in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)  # noqa: SLF001 (as its own step does)
    elif stage > 0:
        wrapper.update_lp_params()


def release_gathered(engine: Any) -> None:
    """Let ZeRO stage 3 forget forward passes that had no backward pass; a collective.

    DeepSpeed keeps weights that it expects to be used next, and learns what that is from the passes before. In the
    training's next pass it would gather some in the backward pass that it had prefetched in the forward pass, which
    selective checkpointing takes for an error.
    """
    if engine.zero_optimization_stage() == 3:
        engine.empty_partition_cache()
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        require(coordinator, "_invalidate_trace")
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()  # noqa: SLF001 (as it does itself where a pass is not what it expects)


def allocate_optimizer_state(engine: Any, names: list[str], steps_done: float) -> None:
    """Create zeroed optimizer state, as after `steps_done` steps of the run, to be filled through `local_fragments`."""
    optimizer, steps_done = base_optimizer(engine), steps_done - engine.skipped_steps
    for group, flat in _flat_parameters(engine):
        state = optimizer.state[flat]
        if isinstance(optimizer, ShardedOptimizer):
            group["steps_done"] = int(steps_done)
        else:  # fused optimizers read it on the parameter's device
            state["step"] = torch.tensor(float(steps_done), dtype=torch.float32, device=flat.device)
        for name in names:
            if name in group.get("state_names", names):
                state[name] = torch.zeros_like(flat, requires_grad=False)


def _flat_parameters(engine: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return (parameter group, parameter) of all that the optimizer updates; stage 3 shows them only during a step."""
    groups, wrapper = base_optimizer(engine).param_groups, engine.optimizer
    if engine.zero_optimization_stage() < 3:
        return [(group, parameter) for group in groups for parameter in group["params"]]
    flats = wrapper.fp32_partitioned_groups_flat
    return [(groups[wrapper.sub_group_to_group_id[index]], flat) for index, flat in enumerate(flats)]


def _tensors_like(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    state = optimizer.state.get(parameter, {})
    return [(key, value) for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape]
