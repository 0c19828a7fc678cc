"""DeepSpeed behind a few functions: rendezvous, construction, and where each rank's share of the state lies."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import nn

from data_prep.world import World
from pipeline.accelerator import communication_backend, device_identity, select_device
from pipeline.errors import ConfigError
from pipeline.model import reference_name
from pipeline.sharding import Piece, ShardedOptimizer

# The module that holds the whole loop, and a size that no parameter group reaches.
_LEAF = "transformer.recurrence"
_ONE_SUB_GROUP = 2**60


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO (arXiv 1910.02054): what is sharded over the ranks."""

    stage: int = 1
    """0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""

    def __post_init__(self) -> None:
        """Refuse stages that are not there."""
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero.stage: {self.stage} is not one of 0, 1, 2, 3")


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


def start_process_group(world: World, timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Agree on a rendezvous over the control plane, start the collective library, and return this rank's device."""
    host, cores = socket.gethostname(), sorted(os.sched_getaffinity(0))
    places = world.allgather((host, cores))
    hosts = [name for name, _ in places]
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that the launcher did not bind to cores of their own share them; more threads than cores thrash.
        torch.set_num_threads(max(1, len(cores) // places.count((host, cores))))
    local_rank = hosts[: world.rank].count(host)
    alone = len(set(hosts)) == 1
    if alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address, port = world.broadcast(_rendezvous(alone))
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_SIZE=str(hosts.count(host)),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    with world.guard("device selection"):
        device = select_device(local_rank)
    with world.guard("device selection"):
        users = world.allgather((host, device_identity(device)))
        if users[world.rank][1] is not None and users.count(users[world.rank]) > 1:
            raise ConfigError(f"several ranks on {host} have the same device {device}: start one rank a device")
    # DeepSpeed takes it for the index of the device, which a scheduler that binds devices makes 0 on every rank.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that this PyTorch deprecates; nobody who runs a job can act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would probe compilers and build a shared-memory operator for CPU inference: a minute that looks like a
    # hang, and buffers in /dev/shm that outlive a killed rank. Training uses none of its compiled operators.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.init_distributed(
        dist_backend=communication_backend(device), auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    return device


def stop_process_group() -> None:
    """Leave the collective library; without it gloo sometimes aborts at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _rendezvous(alone: bool) -> tuple[str, int]:
    """Return an address of this host that the other ranks reach, and a port that is free on it now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    if alone:
        return "127.0.0.1", port
    try:
        own = socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        own = []
    # Without a name service there is the address that srun was started from, which is the first node's in a batch job.
    fallback = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", socket.gethostname())
    return next((address for address in own if not address.startswith("127.")), fallback), port


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    stage: int,
    precision: str,
    gradient_clipping: float,
    global_batch_size: int,
    micro_batch_size: int,
) -> Any:
    """Return a `deepspeed.DeepSpeedEngine` around `model`. The process group must have been started."""
    import deepspeed
    from deepspeed.utils import logger, set_z3_leaf_module

    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # A leaf is gathered once a pass. Without it the trace of gathers is invalidated whenever the number of
        # iterations changes, and every iteration gathers the core anew. Persistent parameters would be gathered one
        # by one, and several sub-groups would be several steps of the optimizer.
        set_z3_leaf_module(model.get_submodule(_LEAF), True)
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": _ONE_SUB_GROUP}

    settings = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": gradient_clipping if stage > 0 else 0.0,  # stage 0: `optimizer_step`
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        # Sums over thousands of ranks and micro-batches lose too much in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every stage of bf16
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    logger.setLevel(level)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.place(dict(_pieces(engine)), sharded=stage > 0)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Use `learning_rate` in the next optimizer step; groups with a peak of their own follow in proportion."""
    for group in base_optimizer(engine).param_groups:
        group["lr"] = learning_rate * group["rate_ratio"]


def set_accumulation(engine: Any, micro_batches: int) -> None:
    """Make the next optimizer step one of `micro_batches` micro-batches a rank; between steps only."""
    if micro_batches != engine.gradient_accumulation_steps():
        engine.set_train_batch_size(
            micro_batches * engine.train_micro_batch_size_per_gpu() * torch.distributed.get_world_size()
        )
        # DeepSpeed takes the end of a step from the number of all micro-batches so far, as if it had never changed.
        engine.micro_steps = 0


def optimizer_step(engine: Any, gradient_clipping: float) -> float:
    """Advance one micro-batch, the optimizer with the last one; return the norm of the whole gradient before clipping.

    Without ZeRO DeepSpeed clips but does not say the norm, so it is done here; nan before the last micro-batch.
    """
    sharded, boundary = engine.zero_optimization_stage() > 0, engine.is_gradient_accumulation_boundary()
    norm = math.nan
    if boundary and not sharded:
        norm = float(nn.utils.clip_grad_norm_(engine.module.parameters(), gradient_clipping or math.inf))
    engine.step()
    return float(engine.get_global_grad_norm()) if boundary and sharded else norm


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer under DeepSpeed's wrapper."""
    wrapped: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return wrapped


def owned_fragments(engine: Any, rank: int) -> Iterator[Fragment]:
    """Yield the pieces that this rank has to save; together the ranks save each element once."""
    if rank == 0 or engine.zero_optimization_stage() > 0:
        yield from local_fragments(engine)


def local_fragments(engine: Any) -> Iterator[Fragment]:
    """Yield the pieces of weights and optimizer state that this rank works on: its shard, or all without ZeRO."""
    optimizer = base_optimizer(engine)
    for name, piece in _pieces(engine):
        yield Fragment(
            parameter=name,
            start=piece.start,
            weight=piece.of(piece.flat),
            optimizer_state={key: piece.of(value) for key, value in _tensors_like(piece.flat, optimizer)},
        )


def _pieces(engine: Any) -> Iterator[tuple[str, Piece]]:
    """Yield (reference's name, this rank's piece) for every parameter of which it has one.

    Stages 1 and 2: DeepSpeed flattens every parameter group and gives each rank an equal range of it; `_hp_mapping`
    says which piece of which parameter lies in this rank's range. Stage 3 cuts every parameter in equal parts, the
    last one padded; `grad_position` says where this rank's part lies in its flat vector. DeepSpeed's universal
    checkpoint is made from the same addresses.
    """
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            piece = Piece(flat=parameter, offset=0, start=0, numel=parameter.numel())
        elif stage == 3:
            group, offset, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = part * torch.distributed.get_rank()
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


def allocate_optimizer_state(engine: Any, names: list[str], steps_done: float) -> None:
    """Create zeroed optimizer state, as after `steps_done` steps, to be filled through `local_fragments`."""
    optimizer = base_optimizer(engine)
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
