"""`rookery plan`: what every device of a run holds and computes, before anything is submitted."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Path of a YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks (devices) of the run.  [default: 1]")] = None,
    site: Annotated[str | None, typer.Option(metavar="NAME", help="Ranks, memory and queue of this site.")] = None,
    nodes: Annotated[int | None, typer.Option(help="With --site: nodes of the run.  [default: 1]")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks of a node.  [default: all]")] = None,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", help="Memory of a device in GB of 10^9 bytes: says what fits.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the memory that a rank needs with each policy of activation checkpointing, and the FLOPs of a step."""
    from pipeline.config import load_config
    from pipeline.plan import plan as plan_run

    if site is None:
        if nodes is not None:
            raise ValueError(f"--nodes {nodes}: is of use with --site alone; use --ranks")
        config_here = load_config(config, overrides or [])
        count = 1 if ranks is None else ranks
        per_node = count if ranks_per_node is None else ranks_per_node
        result = plan_run(config_here, count, per_node, memory_gb)
    else:
        if ranks is not None:
            raise ValueError(f"--ranks {ranks}: follows from --site {site} and --nodes; leave it away")
        result = _plan_at(site, config, overrides or [], 1 if nodes is None else nodes, ranks_per_node, memory_gb)
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)


def _plan_at(
    name: str, source: str, overrides: list[str], nodes: int, ranks_per_node: int | None, memory_gb: float | None
) -> dict[str, Any]:
    """Return the plan of a run on nodes of a site, with what the queue grants to so many."""
    from slurm.limits import allot
    from slurm.site import load_site

    site = load_site(name)
    granted = allot(site, nodes, None, None, None) if any(queue.hours for queue in site.queues) else None

    from pipeline.config import load_config
    from pipeline.plan import plan as plan_run

    per_node = site.ranks_per_node if ranks_per_node is None else ranks_per_node
    config = load_config(source, overrides, beneath=site.overrides)
    result = plan_run(config, nodes * per_node, per_node, memory_gb or site.device_memory_gb)
    peak = site.peak_bf16_flops
    seconds = None if peak is None else result["model_flops"] / (peak * nodes * per_node)
    result["site"] = {
        "name": name,
        "nodes": nodes,
        "partition": granted and granted.partition,
        "qos": granted and granted.qos,
        "minutes": granted and granted.minutes,
        "seconds_of_a_step_at_peak": seconds,
        "hours_of_the_run_at_peak": None if seconds is None else seconds * config.train.steps / 3600,
        "unverified": site.unverified,
    }
    return result


def _print(result: dict[str, Any]) -> None:
    state, console = result["state"], Console()
    facts = Table(
        title=f"{result['name']}: {result['ranks']:,} ranks, {result['ranks_per_node']} a node", show_header=False
    )
    rows = {
        "parameters": f"{result['parameters']:,}, {result['precision']}",
        "batch": f"{result['tokens_per_step']:,} tokens a step: {result['accumulation']} micro-batches a rank of"
        f" {result['micro_batch_size']} x {result['sequence_length']:,}",
        "FLOPs of a mean step": f"{result['model_flops']:.3e} of the model, of all ranks",
        "ZeRO over": f"{result['shards']:,} ranks",
        "weights": _gb(state["weights"]),
        "gradients": _gb(state["gradients"]),
        "master weights": _gb(state["master"]),
        "optimizer state": _gb(state["optimizer"]),
        "buckets": _gb(state["buckets"]),
        "of these in host memory": _gb(state["on_host"]),
        "logits, one copy": f"{_gb(result['logits'])} (part of the activations)",
    }
    for name, text in (rows | _site_rows(result.get("site"))).items():
        facts.add_row(name, text)
    console.print(facts)
    table = Table(title=f"A rank's device at {result['backprop_depth']} iterations with gradient")
    for name in ("activation checkpointing", "each iteration", "activations", "total", "FLOPs of a sequence", "fits"):
        table.add_column(name, justify="left" if name.startswith("activation c") else "right")
    for name, policy in result["policies"].items():
        fits = "" if policy["fits"] is None else "yes" if policy["fits"] else "no"
        mark = " (configured)" if name == result["configured"] else ""
        sizes = (_gb(policy[key]) for key in ("iteration", "activations", "total"))
        table.add_row(name + mark, *sizes, f"{policy['flops']:.3e}", fits)
    console.print(table)
    console.print("Eager execution; fragmentation and the collective library's own buffers come on top.")


def _site_rows(site: dict[str, Any] | None) -> dict[str, str]:
    """Return what the table says of a site."""
    if site is None:
        return {}
    from slurm.limits import show_duration

    rows = {"site": f"{site['name']}, {site['nodes']:,} node{'s' if site['nodes'] > 1 else ''}"}
    if site["minutes"] is not None:
        queue = site["qos"] or site["partition"] or "the default queue"
        rows["longest job"] = f"{show_duration(site['minutes'])} in {queue}"
    if site["hours_of_the_run_at_peak"] is not None:
        hours, step = site["hours_of_the_run_at_peak"], site["seconds_of_a_step_at_peak"]
        rows["no faster than"] = f"{step:.2g} s a mean step, {hours:,.1f} h the run: the devices' peak FLOP/s"
    return rows


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
