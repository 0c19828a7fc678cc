"""What a person can do wrong with the pipeline, and the exit codes by which `slurm/` tells outcomes apart."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The contract between a job and whatever submitted it (docs/architecture.md)."""

    FINISHED = 0
    STOPPED = 10
    """Stopped cleanly with a checkpoint; submit again."""
    DIVERGED = 11
    """The recovery budget is spent; a person must look."""
    BAD_INPUT = 12
    """Bad configuration or input; nothing was started."""
    UNHEALTHY_NODE = 13
    """A node named in outcome.json is unhealthy; exclude it and submit again."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the dotted path, the value and what to do."""


class CheckpointError(ValueError):
    """No checkpoint, or one that cannot be used for what was asked."""


class RunError(RuntimeError):
    """A run that had started could not go on; its attempt directory says on which rank and why."""


class UnhealthyNodeError(RuntimeError):
    """Nodes that a run must not use; the message says what is wrong.

    Attributes:
        reason: what is wrong with which hosts, in words.
        hosts: the names of the hosts to exclude, sorted; empty if it is all of several, which is no node's fault.
        silent: ranks that do not answer any more, ascending; the lowest of the others speaks for all.
    """

    def __init__(self, reason: str, hosts: list[str], silent: list[int] | None = None) -> None:
        self.reason, self.hosts, self.silent = reason, sorted(set(hosts)), sorted(silent or [])
        advice = f"exclude {', '.join(self.hosts)} and submit again" if self.hosts else "no host can be singled out"
        super().__init__(f"{reason}; {advice}")

    def speaks(self, rank: int) -> bool:
        """Return whether `rank` is the one that reports for all."""
        return rank not in self.silent and all(other in self.silent for other in range(rank))
