"""Copies files to the disks of a job's nodes, once a job, and proves that they arrived.

Thousands of ranks that import from one parallel file system wait minutes for it; one file that SLURM spreads as a tree
takes seconds. What a file is for is seen from the file: a packed environment, the plugin of the communication library,
an archive of compiled kernels, or an image that the site's python command names.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.job_variables import STAGED_KERNELS
from slurm.request import JobRequest
from slurm.site import Site
from slurm.steps import node_command, step_environment

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_PLUGINS = ("librccl-net", "libnccl-net")
_REASON = "rookery-staging: "
_SECONDS = 1800
_COMPRESSION = 4  # at most, of what environments consist of; their archives do not say how much is in them
_SHOWN = 3

# Runs on every node, in bash. A line on standard error that begins with _REASON ends it all; lines on standard output
# are what `stage` learns: "new", or the contents of the marker that tells that this was done.
_FUNCTIONS = f"""\
set -uo pipefail
node=${{SLURMD_NODENAME:-$(hostname)}}
fail() {{ echo "{_REASON}$node: $*" >&2; exit 1; }}
try() {{ # A command tells its reason first, Python last.
    said=$("$@" 2>&1 | sed '/^$/d') && return
    case $said in Traceback*) fail "${{said##*$'\\n'}}" ;; *) fail "${{said%%$'\\n'*}}" ;; esac
}}
look() {{ # PARENT FOLDER MARKER BYTES
    [ -d "$1" ] || fail "there is no directory $1"
    try mkdir -p -m 700 "$2"
    # Its name can be guessed, and the ranks run what is in it.
    {{ [ -O "$2" ] && [ ! -L "$2" ]; }} || fail "$2 is a link or another user's, and not trusted; remove it, or set \
node_local.path to a directory of your own"
    if [ -f "$3" ]; then cat "$3"; exit; fi
    free=$(($(stat -f -c '%a * %S' "$2")))
    [ "$free" -ge "$4" ] || fail "$2 has room for $((free >> 20)) MiB, and $((($4 + 1048575) >> 20)) MiB are needed"
    echo new
}}
begin() {{ # FOLDER MARKER PASS: one node at a time, and one for all, where the directory is not a node's own after all
    exec 9> "$1/.lock"
    flock 9 || fail "$1/.lock cannot be locked"
    if grep -qsxF "$3" "$2"; then cat "$2"; exit; fi
    learned=$3
}}
check() {{ # FILE SIZE SHA256
    [ -f "$1" ] || fail "$1 is not there"
    size=$(stat -c %s "$1")
    [ "$size" = "$2" ] || fail "$1 has $size bytes instead of $2"
    [ "$(sha256sum < "$1" | cut -c 1-64)" = "$3" ] || fail "$1 is damaged: its SHA-256 is another"
}}
unpack() {{ # ARCHIVE FOLDER
    try rm -rf "$2"
    try mkdir -m 700 "$2"
    case $1 in
        *gz) try tar --use-compress-program="$(command -v pigz || echo gzip)" --no-same-owner -xf "$1" -C "$2" ;;
        *) try tar --no-same-owner -xf "$1" -C "$2" ;;
    esac
    rm -f "$1"
    [ -x "$2/bin/python" ] || return 0
    if [ -x "$2/bin/conda-unpack" ]; then try "$2/bin/python" "$2/bin/conda-unpack"; fi
    try "$2/bin/python" -c ''
    learned="$learned
