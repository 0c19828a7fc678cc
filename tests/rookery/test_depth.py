"""`rookery depth` tells before a run what the run will then draw."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.agenda import Agenda
from pipeline.config import load_config
from pipeline.depth import Depth
from pipeline.flops import sequence_flops
from pipeline.forecast import forecast
from tests.ranks import rookery

RAMPS = ("depth.recurrence_ramp={kind: linear, start: 4, steps: 70}", "train.global_batch_size=16")


@pytest.mark.parametrize("scope", ["lockstep", "balanced", "per_sequence"])
def test_the_forecast_is_what_the_ranks_will_do(scope: str) -> None:
    ramp = "schedule={warmup_steps: 15, batch_start: 8, batch_increment: 8, batch_ramp_steps: 60}"
    config = load_config("smoke", [*RAMPS, ramp, f"depth.scope={scope}"])
    told = forecast(config, 100, ranks=2)
    flops, consumed, total = sequence_flops(config.model), 0, 0.0
    agendas = [Agenda(config, rank, 2) for rank in range(2)]
    for step in range(100):
        plans = [agenda.at(step, consumed) for agenda in agendas]
        for plan in plans:
            for depths in plan.depths:
                each: Any = [depths] * 4 if isinstance(depths, Depth) else depths
                total += sum(flops.training(depth) for depth in each)
        assert told["curve"]["learning_rate"][step] == plans[0].learning_rate
        consumed += plans[0].share.batch_size
    assert told["samples"] == consumed == 60 * 8 + 40 * 16
    assert told["flops"]["total"] == pytest.approx(total)
    assert 0.0 < told["flops"]["saved"] < 0.3
    assert told["imbalance"] == 1.0 if scope == "lockstep" else 1.0 < told["imbalance"] < 2.0


def test_the_command_prints_json_and_draws_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    done = rookery("depth", "smoke", "--steps", "60", "--json", "--out", "page/depth.html", *RAMPS[:1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert sum(told["histogram"].values()) == told["steps"] == 60
    page = (tmp_path / "page/depth.html").read_text()
    packed = re.search(r'id="figures">([^<]*)<', page)
    assert packed
    figures = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    assert figures["histogram"]["traces"][0]["x"] == [int(r) for r in told["histogram"]]
    assert len(figures["flops"]["traces"][0]["x"]) == 60
    assert len(figures["recurrence"]["traces"]) == 2
    assert "default-src 'none'" in page
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)", page)


def test_the_command_prints_a_histogram_and_refuses_what_the_run_has_not(tmp_path: Path) -> None:
    done = rookery("depth", "smoke", "--ranks", "2", "depth.scope=balanced", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lognormal_poisson, balanced" in done.stdout
    assert re.search(r"^r +1-2 +\d+\.\d+% #", done.stdout, re.MULTILINE)
    assert "slowest rank" in done.stdout
    refused = rookery("depth", "smoke", "--steps", "141", cwd=tmp_path)
    assert refused.returncode == 12
    assert "--steps 141: the run has train.steps = 140" in refused.stderr
