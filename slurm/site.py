"""What a supercomputer is to a job: nodes, queues, binding, modules, environment. One YAML file a site.

Shipped profiles lie in `slurm/sites/`; a person's own, in `~/.config/rookery/sites/NAME.yaml`, come before them and may
extend one. Imports neither torch nor numpy: a login node reads a profile in a moment.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError
from pipeline.schema import nearest, read_yaml, to_dataclass

SITES = Path(__file__).parent / "sites"
SCHEDULERS = ("slurm", "local")
ACCELERATORS = ("rocm", "cuda", "cpu")
BINDINGS = ("slurm", "mask", "none")
CHAINS = ("requeue", "afterany", "array")
CONTROLS = ("mpi", "torch")
STAGE_METHODS = ("sbcast", "copy", "none")
# What a submission decides itself; a profile that fixed one of these would be overruled without a word.
_DECIDED_BY_SUBMISSION = (
    *(
        "account",
        "array",
        "comment",
        "dependency",
        "exclude",
        "job-name",
        "nodelist",
        "nodes",
        "open-mode",
        "partition",
    ),
    *("qos", "requeue", "reservation", "signal", "time"),
)
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class SiteError(ConfigError):
    """No such site, a profile that is not valid, or a wish that the site's queues do not grant."""


@dataclass(kw_only=True)
class Variable:
    """An environment variable of the job."""

    value: str
    """What it is set to; the job's shell expands variables in it."""
    why: str
    """What it is good for, or what happens without it."""
    source: str
    """Where that is documented, with its date."""


@dataclass(kw_only=True)
class Queue:
    """One row of what the scheduler allows; rows are tried in order."""

    partition: str | None = None
    qos: str | None = None
    min_nodes: int = 1
    max_nodes: int | None = None
    """null: no limit that we know."""
    hours: float | None = None
    """Longest time of a job."""
    max_queued: int | None = None
    """Most jobs of one person that may wait or run in it."""
    max_running: int | None = None
    chaining: bool = True
    """Whether jobs that follow one another are allowed."""
    default: bool = True
    """false: taken only when its partition or QOS is asked for."""
    unverified: str | None = None
    """What about this row is not confirmed."""

    @property
    def label(self) -> str:
        """The row's name in messages, such as `partition batch, qos debug`."""
        parts = [f"partition {self.partition}"] if self.partition else []
        parts += [f"qos {self.qos}"] if self.qos else []
        return ", ".join(parts) or "the default queue"


@dataclass(kw_only=True)
class Binding:
    """How ranks get devices and the cores near them."""

    mode: str = "none"
    """slurm: a rank sees one device, the one nearest to its cores; mask: all are visible, rank i takes device i and the
    cores of mask i; none: all are visible, rank i takes device i, and SLURM deals out the cores in their order."""
    cpu_masks: list[str] = field(default_factory=list)
    """Of local rank 0, 1, ...: the cores near device 0, 1, ..., as `srun --cpu-bind=mask_cpu` takes them."""


@dataclass(kw_only=True)
class NodeLocal:
    """A fast directory that every node has for itself."""

    path: str
    """The job's shell expands variables in it."""
    notes: str
    """What it is: size, speed, what it counts against."""
    constraint: str | None = None
    """Node feature that a job must ask for to have it."""


