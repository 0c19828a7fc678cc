"""A fingerprint of what one rank's own backward passes computed, which a repetition of the step must match."""

from __future__ import annotations

import hashlib
from functools import partial
from operator import itemgetter

import torch
from torch import nn


class GradientDigest:
    """The sums of the gradients of all matrices, micro-batch by micro-batch, before ranks exchange anything.

    A hook on each matrix reads its gradient once, in float32, when a backward pass has it complete. Sums are
    deterministic, so that equal computation gives equal bits. What errs in activations, or in the gradients that flow
    back, changes the sums of all tensors before it; an error in the product that gives one matrix its gradient shows
    if it changes the sum in 24 bits. Vectors (norms, biases) are left out: there are more of them, and what they are
    made of reaches a matrix too.

    Args:
        module: the model, before or after DeepSpeed has wrapped it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._found: list[tuple[int, torch.Tensor]] = []
        # ZeRO stage 3 shows a rank's part of a parameter.
        shapes = [(parameter, getattr(parameter, "ds_shape", parameter.shape)) for parameter in module.parameters()]
        matrices = [parameter for parameter, shape in shapes if len(shape) == 2]
        self._hooks = [matrix.register_hook(partial(self._note, index)) for index, matrix in enumerate(matrices)]

    def reset(self) -> None:
        """Forget the backward passes so far."""
        self._found.clear()

    def read(self) -> tuple[bytes, bool]:
        """Return the digest (16 bytes), and whether every sum was finite; waits for the device."""
        # In the order of the model: that in which a backward pass has them complete is its own affair.
        found = [total for _, total in sorted(self._found, key=itemgetter(0))]
        sums = torch.stack(found).cpu() if found else torch.empty(0)
        digest = hashlib.sha256(sums.numpy().tobytes()).digest()[:16]
        return digest, bool(torch.isfinite(sums).all())

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, index: int, gradient: torch.Tensor) -> None:
        self._found.append((index, gradient.detach().sum(dtype=torch.float32)))
