"""What a forward pass of the loop looked like from inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.probes import contraction, effective_rank, gram, mean_norm, rms, token_correlation

_SERIES = ("state_rms", "relative_residual")
# Of an iteration's result, in units of its type's precision: what the sums and products of a few layers err.
_ROUNDING = 4.0


@dataclass
class Trace:
    """Filled by the forward pass that it is given to; of sequences of unequal depth it follows the deepest.

    Everything is measured in float32 and stays on the device until `to_record` or `to_lists`. A pass that ends before
    the head, or that keeps states, has nothing of what is measured behind the loop.

    Attributes:
        keep: iterations (from 1) whose state is kept.
        states: iteration -> state (B, S, H).
        state_rms: sqrt(mean(s_i^2)) an iteration, float32 scalars on the device.
        relative_residual: token mean of |s_i - s_(i-1)| / |s_i| an iteration, likewise.
        changes: RMS(s_i - s_(i-1)) an iteration, likewise.
        scalars: name in the run log -> such a scalar.
    """

    keep: frozenset[int] = frozenset()
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    state_rms: list[torch.Tensor] = field(default_factory=list)
    relative_residual: list[torch.Tensor] = field(default_factory=list)
    changes: list[torch.Tensor] = field(default_factory=list)
    scalars: dict[str, torch.Tensor] = field(default_factory=dict)
    _gram: torch.Tensor | None = None
    _rows: Sequence[int] | slice = field(default_factory=lambda: slice(None))
    _embedded: torch.Tensor | None = None
    _before: torch.Tensor | None = None
    _rounding: float = 0.0

    @torch.no_grad()
    def begin(self, state: torch.Tensor, embedded: torch.Tensor, rows: Sequence[int]) -> None:
        """Note s_0 and the prelude's output e (B, S, H) of the batch, and that its sequences `rows` are followed."""
        self._rows = slice(None) if len(rows) == len(state) else rows
        self._embedded = embedded[self._rows].detach()
        self.scalars["initial_rms"] = rms(state[self._rows])
        self.scalars["injected_rms"] = rms(self._embedded)

    @torch.no_grad()
    def record(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Note the next iteration, which took the followed sequences (B, S, H) from `before` to `after`."""
        iteration = len(self.state_rms) + 1
        if iteration in self.keep:
            self.states[iteration] = after
        self._before = before.detach()
        wide = after.float()
        norms = torch.linalg.vector_norm(wide, dim=-1)
        changes = torch.linalg.vector_norm(wide - self._before, dim=-1)
        self._rounding = _ROUNDING * torch.finfo(after.dtype).eps
        self.state_rms.append(torch.linalg.vector_norm(norms) / after.numel() ** 0.5)
        self.changes.append(torch.linalg.vector_norm(changes) / after.numel() ** 0.5)
        self.relative_residual.append((changes / norms.clamp_min(1e-12)).mean())

    @torch.no_grad()
    def read_out(self, state: torch.Tensor, normed: torch.Tensor) -> None:
        """Note the state after the loop, of the whole batch (B, S, H), and the same behind the final norm.

        Correlation and norms are those of the reference, which takes them behind the norm, but the state before the
        last iteration in front of it: `state_change` and `reference_residual` are not 0 at a fixed point unless the
        norm does nothing to it. `relative_residual` has no such bias.
        """
        assert self._embedded is not None
        self._gram = gram(state[self._rows])
        normed = normed[self._rows].float()
        self.scalars["token_correlation"] = token_correlation(normed)
        norms = torch.linalg.vector_norm(normed, dim=-1)
        self.scalars["state_norm"] = norms.mean()
        self.scalars["state_minus_input"] = mean_norm(normed - self._embedded)
        if self._before is not None:
            changes = torch.linalg.vector_norm(normed - self._before, dim=-1)
            self.scalars["state_change"] = changes.mean()
            self.scalars["reference_residual"] = (changes / norms).mean()
        self._embedded = self._before = None

    @torch.no_grad()
    def hidden(self, hidden: torch.Tensor) -> None:
        """Note what the head is given, of the whole batch (B, S, H)."""
        hidden = hidden[self._rows]
        self.scalars["hidden_correlation"] = token_correlation(hidden)
        self.scalars["hidden_norm"] = mean_norm(hidden)

    def to_lists(self) -> dict[str, list[float]]:
        """Return the two series as plain numbers under the names of the run log; waits for the device."""
        return {name: _numbers(getattr(self, name)) for name in _SERIES}

    def to_record(self) -> dict[str, Any]:
        """Return all that was measured as plain numbers under the names of the run log; waits for the device."""
        record: dict[str, Any] = dict(zip(self.scalars, _numbers(list(self.scalars.values())), strict=True))
        record |= self.to_lists()
        if self.state_rms and record.get("initial_rms", 0.0) > 0.0:
            record["first_jump"] = record["state_rms"][0] / record["initial_rms"]
        floor = self._rounding * max(record["state_rms"], default=0.0)
        rate = contraction(_numbers(self.changes), floor)
        if rate is not None:
            record["contraction"] = rate
        if self._gram is not None:
            record["effective_rank"] = effective_rank(self._gram)
        return record


def _numbers(scalars: list[torch.Tensor]) -> list[float]:
    """Return scalars of the device as numbers of float32's seven digits, waiting for it once."""
    return [float(f"{number:.7g}") for number in torch.stack(scalars).tolist()] if scalars else []
