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


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO (arXiv 1910.02054): what is sharded over the ranks."""

    stage: int = 1
    """0 nothing, 1 optimizer state, 2 also gradients."""

    def __post_init__(self) -> None:
        """Refuse stages that are not there."""
        if self.stage not in (0, 1, 2):
            raise ConfigError(f"zero.stage: {self.stage} is not one of 0, 1, 2")


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

    settings = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": gradient_clipping if stage > 0 else 0.0,  # stage 0: `optimizer_step`
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        # Sums over thousands of ranks and micro-batches lose too much in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every stage of bf16
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Use `learning_rate` in the next optimizer step of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


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
    """Yield the pieces of weights and optimizer state that this rank works on: its shard, or all without ZeRO.

    DeepSpeed flattens every parameter group and gives each rank an equal range of it; `_hp_mapping` says which piece
    of which parameter lies in this rank's range (its universal checkpoint is made from the same addresses).
    """
    optimizer = base_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 0:
            state = {key: value.view(-1) for key, value in _tensors_like(parameter, optimizer)}
            weight = parameter.data.view(-1)
            yield Fragment(parameter=reference_name(name), start=0, weight=weight, optimizer_state=state)
            continue
        mapping = parameter._hp_mapping  # noqa: SLF001 (DeepSpeed has no public name for it)
        if mapping is None:
            continue
        flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
        address = mapping.hp_fragment_address
        piece = slice(address.start, address.start + address.numel)
        yield Fragment(
            parameter=reference_name(name),
            start=mapping.lp_fragment_address.start,
            weight=flat.data[piece],
            optimizer_state={key: value[piece] for key, value in _tensors_like(flat, optimizer)},
        )


def publish_weights(engine: Any) -> None:
    """Give every rank the model's weights from the master shards that `local_fragments` filled; a collective."""
    if engine.zero_optimization_stage() > 0:
        engine.optimizer.update_lp_params()


def allocate_optimizer_state(engine: Any, names: list[str], steps_done: float) -> None:
    """Create zeroed optimizer state, as after `steps_done` steps, to be filled through `local_fragments`."""
    optimizer = base_optimizer(engine)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # Fused optimizers read it on the parameter's device.
            state["step"] = torch.tensor(float(steps_done), dtype=torch.float32, device=parameter.device)
            for name in names:
                state[name] = torch.zeros_like(parameter)


def _tensors_like(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    state = optimizer.state.get(parameter, {})
    return [(key, value) for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape]
