"""Where the time of a step goes, by the device's own clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.accelerator import Mark, mark, seconds_between


class StepClock:
    """Adds up the time of named phases.

    On a GPU the marks lie in its queue: a phase takes as long as the device was busy with it or waited for it, and
    measuring makes nobody wait.

    Args:
        device: whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block as part of `phase`; it carries that name in a profile too."""
        first = mark(self._device)
        with torch.profiler.record_function(phase):
            yield
        self._spans.append((phase, first, mark(self._device)))

    def read(self) -> dict[str, float]:
        """Return the seconds of every phase since the last reading."""
        seconds: dict[str, float] = {}
        for phase, first, second in self._spans:
            seconds[phase] = seconds.get(phase, 0.0) + seconds_between(first, second)
        self._spans.clear()
        return seconds