@dataclass(kw_only=True)
class Site:
    """A supercomputer, or this machine."""

    name: str
    title: str
    unverified: list[str] = field(default_factory=list)
    """Sentences about what nobody has confirmed; shown as warnings wherever the profile is used."""
    notes: list[str] = field(default_factory=list)
    """Sentences worth knowing before the first job."""

    scheduler: str = "slurm"
    """slurm, or local: processes of this machine."""
    accelerator: str
    """rocm, cuda or cpu."""
    ranks_per_node: int
    """GPUs of a node, or GCDs where a card has two; processes on a site without."""
    cores_per_node: int
    """Cores that jobs may use, as SLURM counts them (hardware threads where it does)."""
    cores_per_rank: int
    low_noise: str | None = None
    """Cores that are kept for the operating system, in words."""
    numa: str | None = None
    """Which cores lie near which device, in words."""
    host_memory_gb: float | None = None
    """Of a node, GB of 10^9 bytes."""
    device_memory_gb: float | None = None
    """Of one device, GB of 10^9 bytes."""
    peak_bf16_flops: float | None = None
    """Of one device, dense, FLOP/s."""
    binding: Binding = field(default_factory=Binding)

    queues: list[Queue] = field(default_factory=list)
    queued_jobs: int | None = None
    """Most jobs of one person in all queues together."""
    eligible_jobs: int | None = None
    """Most of them that the scheduler considers at a time."""
    account_required: bool = False
    account_variables: list[str] = field(default_factory=list)
    """Environment variables that give the account if the command line does not; SBATCH_ACCOUNT comes after them."""
    account_suffix: str | None = None
    """End of every account that may use the accelerators."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Fixed options of every job: long names without dashes; an empty text for one that takes no value."""
    srun: list[str] = field(default_factory=list)
    """Fixed options of the training step."""
    chain: str = "afterany"
    """How a run longer than the limit goes on: requeue, afterany (dependencies) or array (one element at a time)."""
    signal_seconds: int = 600
    """Least time between the warning signal and the end of the job."""

    module_paths: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    after_modules: list[str] = field(default_factory=list)
    """Shell lines after the modules are loaded."""
    python: str | None = None
    """Command that runs Python in the job, with its container; null: the interpreter that submits."""
    env: dict[str, Variable] = field(default_factory=dict)
    env_one_node: dict[str, Variable] = field(default_factory=dict)
    """Set on top when the run has one node."""
    env_many_nodes: dict[str, Variable] = field(default_factory=dict)
    """Set on top when it has several."""
    env_node_local: dict[str, Variable] = field(default_factory=dict)
    """Paths of caches on the node's own disk or memory."""
    on_hang: dict[str, Variable] = field(default_factory=dict)
    """What the site's documentation advises when collectives hang; shown, not set."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted configuration keys that this site wants, below the user's own."""
    control: str = "mpi"
    """Control plane: mpi, or torch where there is no MPI (sets ROOKERY_CONTROL)."""

    scratch: str | None = None
    """Where run directories belong; the shell expands variables in it."""
    node_local: NodeLocal | None = None
    stage_method: str = "none"
    """How files get to `node_local`: sbcast, copy (every node reads the shared file system) or none."""
    proxy: str | None = None
    """HTTP proxy of the compute nodes."""
    mpi4py: str | None = None
    """Command that builds mpi4py against the site's MPI."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name, choices in (
            ("scheduler", SCHEDULERS),
            ("accelerator", ACCELERATORS),
            ("chain", CHAINS),
            ("control", CONTROLS),
            ("stage_method", STAGE_METHODS),
        ):
            _check_choice(name, getattr(self, name), choices)
        _check_choice("binding.mode", self.binding.mode, BINDINGS)
        for name in ("ranks_per_node", "cores_per_node", "cores_per_rank", "signal_seconds"):
            if getattr(self, name) < 1:
                raise SiteError(f"{name}: {getattr(self, name)} is not positive")
        if self.scheduler == "slurm" and self.cores_per_rank * self.ranks_per_node > self.cores_per_node:
            most = self.cores_per_node // self.ranks_per_node
            raise SiteError(
                f"cores_per_rank: {self.ranks_per_node} ranks of {self.cores_per_rank} cores are more than the"
                f" {self.cores_per_node} of a node; at most {most}"
            )
        if self.binding.mode == "mask" and len(self.binding.cpu_masks) < self.ranks_per_node:
            raise SiteError(
                f"binding.cpu_masks: {len(self.binding.cpu_masks)} masks for {self.ranks_per_node} ranks of a node;"
                " give one a rank"
            )
        if self.stage_method != "none" and self.node_local is None:
            raise SiteError(f"stage_method: {self.stage_method} needs node_local.path")
        self._check_queues()
        self._check_names()

    def _check_queues(self) -> None:
        for index, queue in enumerate(self.queues):
            if queue.min_nodes < 1:
                raise SiteError(f"queues[{index}].min_nodes: {queue.min_nodes} is not positive")
            if queue.max_nodes is not None and queue.max_nodes < queue.min_nodes:
                raise SiteError(f"queues[{index}].max_nodes: {queue.max_nodes} is below min_nodes {queue.min_nodes}")
            if queue.hours is not None and queue.hours * 60 < 1:
                raise SiteError(f"queues[{index}].hours: {queue.hours} is less than a minute; null for no limit")
            if queue.max_queued is not None and queue.max_queued < 1:
                raise SiteError(f"queues[{index}].max_queued: {queue.max_queued} is not positive; null for no limit")

    def _check_names(self) -> None:
        for option in self.sbatch:
            if option.startswith("-") or "_" in option:
                raise SiteError(f"sbatch.{option}: write {option.lstrip('-').replace('_', '-')!r}")
            if option in _DECIDED_BY_SUBMISSION:
                raise SiteError(f"sbatch.{option}: is decided at submission; take it out of the profile")
        for section in ("env", "env_one_node", "env_many_nodes", "env_node_local", "on_hang"):
            for name in getattr(self, section):
                if _VARIABLE_NAME.fullmatch(name) is None:
                    raise SiteError(f"{section}.{name}: is not the name of an environment variable")


def user_sites(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the person's own profiles; it may not exist."""
    home = environment.get("XDG_CONFIG_HOME")
    return Path(home or Path.home() / ".config") / "rookery" / "sites"


def site_names() -> list[str]:
    """Return the names of all profiles, shipped and the person's own, sorted."""
    return sorted({path.stem for folder in (SITES, user_sites()) for path in folder.glob("*.yaml")})


