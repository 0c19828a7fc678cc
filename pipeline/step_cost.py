"""What a step costs, from the depths that were drawn: a x (micro-batches) + b x n + c x k, fitted while training."""

from __future__ import annotations

from collections import deque
from itertools import combinations

import numpy as np
import numpy.typing as npt

_WINDOW = 64
_ENOUGH = 8
_REFIT_EVERY = 8


class StepCost:
    """The cost of a step, fitted to the last 64 by least squares with coefficients that are not negative.

    Steps differ several times in cost by their depths alone, so that a limit in seconds is either late for a shallow
    step or wrong for a deep one. The first step, which may compile, is left out.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=_WINDOW)
        self._coefficients: npt.NDArray[np.float64] | None = None
        self._since_fit = 0
        self._begun = False

    @property
    def longest(self) -> float:
        """Seconds of the longest of these steps, 0 before there is one."""
        return max((seconds for *_, seconds in self._steps), default=0.0)

    def add(self, batches: int, n: float, k: float, seconds: float) -> None:
        """Learn from a step of one rank.

        Args:
            batches: its micro-batches.
            n: iterations without gradient, summed over the micro-batches.
            k: iterations with gradient, likewise.
            seconds: how long it took.
        """
        if not self._begun:
            self._begun = True
            return
        self._steps.append((batches, n, k, seconds))
        self._since_fit += 1
        if len(self._steps) >= _ENOUGH and (self._coefficients is None or self._since_fit >= _REFIT_EVERY):
            steps = np.array(self._steps)
            self._coefficients = non_negative_least_squares(steps[:, :3], steps[:, 3])
            self._since_fit = 0

    def seconds(self, batches: int, n: float, k: float) -> float | None:
        """Return what such a step should take, None before 8 steps after the first are known."""
        return None if self._coefficients is None else float(self._coefficients @ (batches, n, k))


def non_negative_least_squares(
    columns: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return x >= 0 (columns,) that minimises |columns @ x - target|, for a handful of columns.

    The solution is that of unconstrained least squares on the columns where x > 0, so all sets of them are tried.
    """
    number = columns.shape[1]
    best, least = np.zeros(number), float(target @ target)
    for size in range(1, number + 1):
        for chosen in combinations(range(number), size):
            part = columns[:, chosen]
            found = np.linalg.lstsq(part, target, rcond=None)[0]
            residual = part @ found - target
            if (found >= 0.0).all() and residual @ residual < least:
                best, least = np.zeros(number), float(residual @ residual)
                best[list(chosen)] = found
    return best
