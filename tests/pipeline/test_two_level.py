"""What travels between nodes: every gradient once, in chunks whose order does not depend on when they are final."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.world import World
from pipeline import two_level
from pipeline.engine import ZeroConfig, check_sharding
from pipeline.errors import ConfigError
from pipeline.launch import CommConfig
from pipeline.shard_gradients import require
from pipeline.two_level import Part, ShardAverage, Transport, build_levels, cut


@st.composite
def shards(draw: st.DrawFn) -> list[Part]:
    """Parts of parameters, some cut by the shard's ends, in one or two flat tensors."""
    parts, number = [], 0
    for flat in range(draw(st.integers(1, 2))):
        offset = 0
        for numel in draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)):
            parts.append(Part(parameter=number, flat=flat, offset=offset, numel=numel))
            number, offset = number + 1, offset + numel
    return parts


class Doubling(Transport):
    """Two nodes with the same gradients."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []

    def start(self, chunk: torch.Tensor) -> None:
        self.started.append((int(chunk.storage_offset()), chunk.numel()))
        chunk.mul_(2.0)

    def poll(self) -> None: ...

    def wait(self) -> None: ...


class Shard:
    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.watchers: list[Callable[[list[int]], None]] = []
        ends = [
            max(each.offset + each.numel for each in parts if each.flat == flat) for flat in {p.flat for p in parts}
        ]
        self.tensors = [torch.arange(1.0, end + 1.0) for end in ends]

    def flats(self) -> list[torch.Tensor]:
        return self.tensors

    def watch(self, final: Callable[[list[int]], None], poll: Callable[[], None]) -> None:
        self.watchers.append(final)

    def averaged(self) -> None: ...


@given(parts=shards(), size=st.integers(1, 60))
def test_every_element_travels_once_in_chunks_of_at_most_the_size(parts: list[Part], size: int) -> None:
    chunks = cut(parts, size)
    sent = [(chunk.flat, element) for chunk in chunks for element in range(chunk.start, chunk.stop)]
    held = [(part.flat, part.offset + element) for part in parts for element in range(part.numel)]
    assert sorted(sent) == sorted(held)
    assert max(chunk.stop - chunk.start for chunk in chunks) <= size
    last = [min(chunk.parameters) for chunk in chunks]
    assert last == sorted(last, reverse=True)  # as the backward pass reaches them


@given(parts=shards(), randomness=st.randoms(use_true_random=False))
def test_chunks_begin_in_one_order_whatever_is_final_first_and_none_before_it_is(
    parts: list[Part], randomness: Random
) -> None:
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_level, "MEGABYTE", 4 * 16)
        for overlap in (True, False):
            shard, transport = Shard(parts), Doubling()
            average = ShardAverage(shard, transport, 2, CommConfig(chunk_mb=1, overlap=overlap))
            order = [part.parameter for part in parts]
            randomness.shuffle(order)
            reached: set[int] = set()
            for parameter in order:
                reached.add(parameter)
                for final in shard.watchers:
                    final([parameter])
                assert all(chunk.parameters <= reached for chunk in average.chunks[: average.begun])
            assert average.begun == (len(average.chunks) if overlap else 0)
            expected = [tensor.clone() for tensor in Shard(parts).tensors]
            average.finish()
            assert average.begun == 0
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(shard.tensors, expected, strict=True))
            runs.append(transport.started)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ZeroConfig(scope="rack"), "zero.scope: 'rack' is not one of world, node"),
        (lambda: ZeroConfig(stage=4), "zero.stage: 4"),
        (lambda: ZeroConfig(stage=0, offload_optimizer=True), "zero.offload_optimizer: stage 0"),
        (lambda: check_sharding(ZeroConfig(), CommConfig(transport="mpi"), "bf16"), "set zero.scope=node"),
        (lambda: check_sharding(ZeroConfig(stage=0), CommConfig(), "fp16"), "train.precision = fp16; use zero.stage=1"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key_and_a_way_out(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_unequal_nodes_are_refused_with_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_level, "ranks_of_nodes", lambda world: [[0, 1], [2]])
    with pytest.raises(ConfigError, match=r"zero\.scope: .*nodes of 1 and of 2; .* use zero\.scope=world"):
        build_levels(CommConfig(), World())


def test_a_deepspeed_without_a_name_that_is_used_is_refused_by_that_name() -> None:
    with pytest.raises(RuntimeError, match=r"SimpleNamespace has no reduce_ipg_grads, .*zero\.scope=world"):
        require(SimpleNamespace(ipg_buckets={}), "ipg_buckets", "reduce_ipg_grads")
