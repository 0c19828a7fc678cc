"""Where DeepSpeed's sharded optimizers keep a rank's gradients, and when they are final inside its node.

DeepSpeed has no public way to put a reduction between its own and the optimizer's step. All its private names that
this needs are here; `require` names the one that a new version lacks.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.sharding import Piece
from pipeline.two_level import Part

Pieces = list[tuple[int, Piece]]
"""(number of the parameter in the model, this rank's piece of it)."""


def require(owner: Any, *names: str) -> None:
    """Check that `owner`, an object of DeepSpeed, has the private attributes `names`.

    Raises:
        RuntimeError: it has not, and what to do.
    """
    import deepspeed

    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__}: {type(owner).__name__} has no {', '.join(missing)}, which"
            " zero.scope=node needs; install the version of constraints.txt, or use zero.scope=world"
        )


def sharded_gradients(stage: int, optimizer: Any, parameters: list[torch.nn.Parameter], pieces: Pieces) -> _Gradients:
    """Return the gradients of DeepSpeed's `optimizer`, a wrapper of stage 1, 2 or 3."""
    return (_Stage3 if stage == 3 else _Stages1And2)(optimizer, parameters, pieces)


class _Gradients(ABC):
    """See `pipeline.two_level.ShardedGradients`.

    Args:
        optimizer: DeepSpeed's wrapper.
        parameters: all of the model, in order.
        pieces: this rank's pieces of them.
    """

    def __init__(self, optimizer: Any, parameters: list[torch.nn.Parameter], pieces: Pieces) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        self.parts = [self._part(number, piece) for number, piece in pieces]

    @abstractmethod
    def _part(self, number: int, piece: Piece) -> Part: ...

    @abstractmethod
    def flats(self) -> list[torch.Tensor]: ...

    @abstractmethod
    def watch(self, final: Callable[[list[int]], None], poll: Callable[[], None]) -> None: ...

    @abstractmethod
    def averaged(self) -> None: ...

    def _hook(self, stream: Any, final: Callable[[list[int]], None], reduced: list[torch.nn.Parameter]) -> None:
        """Report parameters that DeepSpeed has reduced on `stream`, if this is the step's last micro-batch."""
        if self._optimizer.is_gradient_accumulation_boundary():
            with _on(stream):
                final([self._numbers[id(parameter)] for parameter in reduced])


class _Stages1And2(_Gradients):
    """The shard of a parameter group is one flat float32 tensor.

    DeepSpeed has it if gradients are summed in a wider type than the model's. It is made so for a float32 model too:
    its shard would lie scattered in the parameters' own gradients, complete only at the end of the backward pass.
    """

    def __init__(self, optimizer: Any, parameters: list[torch.nn.Parameter], pieces: Pieces) -> None:
        require(
            optimizer,
            "_use_compact_grad_partition_buffer",  # whether the shard is flat
            "_get_compact_grad_partition_buffer",  # makes it, holds it as `flat_partition`
            "reduce_ipg_grads",  # reduces what it has collected in `ipg_buckets`
            "ipg_buckets",
            "bit16_groups",
            "single_partition_of_fp32_groups",
            "reduction_stream",
        )
        optimizer._use_compact_grad_partition_buffer = lambda group: True  # noqa: SLF001
        super().__init__(optimizer, parameters, pieces)

    def _part(self, number: int, piece: Piece) -> Part:
        masters = self._optimizer.single_partition_of_fp32_groups
        flat = next(index for index, master in enumerate(masters) if master is piece.flat)
        return Part(parameter=number, flat=flat, offset=piece.offset, numel=piece.numel)

    def flats(self) -> list[torch.Tensor]:
        optimizer = self._optimizer
        groups = range(len(optimizer.bit16_groups))
        return [optimizer._get_compact_grad_partition_buffer(group).flat_partition for group in groups]  # noqa: SLF001

    def watch(self, final: Callable[[list[int]], None], poll: Callable[[], None]) -> None:
        optimizer, reduce = self._optimizer, self._optimizer.reduce_ipg_grads

        def reduce_and_report(comm_dtype: Any = None) -> None:
            buckets = optimizer.ipg_buckets if comm_dtype is None else [comm_dtype]
            addresses = [address for bucket in buckets for address in optimizer.ipg_buckets[bucket].params]
            reduce(comm_dtype=comm_dtype)
            reduced = [optimizer.bit16_groups[group][index] for group, index, _ in addresses]
            self._hook(optimizer.reduction_stream, final, reduced)

        optimizer.reduce_ipg_grads = reduce_and_report
        _poll_in_hooks(self._parameters, poll)

    def averaged(self) -> None:
        if not self._optimizer.cpu_offload:
            return
        # The optimizer's copy in host memory and the norms of its pieces were made when the node had reduced them.
        optimizer = self._optimizer
        for master, flat in zip(optimizer.single_partition_of_fp32_groups, self.flats(), strict=True):
            master.grad.copy_(flat)
        for part in self.parts:
            gradient = optimizer.single_partition_of_fp32_groups[part.flat].grad
            norm = gradient[part.offset : part.offset + part.numel].norm(2)
            optimizer.norm_for_param_grads[optimizer.get_param_id(self._parameters[part.parameter])] = norm


