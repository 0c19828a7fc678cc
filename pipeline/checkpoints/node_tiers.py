"""From what the nodes keep for themselves to a checkpoint that all can read, after a restart.

The manifest in a node's directory is the whole one; the files are those of the node's own ranks and, where they are
replicated, those of another node. The nodes of the job look at what they hold. What they hold together is a candidate:
every file of it can be copied to the shared file system by one rank that has it, and be loaded from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from data_prep.world import World
from pipeline.checkpoints.commit import commit, make_partial, partial_of, remove_leftovers
from pipeline.checkpoints.manifest import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_name,
    checkpoints_in,
    decode_manifest,
    read_manifest_bytes,
)
from pipeline.checkpoints.node_directory import NodeTierConfig, directories_of_run, find_place, nodes_in
from pipeline.checkpoints.reader import check_files
from pipeline.checkpoints.shard import Entry, copy_file
from pipeline.errors import CheckpointError


class Copy(NamedTuple):
    """A copy of a file of a checkpoint: which rank is to read it, and the directory that it lies in."""

    rank: int
    directory: Path


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint that the nodes hold together.

    Attributes:
        step: completed steps.
        attempt: number of the launch that saved it.
        tiers: where its files lie: memory, local.
        content: of its manifest.json.
        files: name -> what the manifest says of the file.
        copies: name -> the copies of the file, of which the first is to be used.
    """

    step: int
    attempt: int
    tiers: list[str]
    content: bytes
    files: dict[str, Entry]
    copies: dict[str, list[Copy]]

    @property
    def name(self) -> str:
        """What it is called in events and messages."""
        return f"{checkpoint_name(self.step)} ({', '.join(self.tiers)})"

    def manifest(self) -> CheckpointManifest:
        """Return its manifest."""
        return decode_manifest(self.content, Path(checkpoint_name(self.step)) / MANIFEST)


class Survey(NamedTuple):
    """What the nodes hold: the candidates, the newest first, and name -> problem of what cannot be one."""

    candidates: list[Candidate]
    problems: dict[str, str]


class _Holding(NamedTuple):
    """What one directory holds of a checkpoint: which files, and the digest of its manifest.json."""

    node: int
    tier: str
    digest: str
    directory: Path
    files: list[str]


def survey(world: World, tiers: Mapping[str, NodeTierConfig], run_id: str, *, other_owners: bool = False) -> Survey:
    """Find which checkpoints of a run the nodes of this job hold together; a collective with one result.

    The first rank of each node looks at all that lies on its machine, under whichever name of a node.

    Args:
        world: the ranks.
        tiers: name -> tier; those in use are looked at, and of equal copies that of the earlier tier is preferred.
        run_id: identity of the run.
        other_owners: take files that belong to another user.

    Raises:
        ConfigError, PeerInputError: another user could have planted what is there; on every rank.
    """
    place = find_place(world)
    own: list[_Holding] = []
    contents: dict[str, bytes] = {}
    problems: dict[str, str] = {}
    with world.guard("survey of the nodes' checkpoints"):
        for tier, directory in _checkpoints(tiers, run_id) if place.place == 0 else ():
            try:
                content, files = _look(directory, run_id, other_owners=other_owners)
            except (CheckpointError, OSError) as error:
                problems[str(directory)] = str(error)
                continue
            own.append(_Holding(place.index, tier, sha256(content).hexdigest(), directory, files))
            contents[own[-1].digest] = content
    problems = {name: problem for found in world.allgather(problems) for name, problem in found.items()}
    holdings = sorted(
        (holding for held in world.allgather(own) for holding in held), key=lambda each: list(tiers).index(each.tier)
    )
    candidates = []
    for digest, content in _exchange(world, place.index, contents, holdings).items():
        held = [holding for holding in holdings if holding.digest == digest]
        candidate = _candidate(content, held, place.nodes)
        if missing := [name for name, copies in candidate.copies.items() if not copies]:
            problems[candidate.name] = (
                f"no node of this job has {missing[0]}, nor {len(missing) - 1} more of its {len(candidate.files)} files"
            )
        else:
            candidates.append(candidate)
    return Survey(sorted(candidates, key=lambda each: (each.step, each.attempt), reverse=True), problems)


def _checkpoints(tiers: Mapping[str, NodeTierConfig], run_id: str) -> Iterator[tuple[str, Path]]:
    for tier, run in directories_of_run(tiers, run_id):
        for node in nodes_in(run):
            for directory in checkpoints_in(node):
                yield tier, directory


