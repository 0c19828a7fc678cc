"""What a site needs before a run, looked at one by one: each finding with its verdict and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slurm import queue
from slurm.site import Site, SiteError, Variable, account, load_site

OK, WARN, FAIL = "ok", "warn", "fail"
_SECONDS = 60.0
_LEAST_FREE_GB = 1.0
_FEW_FREE_GB = 50.0
_MUCH_OF_QUOTA = 0.9
_MOST_SKEW_SECONDS = 5.0
_PLUGIN = {"cuda": ("libnccl-net*.so*",), "rocm": ("librccl-net*.so*", "libnccl-net*.so*")}
_DEVICE_COMPILER = {"cuda": "nvcc", "rocm": "hipcc"}
_MARK = "rookery-doctor:"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        verdict: ok, warn or fail.
        found: what was seen, in words.
        remedy: what to do; empty if all is well.
    """

    name: str
    verdict: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class _Shell:
    """What a shell looks like after the profile's module lines, as those of the batch script.

    Attributes:
        problem: what failed in it, None if nothing.
        variables: its environment.
    """

    problem: str | None
    variables: dict[str, str]


def examine(name: str, *, in_job: bool = False) -> dict[str, Any]:
    """Look at everything that a run at a site needs.

    Args:
        name: of the profile.
        in_job: also try the devices of this node; for a job, where there are some.

    Returns:
        `site`; `ok`: whether nothing failed; `unhealthy`: whether this node's devices did; `checks`; `devices`.

    Raises:
        SiteError: there is no such profile, or it is not valid.
    """
    site = load_site(name)
    shell = _load_modules(site)
    checks = [check for look in _LOOKS for check in _looked(look, site, shell)]
    trial: dict[str, Any] = {"unhealthy": False, "devices": []}
    if in_job:
        checks += _node_local(site)
        trial = _try_devices(site)
        checks.append(trial.pop("check"))
    return {
        "site": site.name,
        "ok": not any(check.verdict == FAIL for check in checks),
        "unhealthy": trial["unhealthy"],
        "checks": [asdict(check) for check in checks],
        "devices": trial["devices"],
    }


def _looked(look: Callable[[Site, _Shell], Iterator[Check]], site: Site, shell: _Shell) -> list[Check]:
    try:
        return list(look(site, shell))
    except (OSError, subprocess.TimeoutExpired) as error:  # a program that hangs, a file system that is gone
        return [Check(look.__name__.strip("_"), FAIL, " ".join(str(error).split()), "try again; then ask the site")]


def _profile(site: Site, shell: _Shell) -> Iterator[Check]:
    if site.unverified:
        found = f"{site.title}: {len(site.unverified)} statements of the profile are not confirmed"
        yield Check("profile", WARN, found, f"read them: rookery sites show {site.name}")
    else:
        yield Check("profile", OK, site.title)


def _python(site: Site, shell: _Shell) -> Iterator[Check]:
    if site.python is not None:
        yield Check("python", OK, f"ranks run {site.python}; look inside it with --in-job, in a job")
        return
    where = f"{sys.executable} ({'.'.join(map(str, sys.version_info[:3]))})"
    build = torch_build()
    if build is None:
        yield Check("python", FAIL, f"{where} has no torch", "install the project with its requirements there")
    elif site.accelerator != build:
        remedy = f"install a build of torch for {site.accelerator}"
        yield Check("python", FAIL, f"{where}: torch is built for {build}", remedy)
    else:
        yield Check("python", OK, f"{where}: torch for {build}")


