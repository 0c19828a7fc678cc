"""What changes in the course of a run: learning rate, batch size and the ramps of depth, pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError

RATE_KINDS = ("trapezoid", "cosine", "linear", "sqrt")
RAMP_KINDS = ("constant", "linear", "sqrt", "piecewise")


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate's shape over the run, and a ramp of the batch size."""

    kind: str = "trapezoid"
    """Fall of the learning rate after the warm-up: trapezoid (constant, then linear), cosine, linear, or sqrt, which is
    1 - sqrt(x) (arXiv 2405.18392)."""
    warmup_steps: int = 0
    """Steps of linear rise."""
    cooldown_steps: int = 0
    """Steps at the end over which the rate falls; for all kinds but trapezoid 0 stands for all after the warm-up."""
    min_ratio: float = 0.0
    """Part of the peak that the fall ends at."""
    batch_start: int | None = None
    """Sequences of the first step; null for `train.global_batch_size` from the beginning."""
    batch_increment: int = 0
    """Sequences by which the batch grows at a time, up to `train.global_batch_size`."""
    batch_ramp_steps: int = 0
    """Steps after which the batch has its final size."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.kind not in RATE_KINDS:
            raise ConfigError(f"schedule.kind: {self.kind!r} is not one of {', '.join(RATE_KINDS)}")
        for name in ("warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name}: {getattr(self, name)} is negative")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise ConfigError(f"schedule.min_ratio: {self.min_ratio} is not in [0, 1]")
        for name in ("batch_increment", "batch_ramp_steps"):
            value = getattr(self, name)
            if self.batch_start is None and value != 0:
                raise ConfigError(f"schedule.{name}: {value} without a schedule.batch_start; set it, or leave both out")
            if self.batch_start is not None and value < 1:
                raise ConfigError(f"schedule.{name}: {value} is not positive, and schedule.batch_start asks for a ramp")
        if self.batch_start is not None and self.batch_start < 1:
            raise ConfigError(f"schedule.batch_start: {self.batch_start} is not positive")

    def check_batch(self, global_batch_size: int) -> None:
        """Refuse a ramp that does not end at `global_batch_size`.

        Raises:
            ConfigError: it does not.
        """
        start, increment = self.batch_start, self.batch_increment
        if start is not None and (start > global_batch_size or (global_batch_size - start) % increment):
            raise ConfigError(
                f"schedule.batch_increment: from schedule.batch_start = {start} steps of {increment} do not lead to"
                f" train.global_batch_size = {global_batch_size}; the difference must be a multiple of it"
            )


def learning_rate_ratio(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the part of the peak learning rate, in (0, 1], that `step` (from 0) of `total_steps` has."""
    length = config.cooldown_steps
    if config.kind != "trapezoid" and length == 0:
        length = max(total_steps - config.warmup_steps - 1, 0)
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    x = max(0.0, 1.0 - (total_steps - step) / (length + 1))
    if config.kind == "cosine":
        fall = (1.0 + math.cos(math.pi * x)) / 2
    elif config.kind == "sqrt":
        fall = 1.0 - math.sqrt(x)
    else:
        fall = 1.0 - x
    return min(warmup, config.min_ratio + (1.0 - config.min_ratio) * fall)


def batch_size(config: ScheduleConfig, final: int, step: int) -> int:
    """Return the sequences of `step`: `final`, or less while the batch grows by equal increments at equal intervals."""
    if config.batch_start is None or step >= config.batch_ramp_steps:
        return final
    increments = (final - config.batch_start) // config.batch_increment
    return config.batch_start + config.batch_increment * (step * increments // config.batch_ramp_steps)


def samples_before(config: ScheduleConfig, final: int, step: int) -> int:
    """Return the sequences of all steps before `step`, in closed form: the loader's state at the start of a step."""
    if config.batch_start is None:
        return step * final
    increments = (final - config.batch_start) // config.batch_increment
    # The j-th increment is missing in every step before ceil(j * ramp / increments).
    starts = (-(-j * config.batch_ramp_steps // increments) for j in range(1, increments + 1))
    return step * final - config.batch_increment * sum(min(step, start) for start in starts)


@dataclass(kw_only=True)
class RampPoint:
    """A value that holds from a step on."""

    step: int
    """First step with the value."""
    value: float
    """The value."""


@dataclass(kw_only=True)
class RampConfig:
    """The way of a quantity to its final value (curricula of depth: arXiv 2511.07384)."""

    kind: str = "constant"
    """constant, linear, sqrt (1 - sqrt(1 - x): slow at first, fast at the end), or piecewise constant."""
    start: float | None = None
    """Value of the first step; none for constant."""
    steps: int = 0
    """Steps after which a linear or sqrt ramp has reached the final value."""
    points: list[RampPoint] = field(default_factory=list)
    """Changes of a piecewise ramp, ascending; the last one is to the final value."""

    def problem(self, end: float, total_steps: int) -> tuple[str, str] | None:
        """Return (field, what is wrong with it) for a ramp to `end` in a run of `total_steps`, None if all is well."""
        ramps, pieces = self.kind in ("linear", "sqrt"), self.kind == "piecewise"
        steps = [point.step for point in self.points]
        values = [point.value for point in self.points]
        rules = (
            ("kind", self.kind in RAMP_KINDS, f"{self.kind!r} is not one of {', '.join(RAMP_KINDS)}"),
            ("start", (self.start is None) == (self.kind == "constant"), f"{self.start} with kind {self.kind}"),
            ("start", self.start is None or self.start >= 1.0, f"{self.start} is below 1"),
            ("steps", (self.steps > 0) == ramps, f"{self.steps} with kind {self.kind}"),
            ("steps", self.steps <= total_steps, f"{self.steps} exceed train.steps = {total_steps}"),
            ("points", bool(self.points) == pieces, f"{len(self.points)} of them with kind {self.kind}"),
            (
                "points",
                steps == sorted(set(steps)) and min(steps, default=1) > 0,
                f"steps {steps} do not ascend from 1",
            ),
            ("points", max(steps, default=0) <= total_steps, f"step {steps[-1:]} exceeds train.steps = {total_steps}"),
            ("points", not pieces or values[-1:] == [end], f"they end at {values[-1:]} and not at the final {end:g}"),
            ("points", min(values, default=1.0) >= 1.0, f"{min(values, default=1.0)} is below 1"),
        )
        return next(((name, text) for name, holds, text in rules if not holds), None)

    def values(self, steps: npt.ArrayLike, end: float) -> npt.NDArray[np.float64]:
        """Return the value at each of `steps` on the way to `end`."""
        at = np.asarray(steps, dtype=np.float64)
        if self.start is None:
            return np.full(at.shape, float(end))
        if self.kind == "piecewise":
            levels = np.array([self.start, *(point.value for point in self.points)])
            return levels[np.searchsorted([point.step for point in self.points], at, side="right")]
        x = np.minimum(at / self.steps, 1.0)
        rise = x if self.kind == "linear" else 1.0 - np.sqrt(1.0 - x)
        return self.start + (end - self.start) * rise
