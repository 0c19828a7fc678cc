"""What all detectors share: the finding, the contract, and the few pieces of statistics that they are made of."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from monitoring.errors import MonitorConfigError

_FIRST_STEADY = 4  # iterations before this are still on their way from the noise
_DRIFT, _EVEN = 0.03, 0.25


@dataclass(frozen=True, kw_only=True)
class Finding:
    """That a detector's rule held, and what it saw.

    Attributes:
        detector: name of the detector.
        step: the step at which the rule held.
        since: the step of the first sign.
        value: what the rule compares with the threshold.
        threshold: the threshold.
        horizon: steps that the cause may lie before the first sign.
        rule: what `value` is, in words.
        evidence: further measurements, JSON.
        note: what goes on after value and threshold in a sentence, from its first blank or comma on.
    """

    detector: str
    step: int
    since: int
    value: float
    threshold: float
    horizon: int
    rule: str
    evidence: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def sentence(self) -> str:
        """The finding in words, for people."""
        if math.isnan(self.value):
            return f"{self.detector}: {self.rule}{self.note}"
        return f"{self.detector}: {self.rule} {self.value:.3g} (threshold {self.threshold:.3g}){self.note}"

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as a JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the finding that `to_dict` wrote; numbers that JSON lacks may come as texts (`"nan"`)."""
        numbers = {name: float(fields[name]) for name in ("value", "threshold")}
        return cls(**{**fields, **numbers, "evidence": dict(fields["evidence"])})


class Detector(Protocol):
    """A rule over the stream of step records, with what it remembers of them.

    Attributes:
        name: its key in `monitor.detectors` and `monitor.policy.actions`.
        suspect: whether its condition held when it last looked, even if it has not lasted long enough for a finding.
    """

    name: str

    @property
    def suspect(self) -> bool:
        """See above."""

    def observe(self, record: Mapping[str, Any]) -> Finding | None:
        """Take in the record of a completed step; one finding for each incident.

        A record with `skipped` is judged and not learnt from. Fields that are missing or not finite are passed over.
        """

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as finite JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state` as if there had been no break, but find what still holds once more.

        What was found before the break may not have been acted on; the policy knows what it has reported.
        """


def require(holds: bool, path: str, value: object, what: str) -> None:
    """Refuse a configured value.

    Raises:
        MonitorConfigError: `holds` is false; `monitor.PATH: VALUE is not WHAT`.
    """
    if not holds:
        raise MonitorConfigError(f"monitor.{path}: {value} is not {what}")


def number(record: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a record, None if it has none there."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(record: Mapping[str, Any], key: str) -> list[float]:
    """Return a list of a record; entries that are not finite numbers are nan, and what is no list is empty."""
    values = record.get(key)
    if not isinstance(values, list | tuple):
        return []
    return [float(v) if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values]


def by_name(record: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the finite numbers of a mapping in a record."""
    values = record.get(key)
    if not isinstance(values, Mapping):
        return {}
    found = {str(name): number(values, name) for name in values}
    return {name: value for name, value in found.items() if value is not None}


def depth_of(record: Mapping[str, Any]) -> float | None:
    """Return the iterations of a step: their mean over sequences where these have depths of their own."""
    counts = {int(depth): count for depth, count in by_name(record, "depths").items() if depth.isdecimal()}
    if (total := sum(counts.values())) > 0.0:
        return sum(depth * count for depth, count in counts.items()) / total
    steps = numbers(record, "num_steps")
    return sum(steps) if steps and math.isfinite(sum(steps)) else None


def drifts(residuals: Sequence[float], contraction: float | None) -> bool:
    """Return whether a loop only adds the same change again and again, so that it need not be iterated.

    Args:
        residuals: |s_i - s_(i-1)| / |s_i| of every iteration; an even drift makes it 1/i.
        contraction: ratio of successive changes; an even drift makes it 1.
    """
    tail = list(enumerate(residuals, start=1))[_FIRST_STEADY - 1 :]
    if contraction is None or abs(contraction - 1.0) > _DRIFT or not tail:
        return False
    return all(abs(i * residual - 1.0) < _EVEN for i, residual in tail)


class Lasting:
    """Whether a condition has held at enough looks in a row; says so once, then waits until it has gone.

    That it has said so does not outlast a break: see `Detector.restore`.

    Args:
        looks: looks in a row at which it must hold, and not hold to be over.
        steps: steps between the first of them and the last, at least.
    """

    def __init__(self, looks: int, steps: int = 0) -> None:
        self._looks, self._steps = looks, steps
        self.since: int | None = None  # the first look of the present run of holding
        self._held, self._clear, self._told = 0, 0, False

    def look(self, step: int, holds: bool) -> bool:
        """Return whether the condition has now lasted; true once for each incident."""
        if not holds:
            self._clear += 1
            self._held, self.since = 0, None
            self._told = self._told and self._clear < self._looks
            return False
        if self.since is None:
            self.since = step
        self._clear, self._held = 0, self._held + 1
        if self._told or self._held < self._looks or step - self.since < self._steps:
            return False
        self._told = True
        return True

    def state(self) -> list[int | None]:
        """Return what it remembers, as JSON."""
        return [self.since, self._held]

    def restore(self, state: list[Any]) -> None:
        """Go on from `state`."""
        (self.since, self._held), self._clear, self._told = state, 0, False


class Mostly:
    """Whether a condition holds at most of the last looks; says so once, then waits until it holds at none of them.

    That it has said so does not outlast a break: see `Detector.restore`.

    Args:
        looks: looks at which it must hold, out of the last 2 * looks - 1.
    """

    def __init__(self, looks: int) -> None:
        self._looks = looks
        self._recent: deque[tuple[int, bool]] = deque(maxlen=2 * looks - 1)
        self._told = False

    @property
    def since(self) -> int | None:
        """The first of the last looks at which it held."""
        return next((step for step, holds in self._recent if holds), None)

    def look(self, step: int, holds: bool) -> bool:
        """Return whether the condition now holds mostly; true once for each incident."""
        self._recent.append((step, holds))
        held = sum(holds for _, holds in self._recent)
        if self._told or held < self._looks:
            self._told = self._told and held > 0
            return False
        self._told = True
        return True

    def state(self) -> list[list[Any]]:
        """Return what it remembers, as JSON."""
        return [list(look) for look in self._recent]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on from `state`."""
        self._recent = deque(((step, holds) for step, holds in state), maxlen=2 * self._looks - 1)
        self._told = False
