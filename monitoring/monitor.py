"""The monitor of a run: detectors that look at every step, and the policy that says what to do about their findings.

It lives on rank 0, knows neither torch nor other ranks, and does nothing by itself: the train loop asks it before each
update, tells it of each step, and carries out what it decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monitoring.config import MonitorConfig
from monitoring.detectors import Detector, Finding, build_detectors
from monitoring.detectors.steps import StepDetector
from monitoring.policy import Decision, Policy

__all__ = ["Decision", "Monitor"]

_OF_LEVELS = ("loss_spike", "gradient_spike", "loss_drift", "throughput")
"""Detectors that compare a number with what it has been."""


class Monitor:
    """See the module.

    Args:
        config: the section `monitor`.
        mean_recurrence: the mean number of iterations that the run draws.
    """

    def __init__(self, config: MonitorConfig, *, mean_recurrence: float) -> None:
        self._config, self._mean_recurrence = config, mean_recurrence
        self._mode = config.mode
        self._detectors = self._build()
        self._policy = Policy(config.policy, observe_only=config.mode != "act")

    def before_update(self, facts: Mapping[str, Any]) -> Finding | None:
        """Return why the update of a step should not be made, None if it should.

        Args:
            facts: `step`, `loss`, `grad_norm`, `num_steps` (and `depths`) of the step, all of them global.
        """
        if self._mode != "act":
            return None
        for detector in self._detectors.values():
            if isinstance(detector, StepDetector) and self._policy.skips(detector.name):
                finding = detector.check(facts)
                if finding:
                    return finding
        return None

    def after_step(self, record: Mapping[str, Any]) -> list[Decision]:
        """Take in the record of a completed step (`skipped` if its update was vetoed); return what is to be done."""
        if self._mode == "none":
            return []
        findings = [finding for item in self._detectors.values() if (finding := item.observe(record))]
        decisions = self._policy.decide(int(record["step"]), findings, skipped=bool(record.get("skipped")))
        if any(decision.new_level for decision in decisions):
            self.relearn()
        return decisions

    def relearn(self) -> None:
        """Forget what loss, gradient norm and throughput have been: they are to change, or have, for a reason.

        `loss_spike`, `gradient_spike`, `loss_drift` and `throughput` are in their warm-up again.
        """
        fresh = self._build()
        self._detectors |= {name: fresh[name] for name in _OF_LEVELS if name in fresh}
        self._policy.forget_spikes()

    def suspects(self) -> list[str]:
        """Return the detectors whose condition holds now, lasting or not: a checkpoint made now is suspect."""
        return [name for name, detector in self._detectors.items() if detector.suspect]

    def state(self) -> dict[str, Any]:
        """Return what the detectors remember, as finite JSON; the policy's memory is the run's events."""
        return {name: detector.state() for name, detector in self._detectors.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; detectors that it does not know start anew, those that are not here are passed over."""
        self._detectors = self._build()
        for name, detector in self._detectors.items():
            if name in state:
                detector.restore(state[name])

    def remember(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Rebuild the policy's memory from the run's events, at a start and after a rollback."""
        self._policy.remember(events)

    def _build(self) -> dict[str, Detector]:
        if self._mode == "none":
            return {}
        built = build_detectors(self._config.detectors, self._mean_recurrence)
        return {item.name: item for item in built if self._config.policy.actions[item.name] != "ignore"}
