"""Rules over the probes of the loop: does it contract, has it collapsed, is it used, does it learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monitoring.detectors.base import Finding, Lasting, Mostly, by_name, drifts, number, numbers, require

# Of the degenerate state: the part of the probes at which it must show, and their least number.
_MOST, _LOOKS = 0.75, 4


@dataclass(kw_only=True)
class NotContractingConfig:
    """Successive states of the loop do not come closer: the precursor of most collapses."""

    threshold: float = 0.95
    """Contraction above which the changes of the state hardly shrink along the loop; healthy loops have 0.3 to 0.8."""
    residual: float = 0.1
    """Relative residual above which a loop of at least the mean depth has not converged."""
    looks: int = 3
    """Probes that must say so, of the last 2 * looks - 1; those of loops too shallow to tell do not count."""
    horizon: int = 20
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(self.threshold > 0.0, "detectors.not_contracting.threshold", self.threshold, "positive")
        require(self.residual > 0.0, "detectors.not_contracting.residual", self.residual, "positive")
        require(self.looks >= 1, "detectors.not_contracting.looks", self.looks, "positive")
        require(self.horizon >= 0, "detectors.not_contracting.horizon", self.horizon, "0 or more")


class NotContracting:
    """The contraction is next to 1, or the residual at the end of a deep enough loop too large, at most of some probes.

    A state that drifts evenly does not count: it belongs to `ignored`, which no rollback heals.
    """

    name = "not_contracting"
    # Below this the changes of the state are its rounding (2^-9 in bf16), whose ratio is 1 and means nothing.
    _ROUNDING = 0.01
    _SHALLOWEST = 8

    def __init__(self, config: NotContractingConfig, mean_recurrence: float) -> None:
        self._config = config
        self._deep = max(self._SHALLOWEST, round(mean_recurrence))
        self._lasting = Mostly(config.looks)
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        residuals = numbers(record, "relative_residual")
        if not residuals or math.isnan(residuals[-1]):
            return None
        last, ratio = residuals[-1], number(record, "contraction")
        grows = ratio is not None and ratio > self._config.threshold and last > self._ROUNDING
        far = len(residuals) >= self._deep and last > self._config.residual
        if ratio is None and len(residuals) < self._deep:
            return None
        step = int(record["step"])
        self.suspect = (grows or far) and not drifts(residuals, ratio)
        if not self._lasting.look(step, self.suspect):
            return None
        assert self._lasting.since is not None
        value, threshold = (ratio, self._config.threshold) if grows else (last, self._config.residual)
        assert value is not None
        shrinks = f" after {len(residuals)} iterations: the loop does not converge"
        return Finding(
            detector=self.name,
            step=step,
            since=self._lasting.since,
            value=value,
            threshold=threshold,
            horizon=self._config.horizon,
            rule="contraction" if grows else "relative residual",
            evidence={"contraction": ratio, "relative_residual": last, "iterations": len(residuals)},
            note=": the changes of the state hardly shrink along the loop" if grows else shrinks,
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect, "lasting": self._lasting.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect = state["suspect"]
        self._lasting.restore(state["lasting"])


@dataclass(kw_only=True)
class CollapseConfig:
    """All tokens have become one vector, which nothing gets out of."""

    threshold: float = 0.95
    """Token correlation above which, with few dimensions left, the state has collapsed."""
    rank: float = 2.0
    """Effective rank of the state below which few dimensions are left."""
    rising: float = 0.5
    """Token correlation from which on the state counts as on its way: the first sign."""
    warm_up: int = 150
    """Steps in which a healthy run may pass through such a state."""
    absorbed: float = 5e-4
    """The core's share of the gradient below which there is no way out of it, so that the warm-up does not matter."""
    looks: int = 2
    """Probes in a row that must say so."""
    horizon: int = 20
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("threshold", "rising", "absorbed"):
            value = getattr(self, name)
            require(0.0 < value < 1.0, f"detectors.collapse.{name}", value, "between 0 and 1")
        require(self.rank >= 1.0, "detectors.collapse.rank", self.rank, "1 or more")
        require(self.looks >= 1, "detectors.collapse.looks", self.looks, "positive")
        for name in ("warm_up", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.collapse.{name}", getattr(self, name), "0 or more")


class Collapse:
    """Token correlation near 1 and an effective rank near 1 at several probes, after the warm-up or without way out."""

    name = "collapse"

    def __init__(self, config: CollapseConfig) -> None:
        self._config = config
        self._lasting = Lasting(config.looks)
        self._risen: int | None = None  # since when the correlation has been above `rising`
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        correlation, rank = number(record, "token_correlation"), number(record, "effective_rank")
        if correlation is None:
            return None
        step = int(record["step"])
        if correlation <= self._config.rising:
            self._risen = None
        elif self._risen is None:
            self._risen = step
        few = rank is None or rank < self._config.rank
        self.suspect = correlation > self._config.threshold and few
        share = by_name(record, "gradient_share").get("core")
        final = step > self._config.warm_up or (share is not None and share < self._config.absorbed)
        if not self._lasting.look(step, self.suspect and final):
            return None
        assert self._risen is not None
        return Finding(
            detector=self.name,
            step=step,
            since=self._risen,
            value=correlation,
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule="token correlation",
            evidence={"effective_rank": rank, "core_gradient_share": share},
            note="" if rank is None else f" with an effective rank of {rank:.2g}",
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect, "lasting": self._lasting.state(), "risen": self._risen}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect, self._risen = state["suspect"], state["risen"]
        self._lasting.restore(state["lasting"])


@dataclass(kw_only=True)
class DegenerateConfig:
    """The state has long been that of a collapse, though the core still learns and may come out of it."""

    threshold: float = 0.95
    """Token correlation above which, with few dimensions left, the state is degenerate."""
    rank: float = 2.0
    """Effective rank of the state below which few dimensions are left."""
    lasting: int = 20
    """Steps at three of four of whose probes, four at least, it must be."""
    horizon: int = 0
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(0.0 < self.threshold < 1.0, "detectors.degenerate.threshold", self.threshold, "between 0 and 1")
        require(self.rank >= 1.0, "detectors.degenerate.rank", self.rank, "1 or more")
        for name in ("lasting", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.degenerate.{name}", getattr(self, name), "0 or more")


class Degenerate:
    """The tokens' states stay next to equal. A fresh model may pass through this; one that stays is soon lost."""

    name = "degenerate"

    def __init__(self, config: DegenerateConfig) -> None:
        self._config = config
        self._looks: list[tuple[int, bool]] = []
        self._told = False
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        correlation, rank = number(record, "token_correlation"), number(record, "effective_rank")
        if correlation is None or rank is None:
            return None
        step, config = int(record["step"]), self._config
        self.suspect = correlation > config.threshold and rank < config.rank
        self._looks = [look for look in self._looks if look[0] >= step - config.lasting] + [(step, self.suspect)]
        held, first = sum(holds for _, holds in self._looks), self._looks[0][0]
        if held < _MOST * len(self._looks):
            self._told = self._told and held > 0
            return None
        if self._told or len(self._looks) < _LOOKS or step - first < config.lasting:
            return None
        self._told = True
        return Finding(
            detector=self.name,
            step=step,
            since=first,
            value=correlation,
            threshold=config.threshold,
            horizon=config.horizon,
            rule="token correlation",
            evidence={"effective_rank": rank, "looks": len(self._looks), "held": held},
            note=f" at {held} of {len(self._looks)} probes, with an effective rank of {rank:.2g}",
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect, "looks": [[step, holds] for step, holds in self._looks]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect, self._told = state["suspect"], False
        self._looks = [(step, holds) for step, holds in state["looks"]]


@dataclass(kw_only=True)
class DeadCoreConfig:
    """The core no longer gets a share of the gradient; the global norm does not show it."""

    threshold: float = 0.02
    """Share of the squared gradient norm below which the core does not learn."""
    lasting: int = 10
    """Steps for which it must."""
    warm_up: int = 50
    """Steps of a fresh model, which are not judged."""
    horizon: int = 20
    """Steps that the cause may lie before the first sign."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(0.0 < self.threshold < 1.0, "detectors.dead_core.threshold", self.threshold, "between 0 and 1")
        for name in ("lasting", "warm_up", "horizon"):
            require(getattr(self, name) >= 0, f"detectors.dead_core.{name}", getattr(self, name), "0 or more")


class DeadCore:
    """The core's share of the gradient stays next to nothing."""

    name = "dead_core"

    def __init__(self, config: DeadCoreConfig) -> None:
        self._config = config
        self._lasting = Lasting(2, config.lasting)
        self.suspect = False

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """See `Detector`."""
        share, step = by_name(record, "gradient_share").get("core"), int(record["step"])
        if share is None or step <= self._config.warm_up:
            return None
        self.suspect = share < self._config.threshold
        if not self._lasting.look(step, self.suspect):
            return None
        assert self._lasting.since is not None
        return Finding(
            detector=self.name,
            step=step,
            since=self._lasting.since,
            value=share,
            threshold=self._config.threshold,
            horizon=self._config.horizon,
            rule="the core's share of the squared gradient norm",
            evidence={"gradient_share": by_name(record, "gradient_share")},
            note=f" for {step - self._lasting.since} steps: it hardly learns",
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        return {"suspect": self.suspect, "lasting": self._lasting.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Detector`."""
        self.suspect = state["suspect"]
        self._lasting.restore(state["lasting"])
