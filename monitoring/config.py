"""The section `monitor` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from monitoring.alerting.alerts import AlertsConfig
from monitoring.detectors import DetectorsConfig
from monitoring.detectors.base import require
from monitoring.policy import PolicyConfig
from monitoring.sinks.feed import SinksConfig

MODES = ("act", "observe", "none")


@dataclass(kw_only=True)
class MonitorConfig:
    """What is looked at, what is done about it, and who is told."""

    mode: str = "act"
    """act: carry out what the policy decides; observe: only say what would have been done; none: do not look."""
    probe_every: int = 10
    """Steps between looks into the loop, the gradient and the update."""
    depth_gain_every: int = 100
    """Steps between measurements of what depth is worth."""
    pace_every: int = 50
    """Steps between comparisons of the ranks' speeds."""
    replay: bool = True
    """Whether a step with a number that is none is computed again, to tell faulty hardware from a faulty run."""
    detectors: DetectorsConfig = field(default_factory=DetectorsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sinks: SinksConfig = field(default_factory=SinksConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        require(self.mode in MODES, "mode", repr(self.mode), f"one of {', '.join(MODES)}")
        for name in ("probe_every", "depth_gain_every", "pace_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "positive")
