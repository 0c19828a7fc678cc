"""Rules over sizes that run away: of the state, of what is injected into it, and of the optimizer's steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from monitoring.detectors.base import Finding, Lasting, Mostly, by_name, number, numbers, require


@dataclass(kw_only=True)
class BlowUpConfig:
    """The state grows without bound, over steps or along the loop."""

    threshold: float = 10.0
    """Multiple of its median over `window` that the size of the state, of its first jump or of what is injected has."""
    window: int = 1000
    """Steps of that median."""
    growth: float = 1.1
    """Factor from iteration to iteration, beyond that of an even drift, at which the state grows geometrically."""
    warm_up: int = 5
    """Probes that are only learnt from."""
    looks: int = 2
    """Probes that must say so, of the last 2 * looks - 1."""
    horizon: int = 20
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("threshold", "growth"):
            require(getattr(self, name) > 1.0, f"detectors.blow_up.{name}", getattr(self, name), "above 1")
        for name in ("window", "warm_up", "looks"):
            require(getattr(self, name) >= 1, f"detectors.blow_up.{name}", getattr(self, name), "positive")
        require(self.horizon >= 0, "detectors.blow_up.horizon", self.horizon, "0 or more")


class BlowUp:
    """A size far above its own median, or a state that grows geometrically along the loop."""

    name = "blow_up"
    _MOST = 128  # probes that the median is taken of
    _TAIL = 4  # ratios of successive iterations that must all grow

    def __init__(self, config: BlowUpConfig, mean_recurrence: float) -> None:
        self._config = config
        self._depth = max(1, round(mean_recurrence))
        self._history: dict[str, deque[tuple[int, float]]] = {}
        self._lasting = Mostly(config.looks)
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        step, sizes = int(record["step"]), self._sizes(record)
        if not sizes:
            return None
        ratios = {name: size / before for name, size in sizes.items() if (before := self._median(name, step, size))}
        worst = max(ratios, key=lambda name: ratios[name], default=None)
        slowest = self._slowest_growth(numbers(record, "state_rms"))
        far = worst is not None and ratios[worst] > self._config.threshold
        grows = slowest is not None and slowest > self._config.growth
        self.suspect = far or grows
        if not self._lasting.look(step, self.suspect):
            return None
        assert self._lasting.since is not None
        value = ratios[worst] if far and worst is not None else slowest
        assert value is not None
        return Finding(
            detector=self.name,
            step=step,
            since=self._lasting.since,
            value=value,
            threshold=self._config.threshold if far else self._config.growth,
            horizon=self._config.horizon,
            rule=f"size of {worst}" if far else "growth of the state",
            evidence={**sizes, "multiples": ratios, "growth": slowest},
            note=" times its median" if far else " from iteration to iteration",
        )

    def _sizes(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return the sizes that are watched; the state's at the mean depth, so that the drawn one does not matter."""
        rms = numbers(record, "state_rms")[: self._depth]
        sizes = {"state_rms": rms[-1]} if len(rms) == self._depth and math.isfinite(rms[-1]) else {}
        for name in ("injected_rms", "first_jump"):
            size = number(record, name)
            if size is not None:
                sizes[name] = size
        return sizes

    def _median(self, name: str, step: int, size: float) -> float | None:
        """Return the median of a size before this step, None while it is not known; remember this one."""
        history = self._history.setdefault(name, deque(maxlen=self._MOST))
        while history and history[0][0] <= step - self._config.window:
            history.popleft()
        before = median(value for _, value in history) if len(history) >= self._config.warm_up else None
        history.append((step, size))
        return before

    def _slowest_growth(self, rms: list[float]) -> float | None:
        """Return the smallest ratio of the last iterations over that of an even drift, whose state is as i."""
        tail, first = rms[-self._TAIL - 1 :], len(rms) - self._TAIL
        if len(rms) < 2 * self._TAIL or not all(math.isfinite(size) and size > 0.0 for size in tail):
            return None
        ratios = [after / before for before, after in pairwise(tail)]
        return min(ratio * i / (i + 1) for i, ratio in enumerate(ratios, start=first))

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        history = {name: [list(entry) for entry in entries] for name, entries in self._history.items()}
        return {"suspect": self.suspect, "lasting": self._lasting.state(), "history": history}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect = state["suspect"]
        self._lasting.restore(state["lasting"])
        self._history = {
            name: deque(((step, size) for step, size in entries), maxlen=self._MOST)
            for name, entries in state["history"].items()
        }


@dataclass(kw_only=True)
class OptimizerRmsConfig:
    """Gradients that their second moments have not seen the like of; precedes a spike by some steps."""

    threshold: float = 3.0
    """Root mean square of g / sqrt(v) of a tensor; arXiv 2304.13013 saw 2.3 before spikes, we 2.25 in good runs."""
    multiple: float = 2.0
    """Multiple of its own mean so far that it must be too."""
    warm_up: int = 50
    """Steps in which second moments are young."""
    horizon: int = 8
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("threshold", "multiple"):
            require(getattr(self, name) > 0.0, f"detectors.optimizer_rms.{name}", getattr(self, name), "positive")
        for name in ("warm_up", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.optimizer_rms.{name}", getattr(self, name), "0 or more")


class OptimizerRms:
    """A tensor whose gradient is far larger than its second moment expects, and than it has been in this tensor."""

    name = "optimizer_rms"
    _RATE = 0.1  # of the mean of the logarithm

    def __init__(self, config: OptimizerRmsConfig) -> None:
        self._config = config
        self._means: dict[str, float] = {}
        self._lasting = Lasting(1)
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        sizes = {name: size for name, size in by_name(record, "optimizer_rms").items() if size > 0.0}
        step = int(record["step"])
        if not sizes:
            return None
        over = {
            name: size
            for name, size in sizes.items()
            if size > self._config.threshold
            and name in self._means
            and size > self._config.multiple * math.exp(self._means[name])
        }
        if not record.get("skipped"):
            for name, size in sizes.items():
                mean = self._means.setdefault(name, math.log(size))
                self._means[name] = mean + self._RATE * (math.log(size) - mean)
        self.suspect = bool(over) and step > self._config.warm_up
        if not self._lasting.look(step, self.suspect):
            return None
        worst = max(over, key=lambda name: over[name])
        return Finding(
            detector=self.name,
            step=step,
            since=step,
            value=over[worst],
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule="root mean square of g / sqrt(v)",
            evidence={"tensors": dict(sorted(over.items(), key=lambda entry: -entry[1])[:8])},
            note=f" in {worst}: gradients that its second moment does not expect",
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect, "lasting": self._lasting.state(), "means": dict(self._means)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect, self._means = state["suspect"], dict(state["means"])
        self._lasting.restore(state["lasting"])
