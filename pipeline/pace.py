"""Which rank computes slowly: its own forward seconds, measured before any collective makes all ranks wait alike."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.launch import node_name
from pipeline.step_cost import non_negative_least_squares

if TYPE_CHECKING:
    from data_prep.world import World

_WINDOW = 64
_ENOUGH = 8
_LEFT_OUT = 0.1  # the slowest of a rank's steps: a pause of the machine is no slow rank


class Pace:
    """Compares the forward seconds of the ranks with one cost a x batches + b x n + c x k that all share.

    Ranks that wait for a slow one take as long as it does for a step; only what they compute before they meet tells
    them apart. Depths differ between steps, and between ranks where they are dealt out, so seconds alone do not.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=_WINDOW)
        self._begun = False

    def add(self, batches: int, n: float, k: float, seconds: float) -> None:
        """Note a step of this rank; no message. The first, which may compile, is left out.

        Args:
            batches: its micro-batches.
            n: iterations without gradient, summed over this rank's own micro-batches.
            k: iterations with gradient, likewise.
            seconds: time of its forward passes without the collectives in them.
        """
        if self._begun and math.isfinite(seconds) and seconds > 0.0:
            self._steps.append((batches, n, k, seconds))
        self._begun = True

    def read(self) -> dict[str, Any]:
        """Compare the ranks over the steps since the last reading, the last 64 at most; a collective (one gather).

        Returns:
            On rank 0, if every rank has at least 8 steps: `nodes` {node: mean of its ranks' ratios} and `slowest`
            {rank, host, ratio}; else nothing. A ratio of 1 is the (lower) median rank's pace, 1.2 takes 20 % longer.
        """
        own = np.array(self._steps, dtype=np.float64).reshape(-1, 4)
        self._steps.clear()
        found = self._world.gather((node_name(), own))
        if found is None or min(len(steps) for _, steps in found) < _ENOUGH:
            return {}
        ratios = _ratios([steps for _, steps in found])
        hosts = [host for host, _ in found]
        nodes = {host: float(np.mean(ratios[[other == host for other in hosts]])) for host in dict.fromkeys(hosts)}
        rank = int(np.argmax(ratios))
        return {"nodes": nodes, "slowest": {"rank": rank, "host": hosts[rank], "ratio": float(ratios[rank])}}


def _ratios(ranks: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Return (ranks,) seconds / expected seconds, from (steps, 4) of every rank; the median rank has 1."""
    steps = np.concatenate(ranks)
    cost = non_negative_least_squares(steps[:, :3], steps[:, 3])
    ratios = np.empty(len(ranks))
    for rank, own in enumerate(ranks):
        of_steps = np.sort(own[:, 3] / np.maximum(own[:, :3] @ cost, 1e-12))
        ratios[rank] = of_steps[: math.ceil(len(own) * (1.0 - _LEFT_OUT))].mean()
    # What the fit misses of a depth is common to all ranks, and so goes out here.
    return ratios / np.quantile(ratios, 0.5, method="lower")
