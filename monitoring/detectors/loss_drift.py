"""A loss that rises slowly: no single step stands out, but the run gets worse and stays so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monitoring.detectors.base import Finding, Lasting, number, require


@dataclass(kw_only=True)
class LossDriftConfig:
    """A loss that rises slowly and stays there."""

    threshold: float = 0.2
    """Nats that the smoothed loss lies above the lowest that it has been."""
    lasting: int = 100
    """Steps for which it must."""
    warm_up: int = 50
    """Steps before the smoothed loss counts; until then it is the mean."""
    horizon: int = 50
    """Steps that the cause may lie before the first sign; the smoothing lags as much."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(self.threshold > 0.0, "detectors.loss_drift.threshold", self.threshold, "positive")
        require(self.lasting >= 1, "detectors.loss_drift.lasting", self.lasting, "positive")
        for name in ("warm_up", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.loss_drift.{name}", getattr(self, name), "0 or more")


class LossDrift:
    """The smoothed loss stays above the lowest that it has been."""

    name = "loss_drift"
    _RATE = 0.02  # of the smoothing: it lags 50 steps behind

    def __init__(self, config: LossDriftConfig) -> None:
        self._config = config
        self._seen = 0
        self._smooth = 0.0
        self._lowest: float | None = None
        self._lasting = Lasting(config.lasting)
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        loss = number(record, "loss")
        if loss is None or record.get("skipped"):
            return None
        step = int(record["step"])
        self._seen += 1
        self._smooth += max(self._RATE, 1.0 / self._seen) * (loss - self._smooth)
        if self._seen <= self._config.warm_up:
            return None
        self._lowest = self._smooth if self._lowest is None else min(self._lowest, self._smooth)
        self.suspect = self._smooth - self._lowest > self._config.threshold
        if not self._lasting.look(step, self.suspect):
            return None
        assert self._lasting.since is not None
        return Finding(
            detector=self.name,
            step=step,
            since=self._lasting.since,
            value=self._smooth - self._lowest,
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule="rise of the smoothed loss",
            evidence={"smoothed_loss": self._smooth, "lowest": self._lowest},
            note=f" nats above its lowest, {self._lowest:.3g}, for {self._config.lasting} steps",
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {
            "suspect": self.suspect,
            "seen": self._seen,
            "smooth": self._smooth,
            "lowest": self._lowest,
            "lasting": self._lasting.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect, self._seen = state["suspect"], state["seen"]
        self._smooth, self._lowest = state["smooth"], state["lowest"]
        self._lasting.restore(state["lasting"])
