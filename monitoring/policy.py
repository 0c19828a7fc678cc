"""What is done about findings: a table of actions, escalation within bounds, and a memory that is the run's events."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

from monitoring.detectors.base import Finding, require

ACTIONS = ("ignore", "warn", "skip", "shorten", "rollback", "stop")
SPIKES = ("loss_spike", "gradient_spike")
"""Detectors of finite numbers that stand out: bad data, or a new level of the loss. They never end a run."""
SKIPPING = ("non_finite", *SPIKES)
"""Detectors that judge a step before its update is made."""
_HEALING = ("skip", "rollback", "stop")
DEFAULT_ACTIONS = {
    "non_finite": "skip",
    "loss_spike": "skip",
    "gradient_spike": "skip",
    "optimizer_rms": "shorten",
    "not_contracting": "shorten",
    "dead_core": "shorten",
    "depth_inversion": "shorten",
    "collapse": "rollback",
    "blow_up": "rollback",
    "loss_drift": "rollback",
    "degenerate": "warn",
    "ignored": "warn",
    "throughput": "warn",
    "straggler": "warn",
}


@dataclass(kw_only=True)
class PolicyConfig:
    """What is done about each detector's findings, and how far it may go."""

    actions: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_ACTIONS))
    """Detector -> ignore, warn, skip, shorten, rollback or stop; entries given replace the defaults one by one."""
    cool_down: int = 50
    """Steps for which a detector that has been reported is not reported again."""
    skips_before_rollback: int = 3
    """Skipped updates within `skip_window` after which the run rolls back."""
    skip_window: int = 20
    """Steps over which skipped updates are counted."""
    precursors: list[str] = field(default_factory=lambda: ["not_contracting", "dead_core", "depth_inversion"])
    """Detectors that announce a failure of the recurrence, and are sure of it when they agree; none: they never do."""
    precursors_before_rollback: int = 2
    """How many of them within `precursor_window` make the run roll back."""
    precursor_window: int = 50
    """Steps over which these are counted, and over which the first sign of a failure is looked for."""
    rollbacks_most: int = 3
    """Rollbacks within `rollback_window`; instead of one more the run stops."""
    rollback_window: int = 2000
    """Steps over which rollbacks are counted."""
    rate_factor: float = 0.5
    """What a rollback multiplies the learning rate with; 1 if bad data is the cause and it is the first time."""
    rewarm_steps: int = 50
    """Steps in which the learning rate rises again after a rollback."""
    skip_steps: int = 20
    """Steps of data that a rollback jumps over beyond the step at which it was decided."""
    shorten_factor: int = 4
    """What the action `shorten` divides the checkpoint interval by."""
    shorten_steps: int = 200
    """Steps for which the interval stays short."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning; fill in what the table leaves out."""
        for detector, action in self.actions.items():
            path = f"policy.actions.{detector}"
            _require_detector(path, detector)
            allowed = [each for each in ACTIONS if each != "skip" or detector in SKIPPING]
            require(action in allowed, path, repr(action), f"one of {', '.join(allowed)}")
        action = self.actions.get("non_finite", "skip")
        words = f"{', '.join(_HEALING)}: no run recovers by itself from numbers that are none"
        require(action in _HEALING, "policy.actions.non_finite", repr(action), words)
        self.actions = DEFAULT_ACTIONS | self.actions
        for detector in self.precursors:
            _require_detector("policy.precursors", detector)
        positive = ("skips_before_rollback", "skip_window", "precursors_before_rollback", "precursor_window")
        for name in (*positive, "rollback_window", "shorten_factor"):
            require(getattr(self, name) >= 1, f"policy.{name}", getattr(self, name), "positive")
        self._require_reachable()
        for name in ("cool_down", "rollbacks_most", "rewarm_steps", "skip_steps", "shorten_steps"):
            require(getattr(self, name) >= 0, f"policy.{name}", getattr(self, name), "0 or more")
        require(0.0 < self.rate_factor <= 1.0, "policy.rate_factor", self.rate_factor, "in (0, 1]")

    def _require_reachable(self) -> None:
        """Refuse numbers that can never be reached: what they guard against would go on for ever."""
        skips, agreeing, all_of_them = self.skips_before_rollback, self.precursors_before_rollback, set(self.precursors)
        words = f"at most policy.skip_window, {self.skip_window}"
        require(skips <= self.skip_window, "policy.skips_before_rollback", skips, words)
        words = f"at most {len(all_of_them)}, the number of policy.precursors"
        require(not all_of_them or agreeing <= len(all_of_them), "policy.precursors_before_rollback", agreeing, words)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done about a finding.

    Attributes:
        action: warn, skip, shorten, rollback or stop.
        finding: why.
        acted: false if it is only said, in mode `observe`.
        reason: why in a sentence, for people.
        before: rollback: go back to a healthy checkpoint of at most this step.
        fallback: rollback: the newest step that will do if there is none; None if no other will.
        vital: rollback: whether the run cannot go on without it; false where finite spikes alone ask for it.
        rate_factor: rollback: multiply the learning rate, as it is at present, with this.
        rewarm_steps: rollback: steps in which it rises again.
        skip_steps: rollback: steps of data to jump over beyond the present one.
        factor: shorten: divide the checkpoint interval by this.
        until: shorten: the step until which that holds.
        new_level: warn: the numbers that stand out are taken for usual from now on.
    """

    action: str
    finding: Finding
    acted: bool
    reason: str
    before: int | None = None
    fallback: int | None = None
    vital: bool = True
    rate_factor: float = 1.0
    rewarm_steps: int = 0
    skip_steps: int = 0
    factor: int = 1
    until: int | None = None
    new_level: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as a JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the decision that `to_dict` wrote."""
        return cls(**{**fields, "finding": Finding.from_dict(fields["finding"])})


