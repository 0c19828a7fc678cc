"""What a site's queues grant: how long a job of so many nodes may run, where, and in how many links a budget fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.schema import nearest
from slurm.site import Queue, Site, SiteError

NO_LIMIT_MINUTES = 10 * 365 * 24 * 60
"""Time of a job that no queue ends: processes of this machine."""

_UNITS = re.compile(r"(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m?)?")
_CLOCK = re.compile(r"(?:([0-9]+)-)?([0-9]+):([0-5][0-9]):([0-5][0-9])")
_MINUTES = (24 * 60, 60, 1)


@dataclass(frozen=True)
class Allotment:
    """Where a job goes and how long it may run there.

    Attributes:
        partition: partition to ask for, None for the scheduler's default.
        qos: quality of service to ask for, None for the default.
        minutes: time limit of the job.
        most_minutes: longest time limit that this queue grants, None if unknown.
        queue: the row of the profile that grants it, None where a profile has none.
    """

    partition: str | None
    qos: str | None
    minutes: int
    most_minutes: int | None
    queue: Queue | None


def parse_duration(text: str) -> int:
    """Return the minutes of a duration such as `90`, `90m`, `2h`, `3d`, `1d12h`, `02:00:00` or `1-12:00:00`.

    Seconds are rounded up to a minute.

    Raises:
        SiteError: it is none, or is zero.
    """
    minutes = 0
    if units := _UNITS.fullmatch(text.strip()):
        minutes = sum(int(part or 0) * unit for part, unit in zip(units.groups(), _MINUTES, strict=True))
    elif clock := _CLOCK.fullmatch(text.strip()):
        *parts, seconds = (int(part or 0) for part in clock.groups())
        minutes = sum(part * unit for part, unit in zip(parts, _MINUTES, strict=True)) + (seconds > 0)
    if minutes == 0:
        raise SiteError(
            f"{text!r} is not a duration; write minutes (90), 90m, 2h, 3d, 1d12h, hours:minutes:seconds (02:00:00) or"
            " with days (1-12:00:00)"
        )
    return minutes


def show_duration(minutes: int) -> str:
    """Return minutes as `parse_duration` reads them, in the largest units: `1d12h`, `2h`, `90m`."""
    days, rest = divmod(minutes, 24 * 60)
    hours, left = divmod(rest, 60)
    if days == 0 and hours == 1 and left:
        return f"{minutes}m"
    return "".join(f"{count}{unit}" for count, unit in ((days, "d"), (hours, "h"), (left, "m")) if count)


def allot(site: Site, nodes: int, minutes: int | None, partition: str | None, qos: str | None) -> Allotment:
    """Return the first queue that takes the job; without `minutes` the job gets the most that this queue grants.

    Raises:
        SiteError: none takes it; with the nearest number of nodes, time or queue that would.
    """
    if nodes < 1:
        raise SiteError(f"--nodes {nodes}: a job needs at least one; use --nodes 1")
    if minutes is not None and minutes < 1:
        raise SiteError(f"--time {minutes}: a job needs at least a minute; use --time 1")
    if not site.queues:
        if minutes is None:
            raise SiteError(f"site {site.name}: the profile knows no time limit; say how long: --time 2h")
        return Allotment(partition, qos, minutes, None, None)
    rows = _rows(site, partition, qos)
    wide = [row for row in rows if _clamp(row, nodes) == nodes]
    if not wide:
        raise SiteError(_wrong_size(site, rows, nodes))
    for row in wide:
        most = _most(row)
        if minutes is None and most is None:
            raise SiteError(f"site {site.name}: {row.label} has no time limit that we know; say how long: --time 2h")
        if minutes is None or most is None or minutes <= most:
            granted = minutes or most
            assert granted is not None
            return Allotment(row.partition or partition, row.qos, granted, most, row)
    assert minutes is not None
    raise SiteError(_too_long(site, rows, wide, nodes, minutes))


def links_for(site: Site, allotment: Allotment, budget_minutes: int | None) -> int:
    """Return how many jobs, one after another, make up a budget; 1 without one.

    Raises:
        SiteError: the queue forbids chains, or holds fewer jobs than that; with the nearest budget.
    """
    if budget_minutes is None:
        return 1
    if budget_minutes < 1:
        raise SiteError(f"--budget {budget_minutes}: is not positive; use --budget {show_duration(allotment.minutes)}")
    links = -(-budget_minutes // allotment.minutes)
    row = allotment.queue
    most = _most_links(site, row)
    if most is None or links <= most:
        return links
    where = row.label if row is not None else "the default queue"
    if row is not None and not row.chaining:
        reason = f"{where} prohibits chains of jobs"
    else:
        reason = f"{where} holds at most {most} jobs of one person" + (" waiting or running" if most > 1 else "")
    raise SiteError(
        f"site {site.name}: --budget {show_duration(budget_minutes)} takes {links} jobs of"
        f" {show_duration(allotment.minutes)}, but {reason}; use --budget {show_duration(most * allotment.minutes)}"
        + ("" if allotment.most_minutes in (None, allotment.minutes) else ", or a longer --time")
    )


def _most_links(site: Site, row: Queue | None) -> int | None:
    if row is not None and not row.chaining:
        return 1
    if site.chain == "requeue":
        return None  # one job that comes back
    known = [limit for limit in (site.queued_jobs, row.max_queued if row else None) if limit is not None]
    return min(known, default=None)


def _rows(site: Site, partition: str | None, qos: str | None) -> list[Queue]:
    """Return the rows that a job asks for; a row that is not a default must be named by its QOS or its partition."""
    for option, asked, known in (
        ("partition", partition, {row.partition for row in site.queues}),
        ("qos", qos, {row.qos for row in site.queues}),
    ):
        names = sorted(name for name in known if name is not None)
        if asked is not None and asked not in names:
            there = f"there are {', '.join(names)}" if names else f"leave --{option} away"
            raise SiteError(
                f"site {site.name}: its profile knows no {option} {asked!r}{nearest(asked, names)}; {there}, or add it"
                f" in a profile of your own that extends {site.name}"
            )
    rows = [row for row in site.queues if partition is None or row.partition in (partition, None)]
    if qos is not None:
        rows = [row for row in rows if row.qos == qos]
    else:
        rows = [row for row in rows if row.default or (row.partition == partition is not None and row.qos is None)]
    if not rows:
        of = next((row.partition for row in site.queues if row.qos == qos), None) if qos else None
        hint = f"use --partition {of}" if of else f"name a qos: {', '.join(_qos_of(site, partition))}"
        raise SiteError(f"site {site.name}: partition {partition} has no queue for qos {qos or 'by default'}; {hint}")
    return rows


def _qos_of(site: Site, partition: str | None) -> list[str]:
    return [row.qos for row in site.queues if row.partition == partition and row.qos is not None]


def _most(row: Queue) -> int | None:
    return None if row.hours is None else int(row.hours * 60)


def _clamp(row: Queue, nodes: int) -> int:
    return max(row.min_nodes, nodes if row.max_nodes is None else min(nodes, row.max_nodes))


def _takes(row: Queue, nodes: int, minutes: int) -> bool:
    most = _most(row)
    return _clamp(row, nodes) == nodes and (most is None or minutes <= most)


def _wrong_size(site: Site, rows: Sequence[Queue], nodes: int) -> str:
    row = min(rows, key=lambda row: abs(_clamp(row, nodes) - nodes))
    closest = _clamp(row, nodes)
    bound = f"above the {closest} that" if closest < nodes else f"below the {closest} from which on"
    others = [other for other in site.queues if other not in rows and _clamp(other, nodes) == nodes]
    elsewhere = "".join(f", or {_options(other)}" for other in others[:1])
    return (
        f"site {site.name}: {_count(nodes)} {'is' if nodes == 1 else 'are'} {bound} {row.label} takes"
        f"{'' if closest < nodes else ' jobs'}; use --nodes {closest}{elsewhere}"
    )


def _too_long(site: Site, rows: Sequence[Queue], wide: Sequence[Queue], nodes: int, minutes: int) -> str:
    row = max(wide, key=lambda row: _most(row) or 0)
    most = _most(row)
    assert most is not None
    text = (
        f"site {site.name}: --time {show_duration(minutes)} is above the {show_duration(most)} that {_count(nodes)}"
        f" {'gets' if nodes == 1 else 'get'} in {row.label}; use --time {show_duration(most)}"
    )
    sizes = [_clamp(other, nodes) for other in rows if _takes(other, _clamp(other, nodes), minutes)]
    if sizes:
        text += f", or --nodes {min(sizes, key=lambda size: abs(size - nodes))}"
    others = [other for other in site.queues if other not in rows and _takes(other, nodes, minutes)]
    text += "".join(f", or {_options(other)}" for other in others[:1])
    if row.chaining:
        text += f", or --budget {show_duration(minutes)} for a chain of jobs"
    return text


def _options(row: Queue) -> str:
    options = [f"--partition {row.partition}"] if row.partition else []
    options += [f"--qos {row.qos}"] if row.qos else []
    return " ".join(options) or "no --partition and no --qos"


def _count(nodes: int) -> str:
    return f"{nodes} node{'s' if nodes != 1 else ''}"
