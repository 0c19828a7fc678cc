"""Rules over single steps, asked before the update is made: numbers that are none, and spikes of loss and gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from monitoring.detectors.base import Finding, depth_of, number, require

# A median absolute deviation times this is the standard deviation of a normal distribution.
_TO_SIGMA = 1.4826


class StepDetector(ABC):
    """A detector that can also judge a step whose update has not been made; it learns nothing from that."""

    name: str

    def __init__(self) -> None:
        self.suspect = False

    @abstractmethod
    def check(self, facts: Mapping[str, Any]) -> Finding | None:
        """Judge `step`, `loss`, `grad_norm`, `num_steps` of a step; what is None, as without targets, is not judged."""

    @abstractmethod
    def learn(self, record: Mapping[str, Any]) -> None:
        """Take in a step whose update was made."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """See `Detector`."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`; here every step at which the rule holds is a finding, for each is to be skipped."""
        finding = self.check(record)
        self.suspect = finding is not None
        if not record.get("skipped"):
            self.learn(record)
        return finding


@dataclass(kw_only=True)
class NonFiniteConfig:
    """Loss, gradient norm or state that is not a finite number."""

    horizon: int = 0
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse a value without a meaning."""
        require(self.horizon >= 0, "detectors.non_finite.horizon", self.horizon, "0 or more")


class NonFinite(StepDetector):
    """Loss, gradient norm or a state that is nan or infinite."""

    name = "non_finite"

    def __init__(self, config: NonFiniteConfig) -> None:
        super().__init__()
        self._config = config

    def check(self, facts: Mapping[str, Any]) -> Finding | None:
        """See `StepDetector`."""
        bad = [name for name in ("loss", "grad_norm") if _not_finite(facts.get(name))]
        for name in ("state_rms", "relative_residual"):
            values = facts.get(name)
            if isinstance(values, list | tuple) and any(map(_not_finite, values)):
                bad.append(name)
        if not bad:
            return None
        step = int(facts["step"])
        return Finding(
            detector=self.name,
            step=step,
            since=step,
            value=math.nan,
            threshold=0.0,
            horizon=self._config.horizon,
            rule=f"{' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} not a finite number",
            evidence={"fields": bad},
        )

    def learn(self, record: Mapping[str, Any]) -> None:
        """It has no memory."""

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect = state["suspect"]


@dataclass(kw_only=True)
class _SpikeConfig:
    """A step that stands out of its like: those of similar depth, with the trend taken off."""

    _SECTION = ""  # not annotated: it is no key

    threshold: float = 6.0
    """Robust standard deviations above the median."""
    least: float = 0.1
    """Rise above the median that counts at least: nats of the loss, or the logarithm of the norm's factor."""
    warm_up: int = 64
    """Steps that are only learnt from."""
    window: int = 128
    """Steps of each class of depth that are remembered."""
    young: int = 32
    """A class with fewer steps is judged by all depths together: by their highest instead of their median."""
    horizon: int = 8
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        path = f"detectors.{self._SECTION}"
        require(self.threshold > 0.0, f"{path}.threshold", self.threshold, "positive")
        require(self.least >= 0.0, f"{path}.least", self.least, "0 or more")
        require(self.warm_up >= 16, f"{path}.warm_up", self.warm_up, "16 or more")
        require(self.window >= 32, f"{path}.window", self.window, "32 or more")
        require(1 <= self.young <= self.window, f"{path}.young", self.young, f"in [1, {self.window}]")
        require(self.horizon >= 0, f"{path}.horizon", self.horizon, "0 or more")


@dataclass(kw_only=True)
class LossSpikeConfig(_SpikeConfig):
    """A loss far above those of steps of similar depth."""

    _SECTION = "loss_spike"


@dataclass(kw_only=True)
class GradientSpikeConfig(_SpikeConfig):
    """A gradient norm far above those of steps of similar depth."""

    _SECTION = "gradient_spike"

    least: float = 1.4
    """Rise above the median that counts at least, as the logarithm of the norm's factor: 4 times."""


