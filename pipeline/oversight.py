"""What the ranks do about what the monitor finds: leave an update out, do a step again, go back, or end.

The monitor (`monitoring.monitor`) lives on rank 0. Its veto is summed over the ranks before the weights move; what it
decides after a step travels as a flag of the next step's agreement, so that all ranks act on it at the same step.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from monitoring.monitor import Monitor
from monitoring.policy import Decision
from monitoring.runlog import Record
from pipeline.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from data_prep.world import World
    from pipeline.agenda import Step
    from pipeline.config import RunConfig
    from pipeline.control import RunControl
    from pipeline.step import Stepper, StepResult
    from pipeline.update_probe import UpdateProbe

_AGREED = ("shorten", "rollback", "stop")
"""Actions of all ranks, the weightiest last."""


class Oversight:
    """One rank's part in it.

    Args:
        config: the resolved configuration.
        world: the ranks.
        control: carries what is decided to the other ranks.
        event: writes an event into the run's log; does nothing on other ranks than 0.
        on_alarm: told what a person should know of at once.

    Attributes:
        acts: whether the run does what is decided, not only writes it down.
        repeats: whether suspicious steps are done again.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        control: RunControl,
        event: Callable[..., None],
        on_alarm: Callable[[str], None],
    ) -> None:
        self._config, self._world, self._control = config.monitor, world, control
        self._event, self._on_alarm = event, on_alarm
        self._monitor: Monitor | None = None
        self._facts: dict[str, Any] = {}
        self._mixture_changes = [change.sample for change in config.data.schedule]
        self.acts = config.monitor.mode == "act"
        # With a loss scale the step is no pure function, and a step that overflows is nothing out of the ordinary.
        self.repeats = self.acts and config.monitor.replay and config.train.precision != "fp16"
        if world.rank == 0 and config.monitor.mode != "none":
            self._monitor = Monitor(config.monitor, mean_recurrence=config.depth.mean_recurrence)

    def state(self) -> dict[str, Any]:
        """Return what the detectors remember, and what is decided but not done, for a checkpoint, on rank 0."""
        return {} if self._monitor is None else {"detectors": self._monitor.state(), "pending": self._control.verdict}

    def suspects(self) -> list[str]:
        """Return the detectors whose condition holds now, lasting or not."""
        return [] if self._monitor is None else self._monitor.suspects()

    def restore(self, state: dict[str, Any], events: Sequence[Record], *, rolled_back: bool) -> None:
        """Go on from a checkpoint.

        Args:
            state: of the checkpoint; empty if it has none.
            events: all of the run's, of which the policy makes its memory.
            rolled_back: whether the run has gone back to the checkpoint, so that what was decided then is done.
        """
        if self._monitor is not None:
            self._monitor.restore(state.get("detectors", {}))
            self._monitor.remember(events)
            self._control.verdict = None if rolled_back else state.get("pending")

    def relearn(self) -> None:
        """Let the detectors learn anew what the loss is like, after it has changed for a reason."""
        if self._monitor is not None:
            self._monitor.relearn()

    def begin(self, number: int, step: Step) -> None:
        """Learn which step comes next, before `veto` is asked about it."""
        self._facts = {"step": number, **step.depth_record()}
        first, last = step.share.consumed, step.share.consumed + step.share.batch_size
        if any(first <= change < last for change in self._mixture_changes):
            self.relearn()

    def veto(self, loss: float, gradient_norm: float) -> bool:
        """Return whether this rank wants the update left out."""
        if self._monitor is None:
            return False
        return self._monitor.before_update({**self._facts, "loss": loss, "grad_norm": gradient_norm}) is not None

    def look_again(
        self, number: int, result: StepResult, stepper: Stepper, trace: Trace | None, probe: UpdateProbe | None
    ) -> tuple[StepResult, Trace | None]:
        """Do a step again whose update was left out, to tell broken hardware from a broken state; a collective.

        The step is a pure function: if it comes to the same, bit by bit, on every rank, the fault is in state and data.
        If a rank comes to something else, twice the same, its first computation was wrong: the host is named, and
        the update of the repetition is made, unless that is suspicious too.

        Args:
            number: of the step.
            result: what it came to.
            stepper: does it again.
            trace: of the step, as for `Stepper.do`.
            probe: likewise.

        Returns:
            The result to go on with, and its trace.
        """
        hurry = result.cause is not None and result.cause.flag.stops
        if not self.repeats or result.updated or hurry:
            return result, trace
        again = stepper.repeat(update=False)
        differing = self._ranks_where(again.fingerprint != result.fingerprint)
        if not differing:
            self._event("replay", step=number, verdict="deterministic", ranks=[])
            return result, trace
        trace = None if trace is None else Trace()  # the first one saw the error
        last = stepper.repeat(update=True, trace=trace, probe=probe)
        stable = not self._ranks_where(last.fingerprint != again.fingerprint)
        verdict = "transient" if stable else "not reproducible"
        self._event("replay", step=number, verdict=verdict, ranks=differing)
        for each in differing if stable else ():
            reason = (
                f"step {number} came to something else than its two repetitions, which agree bit by bit;"
                " watch this node, or exclude it"
            )
            self._event("suspected_hardware", step=number, **each, reason=reason)
            self._tell(f"suspected hardware: rank {each['rank']} on {each['host']}: {reason}")
        return last, trace

    def after_step(self, record: Record) -> None:
        """Let the monitor see a completed step; what all ranks have to do goes with the next agreement."""
        if self._monitor is None:
            return
        for decision in self._monitor.after_step(record):
            finding = decision.finding
            self._event(
                "finding",
                action=decision.action,
                acted=decision.acted,
                reason=decision.reason,
                **dataclasses.asdict(finding),
            )
            self._tell(_sentence(decision))
            if not decision.acted:
                continue
            if decision.action == "skip":
                self._event("skip", step=finding.step, detector=finding.detector, reason=decision.reason)
            elif decision.action in _AGREED:
                self._put(decision)

    def decided(self, detail: str) -> Decision:
        """Return what rank 0 has decided; on every rank, once its flag was agreed on."""
        if self._control.verdict == detail:  # else a weightier one has come since, and is next
            self._control.verdict = None
        return Decision.from_dict(json.loads(detail))

    def pending(self) -> Decision | None:
        """Return what rank 0 has decided and nobody has done yet, for a run that ends here; a collective."""
        detail = self._world.broadcast(self._control.verdict)
        return None if detail is None else self.decided(detail)

    def _put(self, decision: Decision) -> None:
        """Let the weightiest of the decisions that wait be the next to be agreed on."""
        detail = self._control.verdict
        if detail is None or _weight(decision) > _weight(Decision.from_dict(json.loads(detail))):
            self._control.verdict = json.dumps(decision.to_dict())

    def _ranks_where(self, own: bool) -> list[dict[str, Any]]:
        said = self._world.allgather((own, socket.gethostname()))
        return [{"rank": rank, "host": host} for rank, (raised, host) in enumerate(said) if raised]

    def _tell(self, text: str) -> None:
        if self._world.rank == 0:
            self._on_alarm(text)


_DOES = {
    "skip": ("the update is left out", "would leave the update out"),
    "shorten": ("checkpoints come more often", "would save more often"),
    "rollback": ("goes back", "would go back"),
    "stop": ("ends", "would end"),
}


def _weight(decision: Decision) -> tuple[int, bool]:
    return _AGREED.index(decision.action), decision.vital


def _sentence(decision: Decision) -> str:
    """Return a line for people about a decision."""
    does = _DOES.get(decision.action)
    what = "" if does is None else f"; {does[0] if decision.acted else does[1]}"
    return f"step {decision.finding.step}: {decision.reason}{what}"
