"""Which checkpoints stay: the newest, one in so many steps for ever, the best, and those that a rollback may go to.

Detectors need some steps to notice that a run goes wrong (`healthy_horizon`), so a checkpoint is safe to roll back to
only if its verdict is healthy *and* it is that old ("aged": at least `healthy_horizon` steps before the newest). The
newest few alone would often all be too young, and removing them as they are overtaken would leave nothing to age.
Steps are therefore cut into bins of gap = ceil(healthy_horizon / keep_healthy), and the first healthy checkpoint of a
bin stays until it has aged and `keep_healthy` later ones have, too. While fewer than `keep_healthy` of these have aged,
the `keep_healthy` oldest healthy ones stay as well.

What that guarantees, if the rules are applied after every save (tests/pipeline/test_retention.py):
- at least keep_healthy aged healthy checkpoints are there as soon as that many were ever saved, and before that all;
- the newest of them is less than gap steps older than the newest that was ever saved;
- at most 3 keep_healthy stay for this rule alone.
"Ever saved" begins anew, with what is there, when a run goes back to an earlier step: younger ones are then superseded.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.checkpoints.commit import remove_directory, set_aside
from pipeline.checkpoints.health import HEALTHY, UNKNOWN
from pipeline.checkpoints.manifest import MANIFEST, CheckpointManifest, checkpoint_name, checkpoints_in, read_manifest
from pipeline.errors import CheckpointError, ConfigError


class Rules(Protocol):
    """What to keep; `CheckpointConfig` has these fields."""

    @property
    def keep_last(self) -> int:
        """Number of newest checkpoints."""

    @property
    def keep_every(self) -> int | None:
        """The first checkpoint in every so many steps stays for ever."""

    @property
    def keep_best(self) -> int:
        """Number of checkpoints with the lowest validation losses."""

    @property
    def keep_healthy(self) -> int:
        """Number of healthy checkpoints older than the detectors' horizon."""

    @property
    def healthy_horizon(self) -> int:
        """Steps within which detectors notice that a run goes wrong."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What retention knows of a checkpoint.

    Attributes:
        step: completed steps.
        verdict: "healthy", "suspect" or "unknown".
        loss: validation loss at the largest depth that was measured, nats a token; None without one.
        measured: step of that validation; several checkpoints may carry the same.
    """

    step: int
    verdict: str = UNKNOWN
    loss: float | None = None
    measured: int | None = None


Known = dict[str, tuple[tuple[int, int, int], Facts | None]]
"""Name -> identity of the manifest file and what it says; None if it cannot be used."""


def check_rules(rules: Rules) -> None:
    """Refuse values without a meaning.

    Raises:
        ConfigError: with the dotted path.
    """
    if rules.keep_last < 2:
        raise ConfigError(f"checkpoint.keep_last: {rules.keep_last} leaves nothing to fall back to; use at least 2")
    if rules.keep_every is not None and rules.keep_every < 1:
        raise ConfigError(f"checkpoint.keep_every: {rules.keep_every} is not positive; null for none")
    for name in ("keep_best", "keep_healthy", "healthy_horizon"):
        if (value := getattr(rules, name)) < 0:
            raise ConfigError(f"checkpoint.{name}: {value} is negative; 0 for none")


def facts_of(manifest: CheckpointManifest) -> Facts:
    """Return what retention needs of a manifest.

    Raises:
        CheckpointError: it says it in another way.
    """
    try:
        losses = manifest.validation.get("loss") or {}
        loss = float(losses[max(losses, key=int)]) if losses else math.nan
        verdict = str(manifest.health.get("verdict", UNKNOWN))
        measured = None if (step := manifest.validation.get("step")) is None else int(step)
        checkpoint_name(manifest.progress.step)
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
        raise CheckpointError(
            f"step {manifest.progress.step}: its number, health or validation cannot be read ({error!r})"
        ) from None
    usable = math.isfinite(loss)
    return Facts(
        step=manifest.progress.step,
        verdict=verdict,
        loss=loss if usable else None,
        measured=measured if usable else None,
    )


