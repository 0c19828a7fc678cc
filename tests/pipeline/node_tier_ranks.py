"""Run on every rank by tests: what two nodes of one host hold of checkpoints, and lose, and what they still make of it.

    LOCAL_WORLD_SIZE=2 mpiexec -n 4 python -m tests.pipeline.node_tier_ranks OUT

OUT/RANK.json holds what this rank saw, case by case; OUT/CASE are run directories.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.world import World
from pipeline.checkpoints import partner as partner_module
from pipeline.checkpoints.commit import commit, complete, make_partial, partial_of, shard_name, write_part
from pipeline.checkpoints.manifest import CheckpointManifest, Progress, checkpoints_in, encode_manifest
from pipeline.checkpoints.node_directory import (
    NodeTier,
    NodeTierConfig,
    discard_all,
    discard_newer,
    find_place,
)
from pipeline.checkpoints.node_tiers import Candidate, check, promote, survey
from pipeline.checkpoints.partner import Partner
from pipeline.checkpoints.shard import Snapshot, write_file
from pipeline.engine import Fragment

RUN = "0123abcd"
NUMEL = 4000
PARAMETER = "transformer.wte.weight"


def weights(step: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))


def arrived(partner: Partner) -> memoryview:
    """Return what came from the partner, when everything has come and gone."""
    while (content := partner.poll()) is None:
        time.sleep(1e-3)
    return content


class Ranks:
    """The ranks of two nodes, with a tier in memory and one on a disk."""

    def __init__(self, out: Path, world: World) -> None:
        self.out, self.world = out, world
        self.place = find_place(world)
        partner, reason = Partner.build(world, self.place)
        assert partner is not None, reason
        self.partner = partner
        self.tiers = {
            name: NodeTierConfig(every=1, directory=str(out / name), replicate=name == "memory")
            for name in ("memory", "local")
        }
        if world.rank == 0:
            for name in self.tiers:
                (out / name).mkdir()
        self.meet()
        self.opened = [NodeTier(out / name, RUN, self.place.name) for name in self.tiers]
        self.directory, self.local = (tier.path for tier in self.opened)

    def meet(self) -> None:
        self.world.allgather(None)

    def once(self, action: Callable[[], object]) -> None:
        """Do something on one rank, between what the others do before and after."""
        self.meet()
        if self.world.rank == 0:
            action()
        self.meet()

    def node(self, index: int) -> Path:
        return self.directory.with_name(self.place.names[index])

    def save(self, step: int) -> None:
        """Save as the saver does: own file and the partner's into the node's directory, the same manifest for all."""
        share = NUMEL // self.world.size
        start = self.world.rank * share
        piece = weights(step)[start : start + share]
        fragment = Fragment(parameter=PARAMETER, start=start, weight=piece, optimizer_state={"exp_avg": piece * 2})
        snapshot = Snapshot([fragment])
        snapshot.take([fragment])
        partial = partial_of(self.directory, step)
        with self.world.guard("save"):
            if self.place.place == 0:
                make_partial(self.directory, step)
        part = write_part(partial, self.world.rank, snapshot)
        self.partner.start(snapshot.memory)
        write_file(partial / shard_name(self.partner.source), arrived(self.partner))
        draft = CheckpointManifest(
            progress=Progress(step=step),
            config={},
            data_fingerprint="",
            tokenizer_sha256="",
            shapes={PARAMETER: [NUMEL]},
            run=RUN,
        )
        parts = self.world.allgather(part)
        content = self.world.broadcast(encode_manifest(complete(draft, parts)))
        if self.place.place == 0:
            commit(partial, content)
        self.meet()

    def look(self) -> dict[str, Any]:
        """What a survey finds, as JSON."""
        found = survey(self.world, self.tiers, RUN)
        return {"steps": [each.step for each in found.candidates], "problems": found.problems}

    def newest(self) -> Candidate:
        return survey(self.world, self.tiers, RUN).candidates[0]

    def promoted(self, candidate: Candidate, name: str) -> dict[str, Any]:
        """Try to promote it to the run directory OUT/NAME."""
        try:
            return {"promoted": str(promote(self.world, candidate, self.out / name)), "error": None}
        except Exception as error:
            return {"promoted": None, "error": str(error), "kinds": [kind.__name__ for kind in type(error).__mro__]}
        finally:
            self.meet()


def exchange(ranks: Ranks) -> dict[str, Any]:
    """Bytes of several sizes, of several messages each."""
    received, waited = [], []
    for size in (10_000, 10_001, 0, 2_500):
        # A rank's bytes are of its own size, and its own value.
        own = bytes([ranks.world.rank]) * (size + ranks.world.rank if size else 0)
        ranks.partner.start(memoryview(own))
        content = arrived(ranks.partner)
        received.append([len(content), sorted(set(bytes(content)))])
    if ranks.world.rank < 2:  # the other node comes late: polling says so, and does not wait for it
        ranks.partner.start(memoryview(b"early"))
        waited.append(ranks.partner.poll() is None)
        ranks.meet()
    else:
        ranks.meet()
        ranks.partner.start(memoryview(b"late"))
    return {
        "partner": ranks.partner.source,
        "received": received,
        "waited": waited,
        "last": bytes(arrived(ranks.partner)).decode(),
    }


def ring_of_four(ranks: Ranks) -> dict[str, Any]:
    """The same ranks as four nodes, where the next node is not the one before."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    partner, reason = Partner.build(ranks.world, find_place(ranks.world))
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    assert partner is not None, reason
    partner.start(memoryview(bytes([ranks.world.rank])))
    return {"received": list(arrived(partner)), "source": partner.source, "target": partner.target}


