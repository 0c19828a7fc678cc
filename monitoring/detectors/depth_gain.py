"""Rules over what depth is worth: a loop that is ignored, and one that does harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monitoring.detectors.base import Finding, Lasting, by_name, drifts, number, numbers, require


@dataclass(kw_only=True)
class IgnoredConfig:
    """The model has learnt to do without its recurrence; no loss shows it."""

    threshold: float = 0.005
    """Part of the loss at one iteration that the mean depth gains, below which depth is worth nothing."""
    looks: int = 2
    """Measurements of the gain in a row that must say so."""
    drift_looks: int = 5
    """Probes in a row that must show a drifting state: contraction 1 and a residual of 1/i at iteration i."""
    warm_up: int = 150
    """Steps in which a healthy model has not found the use of depth yet."""
    horizon: int = 0
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(0.0 < self.threshold < 1.0, "detectors.ignored.threshold", self.threshold, "between 0 and 1")
        for name in ("looks", "drift_looks"):
            require(getattr(self, name) >= 1, f"detectors.ignored.{name}", getattr(self, name), "positive")
        for name in ("warm_up", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.ignored.{name}", getattr(self, name), "0 or more")


class Ignored:
    """Depth gains nothing at several measurements, or the state drifts evenly along the loop at several probes."""

    name = "ignored"

    def __init__(self, config: IgnoredConfig) -> None:
        self._config = config
        self._gain, self._drift = Lasting(config.looks), Lasting(config.drift_looks)
        self.suspect = False  # a model that ignores its depth is whole; to go behind it heals nothing

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        if int(record["step"]) <= self._config.warm_up:
            return None
        return self._by_gain(record) or self._by_drift(record)

    def _by_gain(self, record: Mapping[str, Any]) -> Finding | None:
        gain = by_name(record, "depth_gain")
        shallow, deep = gain.get("shallow"), gain.get("deep")
        if shallow is None or deep is None or shallow <= 0.0:
            return None
        part, step = (shallow - deep) / shallow, int(record["step"])
        if not self._gain.look(step, abs(part) < self._config.threshold):
            return None
        words = "gain of depth", f" of the loss, {gain.get('depth', math.nan):g} iterations against one: it is not used"
        return self._finding(step, self._gain.since, part, self._config.threshold, words, gain)

    def _by_drift(self, record: Mapping[str, Any]) -> Finding | None:
        residuals, ratio = numbers(record, "relative_residual"), number(record, "contraction")
        if ratio is None or not residuals:
            return None
        step = int(record["step"])
        if not self._drift.look(step, drifts(residuals, ratio)):
            return None
        evidence = {"relative_residual": residuals[-1], "iterations": len(residuals)}
        words = "contraction", " while the residual falls as 1/i: the state only drifts, depth is not used"
        return self._finding(step, self._drift.since, ratio, 1.0, words, evidence)

    def _finding(
        self, step: int, since: int | None, value: float, threshold: float, words: tuple[str, str], evidence: Any
    ) -> Finding:
        assert since is not None
        return Finding(
            detector=self.name,
            step=step,
            since=since,
            value=value,
            threshold=threshold,
            horizon=self._config.horizon,
            rule=words[0],
            evidence=evidence,
            note=words[1],
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"gain": self._gain.state(), "drift": self._drift.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self._gain.restore(state["gain"])
        self._drift.restore(state["drift"])


@dataclass(kw_only=True)
class DepthInversionConfig:
    """The loss is higher at the mean depth than at one iteration."""

    threshold: float = 0.05
    """Nats by which it is."""
    looks: int = 1
    """Measurements in a row that must say so."""
    warm_up: int = 50
    """Steps in which depth may do harm to a fresh model."""
    horizon: int = 20
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(self.threshold > 0.0, "detectors.depth_inversion.threshold", self.threshold, "positive")
        require(self.looks >= 1, "detectors.depth_inversion.looks", self.looks, "positive")
        for name in ("warm_up", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.depth_inversion.{name}", getattr(self, name), "0 or more")


class DepthInversion:
    """More iterations make the prediction worse: they leave the path that the last ones were trained on."""

    name = "depth_inversion"

    def __init__(self, config: DepthInversionConfig) -> None:
        self._config = config
        self._lasting = Lasting(config.looks)
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        gain = by_name(record, "depth_gain")
        shallow, deep = gain.get("shallow"), gain.get("deep")
        step = int(record["step"])
        if shallow is None or deep is None or step <= self._config.warm_up:
            return None
        self.suspect = deep - shallow > self._config.threshold
        if not self._lasting.look(step, self.suspect):
            return None
        assert self._lasting.since is not None
        return Finding(
            detector=self.name,
            step=step,
            since=self._lasting.since,
            value=deep - shallow,
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule="harm of depth",
            evidence=gain,
            note=f" nats: loss after {gain.get('depth', math.nan):g} iterations over that after one",
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect, "lasting": self._lasting.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect = state["suspect"]
        self._lasting.restore(state["lasting"])