class Policy:
    """Decides about findings, within the bounds of its configuration.

    What it remembers is what it has decided, which the run's events hold too: `remember` builds it up again from them.

    Args:
        config: the table and the bounds.
        observe_only: whether decisions are only said; they are then the same, with `acted` false.
    """

    def __init__(self, config: PolicyConfig, *, observe_only: bool) -> None:
        self._config, self._observe_only = config, observe_only
        self._reported: dict[str, int] = {}  # detector -> step of its last report
        self._skips: dict[int, bool] = {}  # step -> whether for more than a finite spike
        self._signs: list[_Sign] = []
        self._rollbacks: list[_Past] = []
        self._decided: tuple[int, bool] | None = None  # step of a rollback decided and not yet made; if it is vital

    def skips(self, detector: str) -> bool:
        """Return whether a finding of this detector vetoes the update."""
        return self._config.actions[detector] == "skip"

    def decide(self, step: int, findings: Sequence[Finding], *, skipped: bool) -> list[Decision]:
        """Return what is to be done after a step.

        Args:
            step: the step, completed or skipped.
            findings: of this step.
            skipped: whether its update was vetoed, here or by another rank.
        """
        config, decisions = self._config, []
        if skipped and not any(self.skips(finding.detector) for finding in findings):
            findings = [*findings, _elsewhere(step)]
        self._forget(step)
        self._signs += [_Sign(step, finding.detector, finding.since) for finding in findings]
        wishes: list[_Wish] = []
        for finding in findings:
            action = config.actions[finding.detector]
            if action == "skip":
                decisions += self._skip(step, finding, skipped=skipped)
            elif self._is_news(step, finding.detector):
                if action == "rollback":
                    wishes.append(_Wish(finding, finding.sentence, finding.detector not in SPIKES))
                else:
                    decisions.append(self._plain(step, finding, action))
        wishes += self._escalations(findings)
        wish = max(wishes, key=lambda each: each.vital, default=None)  # the first of the weightiest
        if wish and self._is_due(step, wish):
            decisions.append(self._remedy(step, wish))
        return decisions

    def forget_spikes(self) -> None:
        """Forget finite spikes: what stood out is the new level."""
        self._skips = {at: other for at, other in self._skips.items() if other}
        self._signs = [sign for sign in self._signs if sign.detector not in SPIKES]
        if self._decided and not self._decided[1]:
            self._decided = None

    def remember(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Replace the memory by what `start`, `finding`, `skip` and `rollback` events of the run say.

        A start goes back as a rollback does. What was to be done when the run ended, and was not, is no report: the
        finding must be able to come again.
        """
        self._reported, self._skips, self._signs, self._rollbacks = {}, {}, [], []
        self._decided = None
        reports: list[_Report] = []
        for event in events:
            kind = event.get("kind")
            if kind == "finding":
                step, detector = int(event["step"]), event["detector"]
                open_end = event.get("action") in ("rollback", "stop") and event.get("acted", True)
                reports.append(_Report(step, detector, open_end))
                self._signs.append(_Sign(step, detector, int(event["since"])))
            elif kind == "skip":
                step = int(event["step"])
                self._skips[step] = self._skips.get(step, False) or event.get("detector") not in SPIKES
            elif kind in ("start", "rollback"):
                restart = kind == "start"
                there = int(event["step" if restart else "to_step"])
                if not restart:
                    self._rollbacks.append(_Past(int(event["from_step"]), there))
                reports = [each for each in reports if each.step <= there and not (restart and each.open_end)]
                self._skips = {at: other for at, other in self._skips.items() if at <= there}
                self._signs = [sign for sign in self._signs if sign.step <= there]
        self._reported = {each.detector: each.step for each in reports}

    def _forget(self, step: int) -> None:
        """Keep the memory within its windows."""
        config = self._config
        self._skips = {at: other for at, other in self._skips.items() if at > step - config.skip_window}
        self._signs = [sign for sign in self._signs if sign.step > step - config.precursor_window]
        self._rollbacks = [past for past in self._rollbacks if abs(step - past.from_step) < config.rollback_window]

    def _is_news(self, step: int, detector: str) -> bool:
        last = self._reported.get(detector)
        if last is not None and last <= step < last + self._config.cool_down:
            return False
        self._reported[detector] = step
        return True

    def _skip(self, step: int, finding: Finding, *, skipped: bool) -> list[Decision]:
        """Decide about a finding whose remedy is to leave the update out: it was, or it is too late for that."""
        if skipped or self._observe_only:
            self._skips[step] = self._skips.get(step, False) or finding.detector not in SPIKES
            if skipped or self._is_news(step, finding.detector):
                return [Decision(action="skip", finding=finding, acted=skipped, reason=finding.sentence)]
            return []
        return [self._plain(step, finding, "warn")] if self._is_news(step, finding.detector) else []

    def _plain(self, step: int, finding: Finding, action: str) -> Decision:
        acted, reason = not self._observe_only, finding.sentence
        if action != "shorten":
            return Decision(action=action, finding=finding, acted=acted, reason=reason)
        return Decision(
            action=action,
            finding=finding,
            acted=acted,
            reason=reason,
            factor=self._config.shorten_factor,
            until=step + self._config.shorten_steps,
        )

    def _escalations(self, findings: Sequence[Finding]) -> Iterator[_Wish]:
        """Return why several small things make a great one, if they do; a finding of this step is due."""
        config = self._config
        for finding in findings:
            action = config.actions[finding.detector]
            if action == "skip" and len(self._skips) >= config.skips_before_rollback:
                words = f"{len(self._skips)} updates skipped within {config.skip_window} steps"
                yield _Wish(finding, words, any(self._skips.values()))
            agreeing = sorted({sign.detector for sign in self._signs} & set(config.precursors))
            if finding.detector in agreeing and len(agreeing) >= config.precursors_before_rollback:
                yield _Wish(finding, f"{' and '.join(agreeing)} within {config.precursor_window} steps", True)

    def _is_due(self, step: int, wish: _Wish) -> bool:
        """Return whether to decide about a rollback: not if one is decided already, unless this one is weightier."""
        if self._decided is None or step - self._decided[0] > self._config.cool_down:
            return True
        return wish.vital and not self._decided[1]

    def _remedy(self, step: int, wish: _Wish) -> Decision:
        """Decide to roll back; if that did not help, to stop, or to take finite spikes for the new level."""
        config, acted, finding = self._config, not self._observe_only, wish.finding
        last = self._rollbacks[-1] if self._rollbacks else None
        if last is not None and step > last.from_step + config.cool_down:
            last = None
        spent = len(self._rollbacks) >= config.rollbacks_most
        if not wish.vital and (last or spent):
            words = "is learnt as the new level of loss and gradient norm, since rollbacks do not end it"
            return Decision(
                action="warn", finding=finding, acted=acted, reason=f"{wish.reason}; this {words}", new_level=True
            )
        self._decided = step, wish.vital
        if spent:
            words = f"{len(self._rollbacks)} rollbacks within {config.rollback_window} steps did not help"
            return Decision(action="stop", finding=finding, acted=acted, reason=f"{wish.reason}; {words}")
        return self._rollback(wish, last)

    def _rollback(self, wish: _Wish, last: _Past | None) -> Decision:
        """Decide to go back behind the first sign, and if it fails again after a rollback behind that."""
        config, finding = self._config, wish.finding
        since = min([finding.since, *(sign.since for sign in self._signs), *self._skips])
        before = since - finding.horizon
        blame_data = config.actions[finding.detector] == "skip" and last is None
        return Decision(
            action="rollback",
            finding=finding,
            acted=not self._observe_only,
            reason=wish.reason,
            before=before if last is None else min(before, last.to_step - 1),
            fallback=since - 1 if last is None else None,
            vital=wish.vital,
            rate_factor=1.0 if blame_data else config.rate_factor,
            rewarm_steps=0 if blame_data else config.rewarm_steps,
            skip_steps=config.skip_steps,
        )


class _Wish(NamedTuple):
    """That the run should roll back."""

    finding: Finding
    reason: str
    vital: bool


class _Report(NamedTuple):
    step: int
    detector: str
    open_end: bool


class _Sign(NamedTuple):
    step: int
    detector: str
    since: int


class _Past(NamedTuple):
    from_step: int
    to_step: int


def _require_detector(path: str, name: str) -> None:
    near = difflib.get_close_matches(name, DEFAULT_ACTIONS, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    require(name in DEFAULT_ACTIONS, path, repr(name), f"a detector{hint}; there are {', '.join(DEFAULT_ACTIONS)}")


def _elsewhere(step: int) -> Finding:
    """Return the finding of a veto that only another rank had a reason for."""
    return Finding(
        detector="non_finite",
        step=step,
        since=step,
        value=math.nan,
        threshold=0.0,
        horizon=0,
        rule="a rank's own gradient is not finite",
    )