def site_path(name: str) -> Path:
    """Return the file of a profile: the person's own before the shipped one.

    Raises:
        SiteError: there is none; with the nearest name.
    """
    found = _find(name, (user_sites(), SITES))
    if found is None:
        names = site_names()
        raise SiteError(
            f"no site {name!r}{nearest(name, names)}; there are {', '.join(names)}; a profile of your own goes to"
            f" {user_sites()}/NAME.yaml"
        )
    return found


def site_summary(name: str) -> dict[str, Any]:
    """Return what a list of sites says about one; checks no more of the profile than that, which takes a moment.

    Raises:
        SiteError: no such site, not YAML, or it extends what is not there.
    """
    path = site_path(name)
    tree = _resolve(path, [])
    facts = {key: tree.get(key) for key in ("title", "accelerator", "ranks_per_node")}
    return {"name": name, **facts, "scheduler": tree.get("scheduler", "slurm"), "file": str(path)}


def load_site(name: str) -> Site:
    """Return the profile of a site, with what it extends merged below it.

    Raises:
        SiteError: no such site, a cycle, an unknown key, a value without a meaning; in one message.
    """
    path = site_path(name)
    return _to_site({**_resolve(path, []), "name": name}, str(path))


def site_to_yaml(site: Site) -> str:
    """Return a profile as a YAML text that holds all of it; `site_from_record` takes what YAML reads from it."""
    return yaml.safe_dump(dataclasses.asdict(site), sort_keys=False, width=120)


def site_from_record(record: Mapping[str, Any], origin: str) -> Site:
    """Return the profile that `dataclasses.asdict` turned into `record`.

    Raises:
        SiteError: it is not one; the message begins with `origin`.
    """
    return _to_site(dict(record), origin)


def account(site: Site, given: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the account that a job is charged to, None where the site needs none and nobody gives one.

    Raises:
        SiteError: it is missing, or is not one that may use the accelerators.
    """
    variables = [*site.account_variables, "SBATCH_ACCOUNT"]
    name = given or next((environment[variable] for variable in variables if environment.get(variable)), None)
    if name is None:
        if not site.account_required:
            return None
        raise SiteError(f"site {site.name}: jobs need an account; give --account NAME, or set {' or '.join(variables)}")
    if site.account_suffix and not name.endswith(site.account_suffix):
        raise SiteError(
            f"site {site.name}: account {name!r} has no time on the accelerators, whose accounts end in"
            f" {site.account_suffix}; use --account {name}{site.account_suffix}"
        )
    return name


def _check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise SiteError(f"{key}: {value!r} is not one of {', '.join(choices)}{nearest(value, choices)}")


def _find(name: str, folders: Iterable[Path]) -> Path | None:
    if not name or Path(name).name != name:
        return None
    return next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)


def _resolve(path: Path, below: list[Path]) -> dict[str, Any]:
    """Return the tree of a file with that of the profile which it extends merged below it."""
    if path in below:
        raise SiteError(f"{below[0]}: extends itself: {' -> '.join(found.stem for found in [*below, path])}")
    tree = _read(path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    # A file of one's own that is named like the shipped one extends the shipped one, not itself.
    folders = (SITES,) if base == path.stem and path.parent != SITES else (user_sites(), SITES)
    found = _find(str(base), folders)
    if found is None:
        others = [name for name in site_names() if name != path.stem]
        raise SiteError(f"{path}: extends: no site {base!r}{nearest(str(base), others)}")
    return _merge(_resolve(found, [*below, path]), tree)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}; make it readable") from None
    except ConfigError as error:
        raise SiteError(str(error)) from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `over` on `base`: sections deep, lists and scalars replaced; null takes an entry out."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _to_site(tree: dict[str, Any], origin: str) -> Site:
    try:
        _check_texts(tree, Site, "")
        return to_dataclass(_escaped(tree), Site)
    except ConfigError as error:
        raise SiteError(f"{origin}: {error}") from None


def _check_texts(value: object, hint: Any, path: str) -> None:
    """Refuse texts without quotes of which YAML makes something else: 0x7e, 1:30, on, 1e5."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = typing.get_args(hint)[0]
    if hint is str and isinstance(value, bool | int | float):
        raise SiteError(f"{path}: {value!r} is not a text; write it in quotes")
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        for key, inner in typing.get_type_hints(hint).items():
            _check_texts(value.get(key), inner, f"{path}.{key}" if path else key)
    elif isinstance(value, dict) and typing.get_origin(hint) is dict:
        for key, entry in value.items():
            _check_texts(entry, typing.get_args(hint)[1], f"{path}.{key}")
    elif isinstance(value, list) and typing.get_origin(hint) is list:
        for index, entry in enumerate(value):
            _check_texts(entry, typing.get_args(hint)[0], f"{path}[{index}]")


def _escaped(value: Any) -> Any:
    """Return `value` with the shell's `${NAME}` in a form that OmegaConf leaves to the shell."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    return value
