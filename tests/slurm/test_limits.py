"""Limits of queues: what a job gets, and refusals that name the nearest valid value."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.limits import allot, links_for, parse_duration, show_duration
from slurm.site import SITES, Queue, Site, SiteError, load_site

LOADED = {path.stem: load_site(path.stem) for path in sorted(SITES.glob("*.yaml"))}
WITH_QUEUES = [site for site in LOADED.values() if site.queues]
FRONTIER = LOADED["frontier"]


@pytest.mark.parametrize(
    ("nodes", "hours"),
    [(1, 2), (91, 2), (92, 6), (183, 6), (184, 12), (1881, 12), (1882, 12), (5644, 12), (5645, 12), (9472, 12)],
)
def test_the_bins_of_frontier(nodes: int, hours: int) -> None:
    granted = allot(FRONTIER, nodes, None, None, None)
    assert (granted.partition, granted.qos, granted.minutes) == ("batch", None, hours * 60)
    assert granted.most_minutes == hours * 60
    assert allot(FRONTIER, nodes, hours * 60, "batch", None) == granted
    assert allot(FRONTIER, nodes, 30, None, None).minutes == 30
    with pytest.raises(SiteError, match=f"use --time {hours}h"):
        allot(FRONTIER, nodes, hours * 60 + 1, None, None)


@pytest.mark.parametrize(
    ("site", "nodes", "wish", "message"),
    [
        ("frontier", 9473, {}, r"9473 nodes are above the 9472 that partition batch takes; use --nodes 9472$"),
        ("frontier", 65, {"partition": "extended"}, "above the 64 .* use --nodes 64, or --partition batch$"),
        ("frontier", 0, {}, "use --nodes 1$"),
        (
            "frontier",
            91,
            {"minutes": 180},
            "above the 2h that 91 nodes get in .*; use --time 2h, or --nodes 92, or --bu",
        ),
        ("frontier", 64, {"minutes": 180}, "or --partition extended, or --budget 3h for a chain of jobs$"),
        ("frontier", 183, {"minutes": 720}, "use --time 6h, or --nodes 184"),
        ("frontier", 2, {"minutes": 180, "qos": "debug"}, "use --time 2h, or --partition extended$"),
        ("frontier", 2, {"partition": "bach"}, r"no partition 'bach' \(did you mean 'batch'\?\); there are batch, ext"),
        ("frontier", 2, {"qos": "debg"}, r"no qos 'debg' \(did you mean 'debug'\?\)"),
        ("frontier", 2, {"partition": "extended", "qos": "debug"}, "no queue for qos debug; use --partition batch$"),
        ("leonardo", 10, {"qos": "boost_qos_bprod"}, "10 nodes are below the 65 .* use --nodes 65, or --partition"),
        ("lumi", 1025, {}, "use --nodes 1024, or --partition bench"),
        ("alps", 1, {"partition": "normal", "qos": "long"}, "no qos 'long'; leave --qos away"),
        ("marenostrum5", 101, {}, "use --nodes 100$"),
        ("generic-amd", 2, {}, "say how long: --time 2h"),
    ],
)
def test_a_wish_that_no_queue_grants_is_refused_with_the_nearest_that_is(
    site: str, nodes: int, wish: dict[str, Any], message: str
) -> None:
    wish = {"minutes": None, "partition": None, "qos": None} | wish
    with pytest.raises(SiteError, match=message):
        allot(LOADED[site], nodes, **wish)


@settings(max_examples=300, deadline=None)
@given(
    site=st.sampled_from(WITH_QUEUES),
    nodes=st.integers(-5, 12000),
    minutes=st.none() | st.integers(0, 10000),
    row=st.none() | st.integers(0, 3),
)
def test_following_the_advice_of_refusals_leads_to_a_job(
    site: Site, nodes: int, minutes: int | None, row: int | None
) -> None:
    asked = Queue() if row is None else site.queues[row % len(site.queues)]
    for _ in range(4):  # less than one node, too few for the queue, no time
        try:
            granted = allot(site, nodes, minutes, asked.partition, asked.qos)
        except SiteError as error:
            option, value = str(error).split("use --")[1].split(",")[0].split(" ")
            if option == "nodes":
                nodes = int(value)
            else:
                minutes = parse_duration(value)
        else:
            break
    else:
        pytest.fail("four refusals in a row")
    queue = granted.queue
    assert queue is not None
    assert queue in site.queues
    assert queue.min_nodes <= nodes
    assert queue.max_nodes is None or nodes <= queue.max_nodes
    assert granted.minutes == (minutes or granted.most_minutes)
    assert queue.hours is None or granted.minutes <= queue.hours * 60


def test_a_queue_that_is_not_a_default_is_taken_when_asked_for() -> None:
    assert allot(FRONTIER, 64, None, "extended", None).minutes == 24 * 60
    debug = allot(FRONTIER, 64, None, None, "debug")
    assert (debug.partition, debug.qos, debug.minutes) == ("batch", "debug", 120)


def test_rows_are_tried_in_order_and_a_longer_time_goes_to_a_later_one() -> None:
    assert allot(LOADED["lumi"], 4, None, None, None).partition == "standard-g"
    assert allot(LOADED["lumi"], 4, 60 * 60, None, None).partition == "small-g"
    assert allot(LOADED["leonardo"], 65, None, None, None).qos == "boost_qos_bprod"


def test_a_site_without_queues_takes_what_is_asked_for() -> None:
    granted = allot(LOADED["generic-nvidia"], 3, 90, "gpu", "normal")
    assert (granted.partition, granted.qos, granted.minutes, granted.queue) == ("gpu", "normal", 90, None)


def test_a_budget_is_cut_into_links() -> None:
    granted = allot(FRONTIER, 512, None, None, None)
    assert [links_for(FRONTIER, granted, budget) for budget in (None, 1, 720, 721, 1440, 3 * 1440)] == [
        1,
        1,
        1,
        2,
        2,
        6,
    ]


def test_a_budget_of_more_links_than_can_wait_is_refused_with_the_most() -> None:
    granted = allot(FRONTIER, 1, None, None, None)
    assert links_for(FRONTIER, granted, 200 * 60) == 100
    with pytest.raises(SiteError, match=r"takes 101 jobs of 2h, .* at most 100 jobs .* use --budget 8d8h$"):
        links_for(FRONTIER, granted, 200 * 60 + 1)
    with pytest.raises(SiteError, match=r"use --budget 4d4h, or a longer --time"):
        links_for(FRONTIER, allot(FRONTIER, 1, 60, None, None), 9000)
    requeued = dataclasses.replace(FRONTIER, chain="requeue")
    assert links_for(requeued, granted, 200 * 60 + 1) == 101


def test_a_chain_is_refused_where_chains_are_prohibited() -> None:
    debug = allot(FRONTIER, 4, None, None, "debug")
    assert links_for(FRONTIER, debug, 120) == 1
    with pytest.raises(SiteError, match=r"partition batch, qos debug prohibits chains of jobs; use --budget 2h$"):
        links_for(FRONTIER, debug, 121)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("90", 90), ("90m", 90), ("2h", 120), ("1h30m", 90), ("3d", 4320), ("1d12h", 2160), ("02:00:00", 120)),
        *(("1-12:00:00", 2160), ("00:00:01", 1), ("0:01:30", 2), (" 2h ", 120)),
    ],
)
def test_a_duration_is_read(text: str, minutes: int) -> None:
    assert parse_duration(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0h", "2 h", "h", "-1", "1.5h", "2:30", "02:60:00", "1w", "\u0661h"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SiteError, match=r"is not a duration; write minutes \(90\), 90m, 2h"):
        parse_duration(text)


@given(st.integers(1, 10**6))
def test_durations_are_shown_as_they_are_read(minutes: int) -> None:
    assert parse_duration(show_duration(minutes)) == minutes