python $2/bin/python"
}}
"""


class StagingError(RuntimeError):
    """Files could not be brought to all nodes; the job can go on with the shared ones."""


@dataclass(frozen=True)
class Staged:
    """What the nodes have on their own disks.

    Attributes:
        python: command that runs python from there, as for the shell; None if nothing of it is staged.
        environment: variables for the ranks.
        seconds: how long it took.
        what: names of the files.
    """

    python: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    what: list[str] = field(default_factory=list)


def stage(site: Site, request: JobRequest, nodes: Sequence[str], job: str) -> Staged:
    """Bring the files of a request to `nodes` of the job that this process runs in, unless they are there already.

    Args:
        site: says where a node has a directory of its own, and how files get there.
        request: names the files.
        nodes: that need them, at least one.
        job: its number, after which the directory of the files is named.

    Raises:
        StagingError: a file or a directory is missing, a disk is full, a copy failed or is not equal to its original;
            with the node, and what it said.
    """
    sources = [Path(name) for name in request.stage]
    if not sources:
        return Staged()
    began = time.monotonic()
    folder = _folder(site, job)
    identity, size = _identity(sources)
    marker = folder / f".staged-{identity}"
    look = ["look", str(folder.parent), str(folder), str(marker), str(size)]
    learned = _on_nodes(site, request, nodes, shlex.join(look))
    if "new" in learned:
        learned = _on_nodes(site, request, nodes, _receive(site, sources, folder, marker))
    python = next((line.removeprefix("python ") for line in learned if line.startswith("python ")), None)
    return Staged(
        python=shlex.quote(python) if python else _python_in_image(site, sources, folder),
        environment=_environment(sources, folder),
        seconds=round(time.monotonic() - began, 3),
        what=[source.name for source in sources],
    )


def remove_staged(site: Site, request: JobRequest, nodes: Sequence[str], job: str) -> None:
    """Remove what `stage` brought to `nodes`: not every site empties the disks of its nodes after a job.

    Raises:
        StagingError: a node does not answer.
    """
    if request.stage:
        _on_nodes(site, request, nodes, shlex.join(["try", "rm", "-rf", str(_folder(site, job))]))


def _folder(site: Site, job: str) -> Path:
    if site.stage_method == "none" or site.node_local is None:
        raise StagingError(f"site {site.name} names no directory of the nodes' own (stage_method, node_local.path)")
    parent = os.path.expandvars(site.node_local.path)
    if "$" in parent:
        raise StagingError(f"node_local.path {site.node_local.path}: a variable in it is not set in this job")
    return Path(parent) / f"rookery-{job}"


def _identity(sources: Sequence[Path]) -> tuple[str, int]:
    """Return a digest that changes with any of the files, and the bytes that they take on a node."""
    digest, size = hashlib.sha256(), 0
    for source in sources:
        try:
            status = source.stat()
        except OSError as error:
            raise StagingError(f"{source}: {error.strerror}") from error
        size += status.st_size * (1 + _times_unpacked(source))
        digest.update(f"{source}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    if len({source.name for source in sources}) < len(sources):
        raise StagingError(f"two of these have the same name, rename one: {', '.join(map(str, sources))}")
    return digest.hexdigest()[:16], size


def _receive(site: Site, sources: Sequence[Path], folder: Path, marker: Path) -> str:
    """Let SLURM spread the files, if the site does it so; return what a node has to do then."""
    lines = [shlex.join(["begin", str(folder), str(marker), f"pass {time.time_ns()}"])]
    for source in sources:
        target = folder / source.name
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if site.stage_method == "sbcast":
            _finish(["sbcast", "--force", "--preserve", str(source), str(target)], source.name)
        else:
            lines.append(shlex.join(["try", "cp", str(source), str(target)]))
        lines.append(shlex.join(["check", str(target), str(source.stat().st_size), digest]))
        if (unpacked := _unpacked(source, folder)) is not None:
            lines.append(shlex.join(["unpack", str(target), str(unpacked)]))
    lines.append(f'echo "$learned" | tee {shlex.quote(str(marker))} || fail "{marker.name} cannot be written"')
    return "\n".join(lines)


def _unpacked(source: Path, folder: Path) -> Path | None:
    """Return the directory on a node that an archive becomes; None for what stays a file."""
    suffix = _suffix(source)
    return None if suffix is None else folder / source.name.removesuffix(suffix)


def _times_unpacked(source: Path) -> int:
    """Return how many times the size of a file comes beside it when it is unpacked."""
    return {None: 0, ".tar": 1}.get(_suffix(source), _COMPRESSION)


def _suffix(source: Path) -> str | None:
    """Return the end of the name of an archive that is unpacked; None for what stays a file."""
    suffix = next((suffix for suffix in _ARCHIVES if source.name.endswith(suffix)), None)
    return None if suffix is None or _is_kernels(source) else suffix


def _is_kernels(source: Path) -> bool:
    """Whether a file is an archive of `pipeline.compilation`, which is unpacked by each rank for itself."""
    if source.suffix != ".tar":
        return False
    try:
        with tarfile.open(source, "r:") as archive:
            first = archive.next()
    except tarfile.TarError:
        return False
    return first is not None and first.name.split("/")[0] in ("inductor", "triton")


def _environment(sources: Sequence[Path], folder: Path) -> dict[str, str]:
    found = {}
    for source in sources:
        if source.name.startswith(_PLUGINS) and ".so" in source.suffixes:
            found["NCCL_NET_PLUGIN"] = str(folder / source.name)
        elif _is_kernels(source):
            found[STAGED_KERNELS] = str(folder)
    return found


def _python_in_image(site: Site, sources: Sequence[Path], folder: Path) -> str | None:
    """Return the site's python command with the paths of staged files in it replaced, None if there are none."""
    command = os.path.expandvars(site.python or "")
    for source in sources:
        command = command.replace(str(source), str(folder / source.name))
    return command if command != os.path.expandvars(site.python or "") else None


def _on_nodes(site: Site, request: JobRequest, nodes: Sequence[str], script: str) -> set[str]:
    """Run bash lines once on every node; return the distinct lines that they wrote."""
    command = node_command(site, request, nodes, ["bash", "-c", f"{_FUNCTIONS}{script}"])
    return set(_finish(command, ", ".join(nodes), step_environment(site, request, nodes)).splitlines())


def _finish(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end; return its standard output, or raise what it complained of."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StagingError(f"{what}: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        reasons = sorted({line.split(_REASON, 1)[1] for line in said if _REASON in line})
        more = f" (and {len(reasons) - _SHOWN} more)" if len(reasons) > _SHOWN else ""
        raise StagingError(
            "; ".join(reasons[:_SHOWN]) + more or f"{what}: {command[0]} failed: {' '.join(said[-_SHOWN:])}"
        )
    return done.stdout
