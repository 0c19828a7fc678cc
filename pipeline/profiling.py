"""A profile of some steps, as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from pipeline.accelerator import has_accelerator
from pipeline.errors import ConfigError

TRACE_FILE = "trace-rank-{rank:05d}.json.gz"


@dataclass(kw_only=True)
class ProfileConfig:
    """Which steps are profiled, on rank 0."""

    steps: list[int] = field(default_factory=list)
    """First and last step, as in [20, 22], counted from 1 as in the run log; empty for none."""

    def check(self, steps: int) -> None:
        """Refuse what is not a range within a run of so many steps.

        Raises:
            ConfigError: it is not.
        """
        if self.steps and (len(self.steps) != 2 or not 1 <= self.steps[0] <= self.steps[1] <= steps):
            raise ConfigError(
                f"train.profile.steps: {self.steps} is not [first, last] with 1 <= first <= last <= {steps}, the"
                " train.steps"
            )


class StepProfiler:
    """Records the steps of one attempt that the configuration names.

    Args:
        config: which steps.
        directory: where the trace is written, None to record nothing.
        rank: number of this rank.
    """

    def __init__(self, config: ProfileConfig, directory: Path | None, rank: int) -> None:
        self._steps = config.steps if directory is not None else []
        self._path = Path() if directory is None else directory / TRACE_FILE.format(rank=rank)
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Begin to record if `step`, counted from 1, lies in the range; a run may resume in the middle of it."""
        if self._running is None and self._steps and self._steps[0] <= step <= self._steps[1]:
            activities = [ProfilerActivity.CPU]
            if has_accelerator():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()

    def stop(self) -> Path | None:
        """Write what has been recorded, if anything; return its path."""
        if self._running is None:
            return None
        self._running.stop()
        temporary = self._path.with_name(f".{self._path.name.removesuffix('.json.gz')}.tmp.json.gz")
        self._running.export_chrome_trace(str(temporary))
        temporary.replace(self._path)
        self._running = None
        return self._path
