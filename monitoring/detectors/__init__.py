"""The detectors: small rules over the stream of step records, each with its own threshold and memory.

`docs/failures.md` says in words what each sees, and what was measured on runs that failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from monitoring.detectors.base import Detector, Finding
from monitoring.detectors.blow_up import BlowUp, BlowUpConfig, OptimizerRms, OptimizerRmsConfig
from monitoring.detectors.depth_gain import DepthInversion, DepthInversionConfig, Ignored, IgnoredConfig
from monitoring.detectors.loss_drift import LossDrift, LossDriftConfig
from monitoring.detectors.pace import Straggler, StragglerConfig, Throughput, ThroughputConfig
from monitoring.detectors.recurrence import (
    Collapse,
    CollapseConfig,
    DeadCore,
    DeadCoreConfig,
    Degenerate,
    DegenerateConfig,
    NotContracting,
    NotContractingConfig,
)
from monitoring.detectors.steps import (
    GradientSpike,
    GradientSpikeConfig,
    LossSpike,
    LossSpikeConfig,
    NonFinite,
    NonFiniteConfig,
)

__all__ = ["Detector", "DetectorsConfig", "Finding", "build_detectors"]


@dataclass(kw_only=True)
class DetectorsConfig:
    """The thresholds."""

    non_finite: NonFiniteConfig = field(default_factory=NonFiniteConfig)
    loss_spike: LossSpikeConfig = field(default_factory=LossSpikeConfig)
    gradient_spike: GradientSpikeConfig = field(default_factory=GradientSpikeConfig)
    optimizer_rms: OptimizerRmsConfig = field(default_factory=OptimizerRmsConfig)
    not_contracting: NotContractingConfig = field(default_factory=NotContractingConfig)
    dead_core: DeadCoreConfig = field(default_factory=DeadCoreConfig)
    degenerate: DegenerateConfig = field(default_factory=DegenerateConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    blow_up: BlowUpConfig = field(default_factory=BlowUpConfig)
    depth_inversion: DepthInversionConfig = field(default_factory=DepthInversionConfig)
    ignored: IgnoredConfig = field(default_factory=IgnoredConfig)
    loss_drift: LossDriftConfig = field(default_factory=LossDriftConfig)
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)
    straggler: StragglerConfig = field(default_factory=StragglerConfig)


def build_detectors(config: DetectorsConfig, mean_recurrence: float) -> list[Detector]:
    """Return all detectors that look at step records, those first that judge a step before its update.

    Args:
        config: the thresholds.
        mean_recurrence: the mean number of iterations that the run draws.
    """
    return [
        NonFinite(config.non_finite),
        LossSpike(config.loss_spike),
        GradientSpike(config.gradient_spike),
        OptimizerRms(config.optimizer_rms),
        NotContracting(config.not_contracting, mean_recurrence),
        DeadCore(config.dead_core),
        Degenerate(config.degenerate),
        Collapse(config.collapse),
        BlowUp(config.blow_up, mean_recurrence),
        DepthInversion(config.depth_inversion),
        Ignored(config.ignored),
        LossDrift(config.loss_drift),
        Throughput(config.throughput),
        Straggler(config.straggler),
    ]
