"""Which dataset a sample of the run comes from, and which of its rows: pure functions of the sample's index.

A run's samples are cut into stages in which the weights are constant. In a stage the sources follow a pattern that
repeats, so that any sample is found without the ones before it: no index and no counters are kept.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.order import sample_rows
from pipeline.errors import ConfigError

LONGEST_PATTERN = 2**16
"""Samples after which a pattern repeats at the latest; weights that need more are rounded to this denominator."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    Attributes:
        name: its key in the configuration.
        rows: its rows.
        weight: its part of the samples, relative to the others'.
        limit: samples after which it is left out, None for no limit.
        fingerprint: identity of its content.
    """

    name: str
    rows: int
    weight: float = 1.0
    limit: int | None = None
    fingerprint: str = ""


class Change(NamedTuple):
    """New weights, by name of the source, from a sample of the run on; sources that are not named keep theirs."""

    sample: int
    weights: Mapping[str, float]


class Located(NamedTuple):
    """Where samples come from, one entry a sample.

    Attributes:
        sources: index of the source.
        ordinals: how many samples of that source came before in the run.
        rows: row in that source's dataset.
    """

    sources: Counts
    ordinals: Counts
    rows: Counts


class Stage:
    """Samples from `start` on with constant weights.

    Attributes:
        start: its first sample.
        before: (sources,) samples of each source before `start`.
        shares: (sources,) samples of each source in one period of the pattern.
    """

    def __init__(self, start: int, before: Counts, weights: Sequence[float]) -> None:
        self.start, self.before = start, before
        self.shares = np.array(pattern_shares(weights), dtype=np.int64)
        self._pattern = spread(self.shares.tolist())
        self._places = [np.flatnonzero(self._pattern == source) for source in range(len(self.shares))]
        self._earlier = np.empty_like(self._pattern)  # of the same source in the same period
        for places in self._places:
            self._earlier[places] = np.arange(places.size)

    def locate(self, samples: Counts) -> tuple[Counts, Counts]:
        """Return source and ordinal of each of `samples`, none of which lies before the stage."""
        periods, places = (samples - self.start) // self._pattern.size, (samples - self.start) % self._pattern.size
        sources = self._pattern[places]
        ordinals: Counts = self.before[sources] + periods * self.shares[sources] + self._earlier[places]
        return sources, ordinals

    def counts(self, sample: int) -> Counts:
        """Return how many samples of each source the run has before `sample`."""
        periods, place = divmod(sample - self.start, self._pattern.size)
        return self.before + periods * self.shares + np.bincount(self._pattern[:place], minlength=len(self.shares))

    def end_of(self, source: int, limit: int) -> int:
        """Return the first sample before which `limit` samples of `source` have been served; it has a share."""
        periods, place = divmod(limit - int(self.before[source]) - 1, int(self.shares[source]))
        return self.start + periods * self._pattern.size + int(self._places[source][place]) + 1


class Mixture:
    """The order of a run's samples over one dataset or several.

    In a stage every source's count is less than one sample off its part at every length of the stage. Weights are
    taken exactly if a pattern of at most `LONGEST_PATTERN` samples can hold them, else rounded to that denominator. A
    source that has reached its limit is left out, and the others share its part in the ratio of their weights.

    Attributes:
        sources: the datasets.
        stages: in order; the first starts at sample 0.
        length: samples until every source with a weight has reached its limit, None if that never happens.

    Raises:
        ConfigError: weights, limits or changes make no sense.
    """

    def __init__(self, sources: Sequence[Source], seed: int, changes: Sequence[Change] = ()) -> None:
        self.sources, self._seed = tuple(sources), seed
        self.length: int | None = None
        self.stages: list[Stage] = []
        weights = {source.name: source.weight for source in self.sources}
        _check(weights, changes)
        ends = [*(change.sample for change in changes), None]
        for change, end in zip((Change(0, {}), *changes), ends, strict=True):
            weights |= change.weights
            self.length = self._add_stages(change.sample, end, [weights[source.name] for source in self.sources])
            if self.length is not None:
                break
        self._starts = np.array([stage.start for stage in self.stages])

    def locate(self, samples: npt.ArrayLike) -> Located:
        """Return where each of `samples` (1-d) comes from, in time that does not depend on how far on they are."""
        wanted = np.asarray(samples, dtype=np.int64)
        stage_of = np.searchsorted(self._starts, wanted, side="right") - 1
        sources, ordinals, rows = (np.empty_like(wanted) for _ in range(3))
        for number in np.unique(stage_of):
            here = stage_of == number
            sources[here], ordinals[here] = self.stages[number].locate(wanted[here])
        for source in np.unique(sources):
            here = sources == source
            rows[here] = sample_rows(ordinals[here], self.sources[source].rows, self._seed, int(source))
        return Located(sources, ordinals, rows)

    def counts(self, sample: int) -> Counts:
        """Return how many samples of each source come before `sample`."""
        return self.stages[int(np.searchsorted(self._starts, sample, side="right")) - 1].counts(sample)

    def fingerprint(self, sample: int) -> str:
        """Return the identity of all that decides the samples before `sample`.

        That of the dataset, if there is but one. What comes later does not enter: weights that change later, and
        datasets that have no part yet, may be changed in the middle of a run.
        """
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        digests = [source.fingerprint for source in self.sources]
        history = [
            [stage.start, [(i, digests[i], share) for i, share in enumerate(stage.shares.tolist()) if share]]
            for stage in self.stages
            if stage.start < max(sample, 1)
        ]
        return hashlib.sha256(json.dumps(history).encode()).hexdigest()

    def _add_stages(self, start: int, end: int | None, weights: list[float]) -> int | None:
        """Append the stages from `start` to `end`, a new one whenever a source reaches its limit.

        Returns the sample at which no source is left, None if there always is one.
        """
        while end is None or start < end:
            before = self.stages[-1].counts(start) if self.stages else np.zeros(len(weights), dtype=np.int64)
            left = [
                0.0 if source.limit is not None and count >= source.limit else weight
                for source, count, weight in zip(self.sources, before, weights, strict=True)
            ]
            if not any(left):
                return start
            stage = Stage(start, before, left)
            self.stages.append(stage)
            ends = [
                stage.end_of(number, source.limit)
                for number, source in enumerate(self.sources)
                if source.limit is not None and stage.shares[number]
            ]
            if not ends or (end is not None and min(ends) >= end):
                break
            start = min(ends)
        return None


def pattern_shares(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the ratio of `weights`, exactly or rounded so that they sum to `LONGEST_PATTERN`.

    Weights are read as the decimals that a person writes: 0.1 is one tenth. None that is positive is rounded to 0.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    whole = sum(parts)
    total = min(whole // math.gcd(*parts), LONGEST_PATTERN)
    shares = [part * total // whole for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (-(parts[i] * total % whole), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    for i, part in enumerate(parts):
        if part and not shares[i]:
            shares[i] = 1
            shares[shares.index(max(shares))] -= 1
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def spread(shares: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return an order of `shares[i]` times i, shape (sum of shares,), in which each count stays within one of its part.

    Copy k = 0, 1, ... of a source with share a of P has to lie in the places floor(k P / a) to ceil((k + 1) P / a) - 1;
    then its count is less than one off a / P of any length. Serving the copy whose window closes first always succeeds
    ("Proportionate progress", Baruah, Cohen, Plaxton and Varvel 1996, on one processor).
    """
    total = sum(shares)
    sources = np.repeat(np.arange(len(shares)), shares)
    copies = np.concatenate([np.arange(share) for share in shares])
    own = np.asarray(shares, dtype=np.int64)[sources]
    opens, closes = copies * total // own, -(-(copies + 1) * total // own)
    by_opening = np.argsort(opens, kind="stable")
    keys = (closes * len(shares) + sources)[by_opening].tolist()  # one number compares faster than a pair
    opened = np.searchsorted(opens[by_opening], np.arange(total), side="right").tolist()
    order, ready, begun = [], list[int](), 0
    for until in opened:
        for key in keys[begun : until - 1]:
            heapq.heappush(ready, key)
        order.append(heapq.heappop(ready) if begun == until else heapq.heappushpop(ready, keys[until - 1]))
        begun = until
    return np.array(order, dtype=np.int64) % len(shares)


def _check(weights: Mapping[str, float], changes: Sequence[Change]) -> None:
    current, previous = dict(weights), 0
    _check_weights("data.train", current)
    for number, change in enumerate(changes):
        key = f"data.schedule[{number}]"
        if change.sample <= previous:
            raise ConfigError(f"{key}.sample: {change.sample} does not come after {previous}; order them by sample")
        unknown = [name for name in change.weights if name not in weights]
        if unknown:
            raise ConfigError(f"{key}.weights.{unknown[0]}: no such dataset in data.train; valid: {', '.join(weights)}")
        previous = change.sample
        current |= change.weights
        _check_weights(key, current)


def _check_weights(key: str, weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{key}: the weight {weight} of {name} is not a number of at least 0")
    if not any(weights.values()):
        raise ConfigError(f"{key}: no dataset has a weight above 0; give one to at least one of {', '.join(weights)}")
