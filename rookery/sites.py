"""`rookery sites`: the profiles of supercomputers, with the reason and the source of all that they set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from slurm.site import Queue, Site, Variable

app = typer.Typer(help="List and show the profiles of supercomputers.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_sites(as_json: AsJson = False) -> None:
    """List the profiles, shipped and your own."""
    from slurm.site import SITES, SiteError, site_names, site_summary

    found = []
    for name in site_names():
        try:
            found.append(site_summary(name))
        except SiteError as error:  # one bad file must not hide the others
            found.append({"name": name, "title": str(error), "accelerator": None, "ranks_per_node": None, "file": None})
    if as_json:
        print(json.dumps({"sites": found}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("site", "what", "accelerator", "ranks a node", ""):
        table.add_column(heading, justify="right" if heading == "ranks a node" else "left")
    for site in found:
        own = "" if site["file"] is not None and str(site["file"]).startswith(str(SITES)) else "own"
        table.add_row(*(str(site[key] or "?") for key in ("name", "title", "accelerator", "ranks_per_node")), own)
    Console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a profile, as `rookery sites list` gives it.")],
    as_json: AsJson = False,
) -> None:
    """Show a profile with all that it extends: nodes, queues, modules, every variable with its reason and source."""
    from slurm.site import load_site, site_path

    site = load_site(name)
    if as_json:
        print(json.dumps({"file": str(site_path(name)), **dataclasses.asdict(site)}))
        return
    print(f"{site.name}: {site.title}\n{site_path(name)}")
    _print_lines("Unverified", site.unverified)
    _print_lines("Notes", site.notes)
    _print_facts("Node", _node(site))
    _print_lines("Queues, tried in order", [_queue(row) for row in site.queues])
    _print_facts("Jobs", _jobs(site))
    _print_lines("Modules", [f"module use {path}" for path in site.module_paths] + site.modules + site.after_modules)
    for heading, variables in (
        ("Environment", site.env),
        ("Environment of a run on one node", site.env_one_node),
        ("Environment of a run on several nodes", site.env_many_nodes),
        ("Environment, on the node's own disk or memory", site.env_node_local),
        ("If collectives hang (not set)", site.on_hang),
    ):
        _print_variables(heading, variables)
    _print_facts("Configuration, below your own", site.overrides)
    _print_facts("Places", _places(site))


def _node(site: Site) -> dict[str, object]:
    return {
        "accelerator": site.accelerator,
        "ranks": f"{site.ranks_per_node}, each with {site.cores_per_rank} of {site.cores_per_node} cores",
        "binding": site.binding.mode,
        "core masks": ",".join(site.binding.cpu_masks) or None,
        "low-noise cores": site.low_noise,
        "near one another": site.numa,
        "memory of a node": None if site.host_memory_gb is None else f"{site.host_memory_gb:g} GB",
        "memory of a device": None if site.device_memory_gb is None else f"{site.device_memory_gb:g} GB",
        "peak of a device": None if site.peak_bf16_flops is None else f"{site.peak_bf16_flops:.4g} FLOP/s in bf16",
    }


def _queue(row: Queue) -> str:
    nodes = f"{row.min_nodes} nodes or more" if row.max_nodes is None else f"{row.min_nodes} to {row.max_nodes} nodes"
    parts = [row.label, nodes, "time unknown" if row.hours is None else f"{row.hours:g} h"]
    parts += [f"{row.max_running} running"] if row.max_running is not None else []
    parts += [f"{row.max_queued} queued"] if row.max_queued is not None else []
    parts += [] if row.chaining else ["no chains"]
    parts += [] if row.default else ["only when asked for"]
    parts += [f"UNVERIFIED: {row.unverified}"] if row.unverified else []
    return "; ".join(parts)


def _jobs(site: Site) -> dict[str, object]:
    variables = ", ".join([*site.account_variables, "SBATCH_ACCOUNT"])
    account = f"--account, or {variables}" if site.account_required else None
    return {
        "scheduler": site.scheduler,
        "most queued": site.queued_jobs,
        "most eligible": site.eligible_jobs,
        "account": f"{account}; ends in {site.account_suffix}" if account and site.account_suffix else account,
        "sbatch": " ".join(f"--{key}={value}" if value else f"--{key}" for key, value in site.sbatch.items()) or None,
        "srun": " ".join(site.srun) or None,
        "longer runs": site.chain,
        "signal": f"{site.signal_seconds} s before the end, at least",
        "control plane": site.control,
        "python": site.python,
        "mpi4py": site.mpi4py,
    }


def _places(site: Site) -> dict[str, object]:
    local = site.node_local
    return {
        "scratch": site.scratch,
        "node-local": None if local is None else f"{local.path}: {local.notes}",
        "staging": site.stage_method,
        "proxy": site.proxy,
    }


def _print_lines(heading: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"\n{heading}", *(f"  {line}" for line in lines), sep="\n")


def _print_facts(heading: str, facts: Mapping[str, object]) -> None:
    known = {key: value for key, value in facts.items() if value is not None}
    width = max(map(len, known), default=0)
    _print_lines(heading, [f"{key:<{width}}  {value}" for key, value in known.items()])


def _print_variables(heading: str, variables: Mapping[str, Variable]) -> None:
    lines = []
    for key, variable in variables.items():
        lines += [f"{key}={variable.value}", f"    {variable.why} [{variable.source}]"]
    _print_lines(heading, lines)
