"""From inputs to a dataset, on any number of ranks, through any number of interruptions: always the same bytes.

The inputs are cut into units of work (`plan`); a unit is read, encoded, packed and written by one rank and becomes one
part (`units`). Ranks take units from a counter, the largest first (`dispatch`). What is finished is kept in a hidden
directory beside the dataset (`workspace`), so that a build that was killed, or met a full disk, goes on from there with
any number of ranks. Nothing of this enters the result: cuts depend on the inputs alone, and parts on their unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.config import BuildConfig
from data_prep.dispatch import Dispatcher
from data_prep.errors import DataError
from data_prep.job import Job
from data_prep.manifest import Manifest
from data_prep.plan import Unit
from data_prep.units import Encoded, UnitResult
from data_prep.world import World

_ASK_AHEAD = 0.75  # share of a unit after which the next one is asked for


@dataclass(frozen=True)
class BuildReport:
    """How far a build is; given to the `progress` callback after every batch of rank 0.

    Attributes:
        bytes_done, bytes_total: text of all ranks, bytes; estimated from file sizes.
        bytes_before: what an earlier, interrupted build had done.
    """

    bytes_done: int
    bytes_total: int
    bytes_before: int


Progress = Callable[[BuildReport], None]


def build_dataset(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    sequence_length: int,
    out: Path,
    world: World,
    *,
    config: BuildConfig | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Encode the documents of `inputs` into rows of `sequence_length` + 1 tokens and write the dataset `out`.

    Each document becomes begin + tokens + end. A collective: every rank of `world` calls it with the same arguments and
    gets the same manifest. `out` appears when everything is on disk, or not at all; what is finished when the build
    ends early is kept, and the same call goes on from there. Where `out` is already what would be built, it is left.

    Args:
        inputs: files, directories, patterns and `.list` files, see `data_prep.corpus.find_files`.
        tokenizer_dir: directory of a tokenizer.json.
        sequence_length: tokens a row trains on, at least 1.
        out: directory to make.
        world: the ranks that share the work.
        config: how to read, filter and pack; the defaults if None.
        progress: called on rank 0 after every batch, with the progress of all ranks.

    Raises:
        DataError: bad arguments, a bad document, text for less than one row, a full disk; the same on every rank.
    """
    job = Job.prepare(inputs, tokenizer_dir, sequence_length, config or BuildConfig(), out, world)
    with world.guard("look for the output"):
        built = job.existing() if world.rank == 0 else None
    built = world.broadcast(built)
    if built is not None:
        return built
    try:
        with world.guard("create output"):
            if world.rank == 0:
                job.workspace.prepare(job.settings)
                job.workspace.sweep()
        results, histogram = _take_up(job, world)
        finished = {index for of_rank in world.allgather(list(results)) for index in of_rank}
        job.find_duplicates(world)
        job.start(world)
        with world.guard("tokenize"):
            _work(job, world, finished, results, histogram, progress)
        gathered = world.gather(results)
        histogram = world.sum(histogram)
        manifest = None
        with world.guard("write manifest"):
            if gathered is not None:
                merged = {index: result for of_rank in gathered for index, result in of_rank.items()}
                manifest = job.publish(merged, histogram)
        manifest = world.broadcast(manifest)
    except Exception as error:
        # A guard has stopped every rank before it raises, so nobody writes into the workspace any more.
        kept = world.broadcast(job.kept() if world.rank == 0 else 0)
        if kept and isinstance(error, ValueError):
            raise DataError(
                f"{error}; {kept} of {len(job.plan.units)} units of work are finished and kept in {job.workspace.root}"
            ) from error
        raise
    finally:
        job.workspace.close()
    assert manifest is not None
    return manifest


def build_share(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    sequence_length: int,
    out: Path,
    task: tuple[int, int],
    *,
    config: BuildConfig | None = None,
    progress: Progress | None = None,
) -> Manifest | None:
    """Do the work of one task of an array of independent tasks, as `build_dataset` does for the ranks of one job.

    A task does its own share first and then helps with units that nobody works on. The one that finishes last makes
    the dataset. Tasks may run at any time, in any number, and be killed and started again.

    Args:
        inputs: equal for all tasks, as are the others that `build_dataset` knows.
        tokenizer_dir: see there.
        sequence_length: see there.
        out: see there.
        task: (number of this task, number of tasks), counted from 1.
        config: see there.
        progress: called after every batch, with what is known to be done.

    Returns:
        The manifest if the dataset is complete, None if other tasks are still at work or have to be started again.

    Raises:
        DataError: see `build_dataset`.
    """
    number, tasks = task
    if not 1 <= number <= tasks:
        raise DataError(f"--task {number}/{tasks}: should be between 1/{tasks} and {tasks}/{tasks}")
    job = Job.prepare(inputs, tokenizer_dir, sequence_length, config or BuildConfig(), out, World())
    built = job.existing()
    if built is not None:
        return built
    try:
        return _do_share(job, number, tasks, progress)
    except DataError:
        # Another task may have published meanwhile, and removed the workspace under this one.
        built = job.existing()
        if built is None:
            raise
        return built
    finally:
        job.workspace.close()


