"""The moment before the weights move: the whole gradient is known, and the update can still be left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pipeline.update_probe import UpdateProbe


class UpdateGate:
    """Stands before the step of the optimizer that DeepSpeed wraps, so that a finite update can be left out too.

    DeepSpeed itself leaves out an update whose gradient is not finite, and then never comes here. It may come once a
    parameter group; the judge is asked the first time.

    Args:
        optimizer: the wrapped one.

    Attributes:
        passed: whether the last update was made.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._step = optimizer, optimizer.step
        self._judge: Callable[[], bool] | None = None
        self._probe: UpdateProbe | None = None
        self._allowed: bool | None = None
        self.passed = False
        optimizer.step = self._guarded  # type: ignore[method-assign]

    def arm(self, judge: Callable[[], bool] | None, probe: UpdateProbe | None) -> None:
        """Say what the next update has to pass.

        Args:
            judge: returns whether it may be made, the same on all ranks; may be a collective. None lets it pass.
            probe: measures it, if it is made.
        """
        self._judge, self._probe = judge, probe
        self._allowed, self.passed = None, False

    def _guarded(self, closure: Any = None) -> Any:
        if self._allowed is None:
            self._allowed = self._judge is None or self._judge()
        if not self._allowed:
            return None
        if self._probe is not None:
            self._probe.before(self._optimizer)
        result = self._step(closure)
        if self._probe is not None:
            self._probe.after(self._optimizer)
        self.passed = True
        return result
