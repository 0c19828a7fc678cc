"""What a step cost: FLOPs by the depths that were drawn, utilisation of the devices, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from monitoring.runlog import Record
from pipeline.accelerator import peak_flops, peak_memory
from pipeline.flops import sequence_flops
from pipeline.journal import journal
from pipeline.timing import StepClock

if TYPE_CHECKING:
    from pipeline.agenda import Step
    from pipeline.config import RunConfig


class Accounting:
    """Counts for one rank; every rank's devices are taken to be alike.

    Args:
        config: the resolved configuration.
        sequence_length: tokens of a sequence of the training data.
        devices: number of ranks.
        device: this rank's.
    """

    def __init__(self, config: RunConfig, sequence_length: int, devices: int, device: torch.device) -> None:
        self._flops = sequence_flops(config.model, config.train.activation_checkpointing, length=sequence_length)
        # The table holds the peak of 16-bit products.
        peak = None if config.train.precision == "fp32" else peak_flops(device)
        self._peak = None if peak is None else peak * devices
        self._device = device
        self._communicated = journal.seconds_waited()

    def record(self, step: Step, seconds: float) -> Record:
        """Return the fields of the run log about a step of all ranks that took `seconds`.

        model_flops: what the model asks for at the drawn depths; hardware_flops: and what was computed again; mfu and
        hfu: these over what the devices could have done, null where their peak is unknown; memory_bytes: the most
        that rank 0 has held at once.
        """
        model, hardware = (step.share.batch_size * flops for flops in self._flops.mean(step.drawn))
        possible = None if self._peak is None else self._peak * seconds
        return {
            "model_flops": model,
            "hardware_flops": hardware,
            "mfu": None if possible is None else model / possible,
            "hfu": None if possible is None else hardware / possible,
            "memory_bytes": peak_memory(self._device),
        }

    def phases(self, clock: StepClock) -> dict[str, float]:
        """Return the seconds of every phase since the last call, and of `communication`, which is part of them.

        That is the time in collectives as the host sees it; of an accelerator, which goes on alone, it says nothing and
        is left out.
        """
        phases = clock.read()
        if self._device.type == "cpu":
            total = journal.seconds_waited()
            phases["communication"], self._communicated = total - self._communicated, total
        return phases