class _Stage3(_Gradients):
    """Stage 3 keeps its parts of all parameters in one flat tensor, group after group."""

    def __init__(self, optimizer: Any, parameters: list[torch.nn.Parameter], pieces: Pieces) -> None:
        require(
            optimizer,
            "grad_partitions_flat_buffer",
            "fp32_partitioned_groups_flat",
            "partition_grads",  # takes the node's reduced gradients apart and adds this rank's part to the buffer
            "reduce_and_partition_stream",
        )
        sizes = [master.numel() for master in optimizer.fp32_partitioned_groups_flat]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        super().__init__(optimizer, parameters, pieces)

    def _part(self, number: int, piece: Piece) -> Part:
        masters = self._optimizer.fp32_partitioned_groups_flat
        group = next(index for index, master in enumerate(masters) if master is piece.flat)
        return Part(parameter=number, flat=0, offset=self._starts[group] + piece.offset, numel=piece.numel)

    def flats(self) -> list[torch.Tensor]:
        return [self._optimizer.grad_partitions_flat_buffer]

    def watch(self, final: Callable[[list[int]], None], poll: Callable[[], None]) -> None:
        optimizer, partition = self._optimizer, self._optimizer.partition_grads

        def partition_and_report(params_to_release: list[Any], grad_partitions: list[torch.Tensor]) -> Any:
            reduced = list(params_to_release)
            buffers = partition(params_to_release, grad_partitions)
            self._hook(optimizer.reduce_and_partition_stream, final, reduced)
            return buffers

        optimizer.partition_grads = partition_and_report
        _poll_in_hooks(self._parameters, poll)

    def averaged(self) -> None:
        if not self._optimizer.offload_optimizer:
            return
        optimizer = self._optimizer
        for master, start in zip(optimizer.fp32_partitioned_groups_flat, self._starts, strict=True):
            master.grad.copy_(self.flats()[0][start : start + master.numel()])
        for part in self.parts:
            norm = self.flats()[0][part.offset : part.offset + part.numel].norm(2)
            optimizer.norm_for_param_grads[optimizer.get_param_id(self._parameters[part.parameter])] = norm


def _poll_in_hooks(parameters: list[torch.nn.Parameter], poll: Callable[[], None]) -> None:
    """Call `poll` whenever the gradient of a parameter is complete on this rank."""
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: poll())


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    """Queue the block's work on DeepSpeed's `stream`, None on a CPU."""
    if stream is None:
        yield
        return
    from deepspeed.accelerator import get_accelerator

    with get_accelerator().stream(stream):
        yield
