"""Rules over time: a run that has become slower, and a rank that is slower than the others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from monitoring.detectors.base import Finding, Lasting, by_name, depth_of, number, require


@dataclass(kw_only=True)
class ThroughputConfig:
    """Steps take longer than such steps used to."""

    threshold: float = 1.5
    """Median of the steps' seconds over what they should take, above which the run is slow."""
    short: int = 20
    """Steps of that median; it must stay there for twice as many."""
    long: int = 512
    """Steps that say what such steps take."""
    warm_up: int = 50
    """Steps that are only learnt from."""
    horizon: int = 0
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(self.threshold > 1.0, "detectors.throughput.threshold", self.threshold, "above 1")
        require(self.short >= 1, "detectors.throughput.short", self.short, "positive")
        require(self.long > self.short, "detectors.throughput.long", self.long, f"above {self.short}, the short one")
        for name in ("warm_up", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.throughput.{name}", getattr(self, name), "0 or more")


class Throughput:
    """The last steps took longer than what steps of their depth took before.

    What a step should take is the run's own fit (`expected_seconds`); a step without it is compared by depth and tokens
    with the earlier ones like it.
    """

    name = "throughput"

    def __init__(self, config: ThroughputConfig) -> None:
        self._config = config
        self._long: dict[str, deque[float]] = {}
        self._short: deque[float] = deque(maxlen=config.short)
        self._seen = 0
        self._lasting = Lasting(2 * config.short)
        self.suspect = False  # a slow run is as healthy as a fast one

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        key, pace = self._pace(record)
        if key is None:
            return None
        history = self._long.setdefault(key, deque(maxlen=self._config.long))
        usual = median(history) if history else pace
        history.append(pace)
        self._short.append(pace - usual)
        self._seen += 1
        if self._seen <= self._config.warm_up or len(self._short) < self._config.short:
            return None
        step, slower = int(record["step"]), math.exp(min(median(self._short), 50.0))
        if not self._lasting.look(step, slower > self._config.threshold):
            return None
        assert self._lasting.since is not None
        return Finding(
            detector=self.name,
            step=step,
            since=self._lasting.since - self._config.short // 2,
            value=slower,
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule="time of a step",
            evidence={"seconds": number(record, "seconds"), "expected_seconds": number(record, "expected_seconds")},
            note=f" times what such steps took before, for {2 * self._config.short} steps",
        )

    @staticmethod
    def _pace(record: Mapping[str, Any]) -> tuple[str | None, float]:
        """Return the class of a step and the logarithm of its seconds over what is expected there."""
        seconds, expected = number(record, "seconds"), number(record, "expected_seconds")
        if seconds is None or seconds <= 0.0:
            return None, 0.0
        if expected is not None and expected > 0.0:
            return "expected", math.log(seconds / expected)
        depth, speed = depth_of(record), number(record, "tokens_per_second")
        if depth is None or speed is None or speed <= 0.0:
            return None, 0.0
        return f"{int(math.log2(max(depth, 1.0)))}", -math.log(speed * max(depth, 1.0))

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        long = {key: list(history) for key, history in self._long.items()}
        return {"long": long, "short": list(self._short), "seen": self._seen, "lasting": self._lasting.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self._long = {key: deque(history, maxlen=self._config.long) for key, history in state["long"].items()}
        self._short = deque(state["short"], maxlen=self._config.short)
        self._seen = state["seen"]
        self._lasting.restore(state["lasting"])


@dataclass(kw_only=True)
class StragglerConfig:
    """A rank that computes more slowly than the others, for whom all wait."""

    threshold: float = 1.2
    """Its seconds of computation over what the others take for the same work."""
    looks: int = 2
    """Measurements in a row that must say so of the same host."""
    horizon: int = 0
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(self.threshold > 1.0, "detectors.straggler.threshold", self.threshold, "above 1")
        require(self.looks >= 1, "detectors.straggler.looks", self.looks, "positive")
        require(self.horizon >= 0, "detectors.straggler.horizon", self.horizon, "0 or more")


class Straggler:
    """One host's slowest rank needs longer than the median rank for the same work, measurement after measurement."""

    _MOST = 8  # of the slowest nodes that are evidence

    name = "straggler"

    def __init__(self, config: StragglerConfig) -> None:
        self._config = config
        self._host: str | None = None
        self._lasting = Lasting(config.looks)
        self.suspect = False  # a slow node computes right

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        slowest = record.get("slowest")
        if not isinstance(slowest, Mapping) or (ratio := number(slowest, "ratio")) is None:
            return None
        step, host = int(record["step"]), str(slowest.get("host"))
        slow = ratio > self._config.threshold
        if slow and host != self._host:
            self._host, self._lasting = host, Lasting(self._config.looks)
        if not self._lasting.look(step, slow):
            return None
        assert self._lasting.since is not None
        worst = sorted(by_name(record, "nodes").items(), key=lambda node: -node[1])
        return Finding(
            detector=self.name,
            step=step,
            since=self._lasting.since,
            value=ratio,
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule="computing time",
            evidence={"host": host, "rank": slowest.get("rank"), "nodes": dict(worst[: self._MOST])},
            note=f" times that of the other ranks: rank {slowest.get('rank')} on {host}",
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"host": self._host, "lasting": self._lasting.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self._host = state["host"]
        self._lasting.restore(state["lasting"])