def keep(facts: Collection[Facts], rules: Rules) -> dict[int, list[str]]:
    """Return the steps to keep, and why: "last", "every", "best", "healthy"; the highest step is the newest."""
    steps = sorted(each.step for each in facts)
    reasons = {
        "last": set(steps[-rules.keep_last :]),
        "every": _spaced(steps, rules.keep_every),
        "best": _best(facts, rules.keep_best),
        "healthy": _healthy(facts, rules.keep_healthy, rules.healthy_horizon),
    }
    kept = sorted(set().union(*reasons.values()))
    return {step: [reason for reason, chosen in reasons.items() if step in chosen] for step in kept}


def _first_of_each(steps: list[int], width: int) -> set[int]:
    """Return the first of `steps` in each bin of `width` steps."""
    return set({step // width: step for step in sorted(steps, reverse=True)}.values())


def _spaced(steps: list[int], width: int | None) -> set[int]:
    # Not the multiples of `width`: a save may have been skipped, or come early because the job had to end.
    return set() if width is None else _first_of_each([step for step in steps if step >= width], width)


def _best(facts: Collection[Facts], number: int) -> set[int]:
    """Return the checkpoints with the lowest losses; of those that carry the same validation, the one it measured."""
    measured: dict[int | None, Facts] = {}
    for each in sorted(facts, key=lambda each: each.step, reverse=True):
        if each.loss is not None:
            measured[each.measured] = each
    return {each.step for each in sorted(measured.values(), key=lambda each: (each.loss, each.step))[:number]}


def _healthy(facts: Collection[Facts], number: int, horizon: int) -> set[int]:
    steps = sorted(each.step for each in facts if each.verdict == HEALTHY)
    if not number or not steps:
        return set()
    last_aged = max(each.step for each in facts) - horizon
    firsts = sorted(_first_of_each(steps, max(1, math.ceil(horizon / number))))
    aged = [step for step in firsts if step <= last_aged]
    oldest = steps[:number] if len(aged) < number else []
    return {*aged[-number:], *(step for step in firsts if step > last_aged), *oldest}


def prune(
    directory: Path, newest: str, rules: Rules, known: Known | None = None, *, other_owners: bool = False
) -> list[str]:
    """Remove the checkpoints in `directory` that no rule keeps; return their names, oldest first.

    What is numbered after `newest` was passed over when the run resumed from before it. It is moved aside as
    superseded-*, not removed: a person may want to know what happened to it. One whose manifest cannot be used
    (damaged, of another user) is not counted as kept, and stays for a person to look at.

    Args:
        directory: the folder `checkpoints` of a run, or a node's own.
        newest: name of the checkpoint that the run stands on.
        rules: what to keep.
        known: filled in here, and given again at the next call saves reading the same manifests again.
        other_owners: count and remove those of other users as well.

    Raises:
        OSError: `newest` is not there, upon which nothing is removed, or something could not be; everything else was.
    """
    paths = checkpoints_in(directory)
    names = [path.name for path in paths]
    if newest not in names:  # somebody has changed the directory meanwhile, or it is not seen as it is
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory / newest))
    current = paths[: names.index(newest) + 1]
    for path in paths[len(current) :]:
        set_aside(path)
    facts = read_facts(current, {} if known is None else known, other_owners=other_owners)
    kept = keep(facts.values(), rules)
    removed, failure = [], None
    for name, each in facts.items():
        if each.step not in kept:
            try:
                remove_directory(directory / name)
                removed.append(name)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
    return removed


def read_facts(paths: list[Path], known: Known, *, other_owners: bool = False) -> dict[str, Facts]:
    """Return name -> facts of the checkpoints whose manifests can be used; `known` is brought up to date."""
    seen: Known = {}
    for path in paths:
        try:
            status = (path / MANIFEST).stat()
        except OSError:
            continue
        identity = (status.st_ino, status.st_mtime_ns, status.st_size)
        before = known.get(path.name)
        if before is None or before[0] != identity:
            before = identity, _read(path, other_owners=other_owners)
        seen[path.name] = before
    known.clear()
    known.update(seen)
    return {name: facts for name, (_, facts) in seen.items() if facts is not None}


def _read(path: Path, *, other_owners: bool) -> Facts | None:
    try:
        facts = facts_of(read_manifest(path, other_owners=other_owners))
    except (OSError, ValueError, TypeError):  # the last of a manifest that says odd things of its own accord
        return None
    return facts if path.name == checkpoint_name(facts.step) else None