def _do_share(job: Job, number: int, tasks: int, progress: Progress | None) -> Manifest | None:
    """Build what task `number` of `tasks` finds to do, then publish if that was the last of all."""
    workspace = job.workspace
    workspace.prepare(job.settings)
    if job.deduplicates and not workspace.has_flags(job.plan.key):
        raise DataError(
            "filters.deduplicate: needs ranks that talk to each other; build with mpiexec or srun instead of as tasks"
        )
    job.start(World())
    order = _largest_first(job.plan.units)
    order = sorted(order, key=lambda unit: unit.index % tasks != number - 1)
    done = before = job.done_bytes(job.finished())
    for unit in order:
        if workspace.out.exists():
            break
        with workspace.claim(unit.index) as claimed:
            mine = unit.index % tasks == number - 1
            if not claimed or not (mine or workspace.has_locks) or job.result(unit) is not None:
                continue

            def on_batch(size: int, done: int = done) -> None:
                if progress is not None:
                    progress(BuildReport(done + size, job.plan.bytes, before))

            job.finish(unit, job.encode(unit, on_batch))
            done += unit.bytes
    return job.publish_if_complete()


def _take_up(job: Job, world: World) -> tuple[dict[int, UnitResult], npt.NDArray[np.float64]]:
    """Return this rank's share of the results that an earlier build has left, and the tokens counted in them."""
    histogram = np.zeros(job.tokenizer.vocab_size)
    results = {}
    with world.guard("take up finished work"):
        indices = job.workspace.finished_units() if world.rank == 0 else []
    indices = [index for index in world.broadcast(indices) if index < len(job.plan.units)]
    with world.guard("take up finished work"):
        for index in indices[world.rank :: world.size]:
            unit = job.plan.units[index]
            result = job.result(unit)
            if result is not None:
                results[index] = result
                histogram += job.counts(unit)
    return results, histogram


def _work(
    job: Job,
    world: World,
    finished: set[int],
    results: dict[int, UnitResult],
    histogram: npt.NDArray[np.float64],
    progress: Progress | None,
) -> None:
    """Build what is left, adding to `results` and `histogram` what this rank has done.

    A thread writes a unit while the next one is encoded, so that a rank holds the tokens of two.
    """
    todo = _largest_first(unit for unit in job.plan.units if unit.index not in finished)
    before = job.done_bytes(unit for unit in job.plan.units if unit.index in finished)
    dispatcher = Dispatcher(world, len(todo))
    done = 0

    def report() -> None:
        if progress is not None and world.rank == 0:
            progress(BuildReport(before + dispatcher.done, job.plan.bytes, before))

    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
    writing: Future[None] | None = None

    def finish(unit: Unit, encoded: Encoded, claim: ExitStack) -> None:
        with claim:
            results[unit.index], counts = job.finish(unit, encoded)
        np.add(histogram, counts, out=histogram)

    try:
        while (position := dispatcher.take()) is not None:
            unit = todo[position]

            def on_batch(size: int, unit: Unit = unit, done: int = done) -> None:
                dispatcher.tick(done + size)
                if size >= _ASK_AHEAD * unit.bytes:
                    dispatcher.ask_ahead()
                report()

            with ExitStack() as claim:
                if not claim.enter_context(job.workspace.claim(unit.index)):
                    raise DataError(f"{job.workspace.root}: another build is at work here; wait for it to end")
                encoded = job.encode(unit, on_batch)
                if writing is not None:
                    writing.result()
                writing = writer.submit(finish, unit, encoded, claim.pop_all())
            done += unit.bytes
            dispatcher.tick(done)
        if writing is not None:
            writing.result()
    except BaseException:
        dispatcher.abandon()
        raise
    finally:
        writer.shutdown()
        dispatcher.close(report)


def _largest_first(units: Iterable[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: (-unit.bytes, unit.index))