def nothing_yet(ranks: Ranks) -> dict[str, Any]:
    return ranks.look()


def lost_node(ranks: Ranks) -> dict[str, Any]:
    ranks.save(10)
    ranks.save(20)
    whole = ranks.look()
    ranks.once(lambda: shutil.rmtree(ranks.node(0)))
    candidate = ranks.newest()
    checked, problems = check(ranks.world, candidate)
    assert checked is not None
    assert not problems
    readers = sorted(copies[0].rank for copies in checked.copies.values())
    found = {"whole": whole, "left": ranks.look(), "readers": readers, **ranks.promoted(checked, "lost_node")}
    ranks.once(lambda: ranks.node(0).mkdir())
    return found


def corrupt_copy(ranks: Ranks) -> dict[str, Any]:
    ranks.save(30)
    candidate = ranks.newest()
    bad = candidate.copies[shard_name(2)][0].directory / shard_name(2)
    ranks.once(lambda: flip(bad, -5))
    checked, problems = check(ranks.world, candidate)
    assert checked is not None
    return {"bad": str(bad), "problems": problems, **ranks.promoted(checked, "corrupt_copy")}


def changed_since_check(ranks: Ranks) -> dict[str, Any]:
    """A candidate that nobody checked, of the same checkpoint."""
    return ranks.promoted(ranks.newest(), "changed")


def damaged_manifest(ranks: Ranks) -> dict[str, Any]:
    path = ranks.node(1) / "step-00000030" / "manifest.json"
    ranks.once(lambda: flip(path, 40))
    found = {"path": str(path.parent), **ranks.look()}
    ranks.once(lambda: flip(path, 40))
    return found


def full_disk(ranks: Ranks) -> dict[str, Any]:
    candidate, _ = check(ranks.world, ranks.newest())
    assert candidate is not None
    # A limit of the kernel on this rank's files stands for a disk that is full: write() fails in the same place.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.world.rank == candidate.copies[shard_name(3)][0].rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    found = ranks.promoted(candidate, "full_disk")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [path.name for path in (ranks.out / "full_disk" / "checkpoints").iterdir()]
    ranks.meet()
    return {**found, "left": left, "afterwards": ranks.promoted(candidate, "full_disk")}


def all_copies_bad(ranks: Ranks) -> dict[str, Any]:
    candidate, _ = check(ranks.world, ranks.newest())
    assert candidate is not None
    good = candidate.copies[shard_name(2)][0].directory / shard_name(2)
    ranks.once(lambda: flip(good, 9))
    checked, problems = check(ranks.world, candidate)
    # A file that no node has need not be read to know it.
    if ranks.world.rank < 2:
        (ranks.node(ranks.world.rank) / "step-00000030" / shard_name(1)).unlink()
    ranks.meet()
    return {
        "step": candidate.step,
        "usable": checked is not None,
        "good": str(good),
        "bad": sorted(problems),
        **ranks.look(),
    }


def two_tiers(ranks: Ranks) -> dict[str, Any]:
    """A checkpoint of which half lies in the memory of one node, and half on the disk of the other."""
    ranks.save(40)
    step = "step-00000040"
    if ranks.world.rank == 0:
        shutil.move(ranks.directory / step, ranks.local / step)
        for rank in (2, 3):
            (ranks.local / step / shard_name(rank)).unlink()
            (ranks.node(1) / step / shard_name(rank - 2)).unlink()
    ranks.meet()
    candidate = ranks.newest()
    return {"tiers": candidate.tiers, **ranks.promoted(candidate, "two_tiers")}


def other_runs_checkpoint(ranks: Ranks) -> dict[str, Any]:
    path = ranks.node(0) / "step-00000099"
    manifest = replace(ranks.newest().manifest(), run="another", progress=Progress(step=99))

    def plant() -> None:
        path.mkdir()
        (path / "manifest.json").write_bytes(encode_manifest(manifest))

    ranks.once(plant)
    return {"path": str(path), **ranks.look()}


def resumed_before(ranks: Ranks) -> dict[str, Any]:
    """The run goes on from step 20; a save was killed, and this host was once called otherwise."""

    def leave() -> None:
        (ranks.node(1) / ".step-00000050.partial").mkdir()
        (ranks.node(0).with_name("formerly") / "step-00000020").mkdir(parents=True)

    ranks.once(leave)
    discard_newer(ranks.world, ranks.tiers, RUN, 20)
    ranks.meet()
    left = sorted(str(path.relative_to(ranks.out)) for path in (ranks.out / "memory").glob("*/*/*/*"))
    return {"left": left, "local": [path.name for path in checkpoints_in(ranks.local)]}


def finished(ranks: Ranks) -> dict[str, Any]:
    discard_all(ranks.world, ranks.tiers, RUN)
    ranks.meet()
    return {"left": [str(path) for name in ranks.tiers for path in (ranks.out / name).glob("*/*")]}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


CASES: list[Callable[[Ranks], dict[str, Any]]] = [
    exchange,
    ring_of_four,
    nothing_yet,
    lost_node,
    corrupt_copy,
    changed_since_check,
    damaged_manifest,
    full_disk,
    all_copies_bad,
    two_tiers,
    other_runs_checkpoint,
    resumed_before,
    finished,
]


def main(out: Path) -> None:
    partner_module.CHUNK_BYTES = 3000  # so that the bytes of a rank are several messages
    world = World.discover()
    ranks = Ranks(out, world)
    record: dict[str, Any] = {"names": ranks.place.names}
    for case in CASES:
        begun = time.perf_counter()
        record[case.__name__] = case(ranks) | {"seconds": time.perf_counter() - begun}
    (out / f"{world.rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