def torch_build() -> str | None:
    """Return what the installed torch was built for: rocm, cuda or cpu; None if there is none. Does not import it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    for kind, word in (("rocm", "hip"), ("cuda", "cuda")):
        if re.search(rf"^{word}\b[^=\n]*=\s*['\"]", text, re.MULTILINE):
            return kind
    return "cpu"


def _load_modules(site: Site) -> _Shell:
    """Run the profile's module lines in a login shell of its own."""
    lines = [f"module use {shlex.quote(path)}" for path in site.module_paths]
    lines += [
        f"module load {shlex.quote(module)} || {{ echo {shlex.quote(_MARK + module)}; exit 1; }}"
        for module in site.modules
    ]
    lines += [*site.after_modules, f"echo {_MARK}; env -0"]
    command = ["bash", "-lc", "\n".join(lines)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return _Shell(f"the modules were not loaded within {_SECONDS:.0f} s", dict(os.environ))
    before, mark, rest = done.stdout.decode(errors="replace").rpartition(_MARK)
    if done.returncode == 0 and mark:
        pairs = (entry.partition("=") for entry in rest.lstrip("\n").split("\0") if "=" in entry)
        return _Shell(None, {name: value for name, _, value in pairs})
    said = done.stderr.decode(errors="replace").strip().splitlines() or [before.strip()]
    return _Shell(f"module load {rest.strip()}: {said[-1]}" if mark else said[-1], dict(os.environ))


def _modules(site: Site, shell: _Shell) -> Iterator[Check]:
    if not site.modules and not site.after_modules:
        yield Check("modules", OK, "none needed")
    elif shell.problem is not None:
        remedy = f"see `module spider`, and mend `modules` in a profile of your own that extends {site.name}"
        yield Check("modules", FAIL, shell.problem, remedy)
    else:
        yield Check("modules", OK, " ".join(site.modules) or "loaded")


def _account(site: Site, shell: _Shell) -> Iterator[Check]:
    try:
        found = account(site, None, os.environ)
    except SiteError as error:
        yield Check("account", FAIL, str(error).partition(": ")[2])  # which names the remedy itself
        return
    yield Check("account", OK, found or "none needed")


def _scratch(site: Site) -> Path:
    """Return the profile's scratch directory, or this one where it has none or its variables are not set."""
    path = os.path.expandvars(site.scratch or "")
    return Path(path) if path and "$" not in path else Path.cwd()


def _paths(site: Site, shell: _Shell) -> Iterator[Check]:
    if site.scratch is not None and "$" in os.path.expandvars(site.scratch):
        remedy = "set the variable, or `scratch` in a profile of your own"
        yield Check("paths", FAIL, f"{site.scratch}: has a variable that is not set", remedy)
        return
    scratch = _scratch(site)
    before = time.time()
    try:
        with tempfile.NamedTemporaryFile(dir=scratch, prefix=".rookery-doctor-") as file:
            file.write(b"1")
            file.flush()
            os.fsync(file.fileno())
            stamp = Path(file.name).stat().st_mtime
    except OSError as error:
        yield Check("paths", FAIL, f"{scratch}: {error.strerror}", "make it, or choose another run_dir")
        return
    yield Check("paths", OK, f"{scratch} can be written")
    skew = max(before - stamp, stamp - time.time(), 0.0)
    if skew > _MOST_SKEW_SECONDS:
        remedy = "tell the site; ages of checkpoints and of bad nodes will be wrong"
        yield Check("clock", WARN, f"{scratch} is {skew:.0f} s off this host", remedy)
    else:
        yield Check("clock", OK, f"{scratch} and this host agree")


def _space(site: Site, shell: _Shell) -> Iterator[Check]:
    scratch = _scratch(site)
    if not scratch.is_dir():
        return
    free = shutil.disk_usage(scratch).free / 1e9
    few = f"{scratch}: {free:,.0f} GB free"
    if free < _FEW_FREE_GB:
        verdict = FAIL if free < _LEAST_FREE_GB else WARN
        yield Check("space", verdict, few, "make room: a checkpoint of 3.5 B parameters takes 50 GB")
    else:
        yield Check("space", OK, few)
    if shutil.which("lfs") is not None:
        yield from _lustre_quota(scratch)


def _lustre_quota(scratch: Path) -> Iterator[Check]:
    command = ["lfs", "quota", "-q", "-u", str(os.getuid()), str(scratch)]
    said = _run(command).stdout.replace("*", "").split()  # a star marks what is over its limit
    numbers = [int(word) for word in said if word.isdecimal()]
    if len(numbers) < 3:  # used, soft and hard limit in KiB
        return
    used, limit = numbers[0], numbers[2] or numbers[1]
    found = f"{used / 2**20:,.0f} GiB used of {limit / 2**20:,.0f} GiB" if limit else "no limit"
    if limit and used > _MUCH_OF_QUOTA * limit:
        yield Check("quota", FAIL if used >= limit else WARN, found, "remove files, or ask the site for more")
    else:
        yield Check("quota", OK, found)


def _compilers(site: Site, shell: _Shell) -> Iterator[Check]:
    path = shell.variables.get("PATH", "")
    host = next((name for name in ("cc", "gcc", "clang") if shutil.which(name, path=path)), None)
    if host is None and site.python is None:
        yield Check("compilers", WARN, "no C compiler", "load one: torch.compile and Triton need it in the job")
    else:
        yield Check("compilers", OK, host or "those of the container")
    device = _DEVICE_COMPILER.get(site.accelerator)
    if device is not None and site.python is None and shutil.which(device, path=path) is None:
        yield Check(
            "compilers", WARN, f"no {device}", f"load the {site.accelerator} module if packages are to be built"
        )


def _mpi(site: Site, shell: _Shell) -> Iterator[Check]:
    if site.control == "torch":
        yield Check("mpi", OK, "not used here: messages go over gloo")
        return
    if site.python is None:
        yield _mpi4py(site, shell)
    wanted = next((option.partition("=")[2] for option in site.srun if option.startswith("--mpi=")), None)
    if site.scheduler == "slurm" and wanted is not None and shutil.which("srun"):
        offered = re.findall(
            r"^\s+(\w+)$", (answer := _run(["srun", "--mpi=list"])).stderr + answer.stdout, re.MULTILINE
        )
        if offered and wanted not in offered:
            found = f"srun has no --mpi={wanted}, only {', '.join(offered)}"
            yield Check("pmi", FAIL, found, f"change `srun` in a profile of your own that extends {site.name}")
        else:
            yield Check("pmi", OK, f"srun --mpi={wanted}")


def _mpi4py(site: Site, shell: _Shell) -> Check:
    # MPI_Init aborts on some login nodes, and a broken library can end the process that loads it.
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    done = _run([sys.executable, "-c", code], shell.variables)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        remedy = f"build it: {site.mpi4py}" if site.mpi4py else "install the extra `mpi`, or mpi4py against your MPI"
        return Check("mpi", FAIL, f"mpi4py does not load: {said[-1]}", remedy)
    library = " ".join(done.stdout.split())[:60]
    is_cray = any("cray" in option for option in site.srun) or "cray" in " ".join(site.modules).lower()
    if is_cray and "cray" not in library.lower():
        remedy = f"build it: {site.mpi4py}" if site.mpi4py else "build mpi4py against cray-mpich"
        return Check("mpi", WARN, f"{library}, at a site of Cray MPICH", remedy)
    return Check("mpi", OK, library)


def _variables(site: Site) -> dict[str, Variable]:
    return {**site.env, **site.env_many_nodes}


def _gpu_aware_mpi(site: Site, shell: _Shell) -> Iterator[Check]:
    name = "MPICH_GPU_SUPPORT_ENABLED"
    if site.accelerator == "cpu" or site.control == "torch":
        return
    set_by_job = _variables(site).get(name)
    value = set_by_job.value if set_by_job is not None else shell.variables.get(name, "0")
    if value == "1" and not site.overrides.get("comm.gpu_aware_mpi"):
        remedy = f"unset it, or set {name}=0 in the profile: beside NCCL and RCCL it can deadlock"
        yield Check("gpu-aware mpi", WARN, f"{name}=1", remedy)
    else:
        yield Check("gpu-aware mpi", OK, "on" if value == "1" else "off")


def _plugin(site: Site, shell: _Shell) -> Iterator[Check]:
    variables = _variables(site)
    if not {"NCCL_NET", "NCCL_NET_PLUGIN"} & variables.keys() or site.python is not None:
        return
    set_by_job = variables.get("NCCL_NET_PLUGIN")
    named = os.path.expandvars(set_by_job.value) if set_by_job else shell.variables.get("NCCL_NET_PLUGIN", "")
    if named.startswith("/") and Path(named).is_file():
        yield Check("plugin", OK, named)
        return
    folders = [Path(folder) for folder in shell.variables.get("LD_LIBRARY_PATH", "").split(":") if folder]
    patterns = _PLUGIN.get(site.accelerator, ())
    found = next((str(path) for folder in folders for each in patterns for path in folder.glob(each)), None)
    if found is None:
        remedy = "load its module, or set NCCL_NET_PLUGIN to the file; without it collectives go over slow sockets"
        yield Check("plugin", FAIL, f"no {patterns[0] if patterns else 'plugin'} on LD_LIBRARY_PATH", remedy)
    else:
        yield Check("plugin", OK, found)


def _queue(site: Site, shell: _Shell) -> Iterator[Check]:
    if site.scheduler != "slurm":
        yield Check("queue", OK, "none: processes of this machine")
        return
    if not queue.available():
        yield Check("queue", FAIL, "no squeue and scontrol here", "type this on a login node of the site")
        return
    try:
        offered = queue.partitions()
    except queue.QueueError as error:
        yield Check("queue", FAIL, str(error), "try again; then ask the site")
        return
    wanted = {row.partition: row.default for row in reversed(site.queues) if row.partition is not None}
    missing = [name for name in wanted if name not in offered]
    if missing:
        verdict = FAIL if any(wanted[name] for name in missing) else WARN
        found = f"no partition {', '.join(missing)}; there are {', '.join(offered)}"
        yield Check("queue", verdict, found, f"change `queues` in a profile of your own that extends {site.name}")
    else:
        yield Check("queue", OK, ", ".join(wanted) or ", ".join(offered))


def _node_local(site: Site) -> Iterator[Check]:
    if site.node_local is None:
        return
    path = Path(os.path.expandvars(site.node_local.path))
    if os.access(path, os.W_OK):
        yield Check("node-local", OK, f"{path}: {shutil.disk_usage(path).free / 1e9:,.0f} GB free")
    else:
        wanted = f"ask for it: --sbatch constraint={site.node_local.constraint}" if site.node_local.constraint else ""
        yield Check("node-local", WARN, f"{path} cannot be written", wanted or "files are read from the shared path")


def _try_devices(site: Site) -> dict[str, Any]:
    from slurm.node_trial import try_node
    from slurm.steps import rank_python

    trial = try_node(site.ranks_per_node, rank_python(site))
    kind = {"cpu": "cpu", "cuda": "cuda or rocm"}.get(trial["kind"] or "", "")
    if trial["problem"] is None and site.accelerator not in kind:
        trial["problem"] = f"torch sees no device of {site.accelerator}, only the CPU"
        trial["unhealthy"] = site.python is not None or torch_build() == site.accelerator
    if trial["problem"] is not None:
        remedy = "exclude this node" if trial["unhealthy"] else "mend the environment"
        return {**trial, "check": Check("devices", FAIL, trial["problem"], remedy)}
    rates = [record["gemm_flops"] / 1e12 for record in trial["devices"]]
    buses = trial["devices"][0]["allreduce_gb_per_second"]
    largest = max(buses, key=int, default=None)
    network = "" if largest is None else f", all-reduce of {largest} MB at {buses[largest]:.1f} GB/s"
    name = trial["devices"][0]["device"]
    found = f"{len(rates)} x {name}: GEMM {min(rates):.2f} to {max(rates):.2f} TFLOP/s{network}"
    return {**trial, "check": Check("devices", OK, found)}


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )


_LOOKS: tuple[Callable[[Site, _Shell], Iterator[Check]], ...] = (
    _profile,
    _python,
    _modules,
    _account,
    _queue,
    _paths,
    _space,
    _compilers,
    _mpi,
    _gpu_aware_mpi,
    _plugin,
)