class DepthWindows:
    """How far a number of a step lies above what steps of its depth have been.

    The trend is an exponential mean over all depths, which outliers move little; what a step differs from it is
    remembered in a window for each power of two of the depth.
    """

    _RATE = 0.1  # of the trend: it lags 10 steps behind
    _FLOOR = 2e-3  # part of the level below which no scatter counts: a loss that does not move has none
    _FEW = 16

    def __init__(self, window: int, young: int) -> None:
        self._window, self._young = window, young
        self._level: float | None = None
        self._seen = 0
        self._all: deque[float] = deque(maxlen=window)
        self._classes: dict[int, deque[float]] = {}

    @property
    def seen(self) -> int:
        """Steps that it has learnt from."""
        return self._seen

    def rise(self, value: float, depth: float | None) -> tuple[float, float] | None:
        """Return how far a value lies above its like, and that in robust standard deviations; None if it has none."""
        if self._level is None or len(self._all) < self._FEW:
            return None
        window, residual = self._classes.get(_octave(depth)), value - self._level
        if not window:  # a depth like none before
            return None
        young = len(window) < self._young
        middle, scale = _spread(self._all if young else window)
        rise = residual - (max(*self._all, *window) if young else middle)
        return rise, rise / max(scale, self._FLOOR * max(abs(self._level), 1.0))

    def learn(self, value: float, depth: float | None) -> None:
        """Take in the number of a step."""
        self._seen += 1
        if self._level is None:
            self._level = value
            return
        residual = value - self._level
        self._classes.setdefault(_octave(depth), deque(maxlen=self._window)).append(residual)
        self._all.append(residual)
        if len(self._all) >= self._FEW:
            middle, scale = _spread(self._all)
            residual = min(max(residual, middle - 4.0 * scale), middle + 4.0 * scale)
        self._level += self._RATE * residual

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as JSON."""
        classes = {str(octave): list(window) for octave, window in self._classes.items()}
        return {"level": self._level, "seen": self._seen, "all": list(self._all), "classes": classes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._level, self._seen = state["level"], state["seen"]
        self._all = deque(state["all"], maxlen=self._window)
        self._classes = {int(octave): deque(window, maxlen=self._window) for octave, window in state["classes"].items()}


class _Spike(StepDetector):
    _KEY, _MEASURE = "", ""

    def __init__(self, config: _SpikeConfig) -> None:
        super().__init__()
        self._config = config
        self._windows = DepthWindows(config.window, config.young)

    def measure(self, record: Mapping[str, Any]) -> float | None:
        raise NotImplementedError

    def check(self, facts: Mapping[str, Any]) -> Finding | None:
        """See `StepDetector`."""
        value, depth = self.measure(facts), depth_of(facts)
        if value is None or self._windows.seen < self._config.warm_up:
            return None
        found = self._windows.rise(value, depth)
        if found is None:
            return None
        (rise, score), step = found, int(facts["step"])
        if score <= self._config.threshold or rise < self._config.least:
            return None
        return Finding(
            detector=self.name,
            step=step,
            since=step,
            value=score,
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule=f"{self._MEASURE} above its trend by",
            evidence={
                "loss": number(facts, "loss"),
                "grad_norm": number(facts, "grad_norm"),
                "depth": depth,
                "rise": rise,
            },
            note=f" robust deviations of steps of similar depth: {facts[self._KEY]:.3g}",
        )

    def learn(self, record: Mapping[str, Any]) -> None:
        """See `StepDetector`."""
        value = self.measure(record)
        if value is not None:
            self._windows.learn(value, depth_of(record))

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect, "windows": self._windows.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect = state["suspect"]
        self._windows.restore(state["windows"])


class LossSpike(_Spike):
    """A loss far above those of steps of similar depth."""

    name = "loss_spike"
    _KEY, _MEASURE = "loss", "loss"

    def measure(self, record: Mapping[str, Any]) -> float | None:
        """Return the loss."""
        return number(record, self._KEY)


class GradientSpike(_Spike):
    """A gradient norm far above those of steps of similar depth, on a logarithmic scale."""

    name = "gradient_spike"
    _KEY, _MEASURE = "grad_norm", "gradient norm"

    def measure(self, record: Mapping[str, Any]) -> float | None:
        """Return the logarithm of the gradient norm."""
        norm = number(record, self._KEY)
        return math.log(norm) if norm is not None and norm > 0.0 else None


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _octave(depth: float | None) -> int:
    """Return the class of a depth: the whole part of its logarithm to base 2, -1 for an unknown one."""
    return -1 if depth is None or depth < 1.0 else int(math.log2(depth))


def _spread(values: Any) -> tuple[float, float]:
    """Return median and robust standard deviation."""
    array = np.fromiter(values, dtype=np.float64)
    middle = float(np.median(array))
    return middle, _TO_SIGMA * float(np.median(np.abs(array - middle)))
