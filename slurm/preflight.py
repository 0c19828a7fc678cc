"""What is decided and refused before a run is handed to the queue. Whatever needs no torch comes first."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.schema import nearest
from slurm.limits import NO_LIMIT_MINUTES, Allotment, allot, links_for, show_duration
from slurm.request import JobRequest
from slurm.site import CHAINS, Site, SiteError, account
from slurm.snapshot import code_digest
from slurm.submission import read_site

if TYPE_CHECKING:
    from pipeline.checkpoints.manifest import CheckpointManifest
    from pipeline.config import RunConfig

EVALUATION_DEPTHS = "1,2,4,8,16,32"
_EVALUATION_MINUTES = 60
_MOST_RESTARTS = 1000
_MOST = 2**31 - 1
_LONG_OPTION = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_SAVES_OF_LEAD = 3  # the warning comes as many saves before the end as the slowest save is slower than the last one
_SHOWN_ELSEWHERE = {
    "account": "--account",
    "array": "--chain array",
    "chdir": None,
    "comment": None,
    "dependency": "--chain afterany",
    "error": None,
    "job-name": "name=NAME",
    "no-requeue": "--chain afterany",
    "nodes": "--nodes",
    "ntasks": "--nodes and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "open-mode": None,
    "output": None,
    "partition": "--partition",
    "qos": "--qos",
    "requeue": "--chain requeue",
    "reservation": "--reservation",
    "signal": "--signal-lead",
    "time": "--time",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person asks for, beside the configuration; None leaves it to the site."""

    nodes: int
    spares: int = 0
    ranks_per_node: int | None = None
    minutes: int | None = None
    budget_minutes: int | None = None
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    reservation: str | None = None
    chain: str | None = None
    signal_seconds: int | None = None
    max_restarts: int = 3
    stage: Sequence[Path] = ()
    eval_every: int | None = None
    eval_depths: str = EVALUATION_DEPTHS
    sbatch: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A run that may be submitted.

    Attributes:
        site: where.
        request: how its jobs look.
        config: what it computes.
        warnings: sentences for the person.
    """

    site: Site
    request: JobRequest
    config: RunConfig
    warnings: list[str]


def prepare(source: str, overrides: Sequence[str], site: Site, options: Options) -> Prepared:
    """Decide how the jobs of a run look, and refuse what the queue or the ranks would refuse; writes nothing.

    Args:
        source: path of a YAML file, or the name of a shipped configuration.
        overrides: `dotted.key=value` each.
        site: where to run.
        options: what is asked for.

    Raises:
        SiteError: the site does not grant it, or an option has no meaning; with the nearest valid value.
        ConfigError: the configuration is not valid, does not fit the ranks, the data or the memory of a device.
    """
    warnings = [f"unverified: {text}" for text in site.unverified]
    ranks_per_node = _ranks_per_node(site, options)
    allotment, links, chain = _time(site, options, warnings)
    account_name = account(site, options.account, os.environ)
    sbatch, stage = _sbatch(options.sbatch), _stage(site, options.stage)
    _check_counts(options)
    warnings += _ignored_variables(os.environ)

    from pipeline.config import load_config

    config = load_config(source, overrides, beneath=site.overrides)
    warnings += _check_config(config, site, options, ranks_per_node, allotment.minutes)
    run_dir = _run_dir(config.run_dir)
    request = JobRequest(
        name=config.name,
        run_dir=str(run_dir),
        site=site.name,
        nodes=options.nodes,
        spares=options.spares,
        ranks_per_node=ranks_per_node,
        minutes=allotment.minutes,
        links=links,
        chain=chain,
        partition=allotment.partition,
        qos=allotment.qos,
        account=account_name,
        reservation=options.reservation,
        signal_seconds=_signal_seconds(site, options, allotment, run_dir),
        digest=code_digest(),
        start_minutes=config.control.hang_start_minutes if config.control.watchdog else None,
        max_restarts=options.max_restarts,
        stage=stage,
        eval_every=options.eval_every,
        eval_depths=options.eval_depths,
        eval_minutes=min(allotment.minutes, _EVALUATION_MINUTES),
        sbatch=sbatch,
        command=_command(site, options, run_dir),
    )
    return Prepared(site, request, config, warnings)


def refuse_active(run_dir: Path) -> None:
    """Refuse a run that has jobs in the queue already.

    Raises:
        SiteError: it has; with what to do.
    """
    from slurm import joblog
    from slurm.queue import available, job_states, local_jobs

    ids = [job for record in joblog.current_chain(joblog.read(run_dir)) for job in record.get("jobs", [])]
    if not ids:
        return
    look = local_jobs if read_site(run_dir).scheduler == "local" else job_states
    known = look(ids) if look is local_jobs or available() else {}
    living = [job for job in ids if job in known and not known[job].over]
    if living:
        raise SiteError(
            f"{run_dir}: is active already in job {', '.join(living)}; look with `rookery status {run_dir}`, or end it"
            f" with `rookery cancel {run_dir}` before you submit it again"
        )


def _time(site: Site, options: Options, warnings: list[str]) -> tuple[Allotment, int, str]:
    """Return where the job goes and for how long, the number of links, and how they follow one another."""
    if options.chain is not None and options.chain not in CHAINS:
        hint = nearest(options.chain, CHAINS)
        raise SiteError(f"--chain {options.chain}: is not one of {', '.join(CHAINS)}{hint}")
    chain = options.chain or site.chain
    if site.scheduler == "local":
        _check_local(site, options)
        allotment = Allotment(None, None, options.minutes or NO_LIMIT_MINUTES, None, None)
        return allotment, 1, chain
    allotment = allot(site, options.nodes + options.spares, options.minutes, options.partition, options.qos)
    if allotment.queue is not None and allotment.queue.unverified is not None:
        warnings.append(f"unverified: {allotment.queue.label}: {allotment.queue.unverified}")
    links = links_for(dataclasses.replace(site, chain=chain), allotment, options.budget_minutes)
    return allotment, links, chain


def _check_local(site: Site, options: Options) -> None:
    if options.nodes + options.spares != 1:
        asked = f"--nodes {options.nodes}" + (f" --spares {options.spares}" if options.spares else "")
        raise SiteError(f"site {site.name}: {asked}: is this machine alone; use --nodes 1 and --ranks-per-node")
    given = {
        "--budget": options.budget_minutes,
        "--partition": options.partition,
        "--qos": options.qos,
        "--reservation": options.reservation,
        "--sbatch": options.sbatch or None,
    }
    if wrong := [name for name, value in given.items() if value is not None]:
        raise SiteError(f"site {site.name}: {', '.join(wrong)}: there is no queue here; leave it away")


def _ranks_per_node(site: Site, options: Options) -> int:
    ranks = site.ranks_per_node if options.ranks_per_node is None else options.ranks_per_node
    most = site.ranks_per_node if site.accelerator != "cpu" else site.cores_per_node
    if site.scheduler == "local" and site.accelerator == "cpu" and ranks > most:
        return ranks  # a rehearsal may have more ranks than cores
    if not 1 <= ranks <= most:
        what = "devices" if site.accelerator != "cpu" else "cores"
        raise SiteError(
            f"--ranks-per-node {ranks}: a node of {site.name} has {most} {what}; use"
            f" --ranks-per-node {most if ranks > most else 1}"
        )
    return ranks


def _check_counts(options: Options) -> None:
    for name, value, least, most in (
        ("--spares", options.spares, 0, options.nodes),
        ("--max-restarts", options.max_restarts, 1, _MOST_RESTARTS),
        ("--eval-every", options.eval_every, 1, _MOST),
    ):
        if value is not None and not least <= value <= most:
            raise SiteError(f"{name} {value}: is not in {least}..{most}; use {name} {min(max(value, least), most)}")
    if options.reservation == "":
        raise SiteError("--reservation: is empty; name one, or leave it away")


def _sbatch(given: Mapping[str, str]) -> dict[str, str]:
    for key in given:
        if _LONG_OPTION.fullmatch(key) is None:
            likely = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
            raise SiteError(f"--sbatch {key}: is no long option of sbatch; write --sbatch {likely}=VALUE")
        if key in _SHOWN_ELSEWHERE:
            instead = _SHOWN_ELSEWHERE[key]
            advice = f"use {instead}" if instead else "leave it away"
            raise SiteError(f"--sbatch {key}: is decided by the submission; {advice}")
    return dict(given)


def _stage(site: Site, files: Sequence[Path]) -> list[str]:
    if files and site.stage_method == "none":
        raise SiteError(f"--stage {files[0]}: the profile of {site.name} has no node-local directory; leave it away")
    for path in files:
        if not path.is_file():
            raise SiteError(f"--stage {path}: no such file; pack it first, as with `conda pack` or `tar`")
    names = [path.name for path in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SiteError(f"--stage: two files are named {twice}, and nodes keep them in one directory; rename one")
    return [str(path.absolute()) for path in files]


def _ignored_variables(environment: Mapping[str, str]) -> list[str]:
    names = sorted(name for name in environment if name.startswith("SBATCH_") and name != "SBATCH_ACCOUNT")
    if not names:
        return []
    return [f"{', '.join(names)}: set here, but jobs follow the options of this command alone"]


def _check_config(config: RunConfig, site: Site, options: Options, ranks_per_node: int, minutes: int) -> list[str]:
    """Refuse a configuration that does not fit the ranks or the data, and return warnings."""
    from pipeline.attempt import check_input, check_resumable
    from pipeline.errors import ConfigError
    from pipeline.evaluate import parse_depths

    config.train.check_world_size(options.nodes * ranks_per_node, config.schedule)
    if config.comm.transport == "mpi" and site.control == "torch":
        raise ConfigError(f"comm.transport: {site.name} starts ranks without MPI; use comm.transport=collective")
    parse_depths(options.eval_depths)
    warnings = []
    if options.eval_every is not None and config.checkpoint.keep_every is None:
        warnings.append(
            f"only the newest checkpoints stay (checkpoint.keep_last = {config.checkpoint.keep_last}): an evaluation"
            " that waits for long may find its own gone; checkpoint.keep_every keeps some for good"
        )
    if minutes * 60.0 <= 2.0 * config.control.stop_margin_seconds:
        raise ConfigError(
            f"control.stop_margin_seconds: {config.control.stop_margin_seconds:g} s, before which the ranks stop, leave"
            f" less than half of a job of {show_duration(minutes)}; use --time"
            f" {show_duration(int(config.control.stop_margin_seconds / 30.0) + 1)} or longer, or a lower margin"
        )
    data, saved = check_input(config), _newest_manifest(Path(config.run_dir))
    if saved is not None:
        check_resumable(saved, config, data)
        if saved.progress.step >= config.train.steps:
            raise ConfigError(
                f"{config.run_dir}: is finished, at step {saved.progress.step} of train.steps = {config.train.steps};"
                f" give more, such as train.steps={2 * saved.progress.step}, or another run_dir"
            )
    return warnings + _check_memory(config, site, options.nodes, ranks_per_node)


def _newest_manifest(run_dir: Path) -> CheckpointManifest | None:
    """Return what the newest checkpoint says, if it can be read; which one is intact the ranks find out."""
    from pipeline.checkpoints.manifest import list_checkpoints, read_manifest

    saved = list_checkpoints(run_dir)
    with suppress(ValueError, OSError):
        return read_manifest(saved[-1]) if saved else None
    return None


@dataclass(frozen=True)
class _Shape:
    """A configuration, equal to another whose devices hold the same: runs of a sweep mostly are."""

    key: str
    config: RunConfig = field(compare=False)


def _check_memory(config: RunConfig, site: Site, nodes: int, ranks_per_node: int) -> list[str]:
    """Refuse what surely does not fit the memory of a device, and return a warning about what may not."""
    from pipeline.errors import ConfigError

    if site.device_memory_gb is None:
        return []
    deciding = ("model", "depth", "objective", "train", "zero", "comm")
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in deciding}
    shape = _Shape(json.dumps([sections, config.optimizer.kind]), config)
    state, activations = (nbytes / 1e9 for nbytes in _needs(shape, nodes * ranks_per_node, ranks_per_node))
    have = site.device_memory_gb
    if state > have:
        raise ConfigError(
            f"zero.stage: weights, gradients and optimizer state take {state:.1f} GB of every device, one of"
            f" {site.name} has {have:.1f} GB; use a higher zero.stage or more nodes (see `rookery plan`)"
        )
    if state + activations <= have:
        return []
    text = (
        f"a rank may need {state + activations:.1f} GB of the {have:.1f} GB of its device; consider another"
        " train.activation_checkpointing or zero.stage (see `rookery plan`)"
    )
    return [text]


@cache
def _needs(shape: _Shape, ranks: int, ranks_per_node: int) -> tuple[int, int]:
    """Return the bytes of state and of activations on a device."""
    from pipeline.plan import activation_bytes, largest_backprop_depth, state_of_rank

    config = shape.config
    state, _, _ = state_of_rank(config, ranks, ranks_per_node)
    depth = largest_backprop_depth(config)
    return state.on_device, activation_bytes(config, config.train.activation_checkpointing, depth)[0]


def _run_dir(path: str) -> Path:
    """Return the run directory, if jobs can be submitted from it."""
    if wrong := next((sign for sign in "%:\\\n" if sign in path), None):
        raise SiteError(f"run_dir: {path!r} contains {wrong!r}, which job scripts give another meaning; rename it")
    run_dir = Path(path)
    parent = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise SiteError(f"run_dir: {parent} cannot be written; set run_dir to a directory that every node can write")
    refuse_active(run_dir)
    return run_dir


def _signal_seconds(site: Site, options: Options, allotment: Allotment, run_dir: Path) -> int:
    """Return how long before the time limit the ranks are warned: enough for the slowest save, less than half."""
    from pipeline.checkpoints.restart import History

    most = allotment.minutes * 30 - 1
    saves = History.read(run_dir).save_seconds
    needed = int(_SAVES_OF_LEAD * saves) + 1 if saves else 1
    if options.signal_seconds is not None:
        if not needed <= options.signal_seconds <= most:
            nearest_valid = min(max(options.signal_seconds, needed), most)
            raise SiteError(
                f"--signal-lead {options.signal_seconds}: should be from {needed} s ({_SAVES_OF_LEAD} saves) to less"
                f" than half of the time limit; use --signal-lead {nearest_valid}"
            )
        return options.signal_seconds
    if needed > most:
        minutes = needed // 30 + 1
        raise SiteError(
            f"--time {show_duration(allotment.minutes)}: the last save took {saves:.0f} s, and {_SAVES_OF_LEAD} of them"
            f" should fit in half of the time limit; use --time {show_duration(minutes)} or longer"
        )
    return min(max(site.signal_seconds, needed), most)


def _command(site: Site, options: Options, run_dir: Path) -> list[str]:
    command = ["-m", "rookery", "train", str(run_dir / "run.yaml")]
    if site.scheduler == "local" and options.minutes is not None:  # no queue ends the job: the ranks keep the time
        command.append(f"control.time_limit_minutes={options.minutes}")
    return command
