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