def _look(directory: Path, run_id: str, *, other_owners: bool) -> tuple[bytes, list[str]]:
    """Return the content of a manifest, and which of its files lie beside it."""
    path = directory / MANIFEST
    content = read_manifest_bytes(directory, other_owners=other_owners)
    manifest = decode_manifest(content, path)
    if manifest.run != run_id or directory.name != checkpoint_name(manifest.progress.step):
        raise CheckpointError(f"{path}: is of step {manifest.progress.step} of the run {manifest.run!r}")
    return content, sorted(manifest.files.keys() & {each.name for each in directory.iterdir()})


def _exchange(world: World, node: int, contents: Mapping[str, bytes], holdings: Sequence[_Holding]) -> dict[str, bytes]:
    """Return digest -> content of every manifest on every rank; of each, only one node sends it."""
    sender = {holding.digest: holding.node for holding in holdings}
    sent = {digest: content for digest, content in contents.items() if sender[digest] == node}
    return {digest: content for given in world.allgather(sent) for digest, content in given.items()}


def _candidate(content: bytes, held: Sequence[_Holding], nodes: list[list[int]]) -> Candidate:
    """Return a checkpoint whose files are shared out among the ranks that can read them; `held` by preference."""
    manifest = decode_manifest(content, held[0].directory / MANIFEST)
    tiers = list(dict.fromkeys(holding.tier for holding in held))
    load = {rank: 0 for ranks in nodes for rank in ranks}
    copies: dict[str, list[Copy]] = {}
    for name, entry in sorted(manifest.files.items()):
        offers = [
            (tiers.index(holding.tier), Copy(min(nodes[holding.node], key=load.__getitem__), holding.directory))
            for holding in held
            if name in holding.files
        ]
        offers.sort(key=lambda offer: (offer[0], load[offer[1].rank]))
        copies[name] = [copy for _, copy in offers]
        if offers:
            load[copies[name][0].rank] += entry["bytes"]
    return Candidate(
        step=manifest.progress.step,
        attempt=manifest.attempt,
        tiers=tiers,
        content=content,
        files=manifest.files,
        copies=copies,
    )


def check(world: World, candidate: Candidate, *, other_owners: bool = False) -> tuple[Candidate | None, dict[str, str]]:
    """Compare the files of a candidate with its manifest; a collective with one result.

    Returns:
        The candidate, in which the copies that are not what they were are passed over, or None if no good copy is
        left of a file; and path -> problem of the bad ones.
    """
    manifest, copies = candidate.manifest(), dict(candidate.copies)
    problems: dict[str, str] = {}
    left = sorted(copies)
    while left:
        found: dict[str, str | None] = {}
        with world.guard("check of the nodes' checkpoints"):
            for name in left:
                if copies[name][0].rank == world.rank:
                    found[name] = _problem(copies[name][0].directory, manifest, name, other_owners=other_owners)
        verdicts = {name: problem for given in world.allgather(found) for name, problem in given.items()}
        left = [name for name in left if verdicts[name] is not None]
        for name in left:
            problems[str(copies[name][0].directory / name)] = str(verdicts[name])
            copies[name] = copies[name][1:]
        if not all(copies[name] for name in left):
            return None, problems
    return replace(candidate, copies=copies), problems


def _problem(directory: Path, manifest: CheckpointManifest, name: str, *, other_owners: bool) -> str | None:
    try:
        check_files(directory, manifest, [name], other_owners=other_owners)
    except CheckpointError as error:
        return str(error)
    return None


def promote(world: World, candidate: Candidate, run_dir: Path) -> Path:
    """Copy a checkpoint from the nodes to the shared file system; a collective. Returns its directory there.

    Raises:
        CheckpointError, PeerInputError: a file changed since it was checked, or cannot be written; on every rank.
            Nothing is left of it then.
    """
    parent = run_dir / "checkpoints"
    final, partial = parent / checkpoint_name(candidate.step), partial_of(parent, candidate.step)
    try:
        with world.guard("copy of the nodes' checkpoint"), _writing(final):
            if world.rank == 0:
                remove_leftovers(parent)
                make_partial(parent, candidate.step)
        with world.guard("copy of the nodes' checkpoint"), _writing(final):
            for name, (copy, *_) in candidate.copies.items():
                source = copy.directory / name
                if copy.rank == world.rank and copy_file(source, partial / name) != candidate.files[name]:
                    raise CheckpointError(f"{source}: changed since it was checked; start the run again")
        with world.guard("copy of the nodes' checkpoint"), _writing(final):
            if world.rank == 0:
                commit(partial, candidate.content)
    except Exception:
        if world.rank == 0:
            with suppress(OSError):
                remove_leftovers(parent)
        raise
    return final


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{final}: the checkpoint that the nodes hold cannot be copied there ({error}); see to it that"
            f" {final.parent} can be written, and start the run again while the nodes hold it"
        ) from error
