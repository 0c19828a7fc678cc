"""The optimizer of Huginn-0125: Adam with update clipping, atan2 instead of epsilon, and decoupled weight decay."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed

from pipeline.journal import journal
from pipeline.sharding import ShardedOptimizer, Views, decay


class EllisAdam(ShardedOptimizer):
    """ELLISAdam of the reference (arXiv 2502.05171 section 4), the same at every sharding.

    For every tensor, with m and v started at the first gradient and its square:

        m <- lerp(m, g, 1 - beta1);  v <- max(beta2 v + (1 - beta2) g^2, eps^2)
        rate <- lr / max(1, sqrt(mean(g^2 / v)))             (update clipping, arXiv 2304.13013)
        p <- p (1 - lr weight_decay) - rate / (1 - beta1^t) atan2(m, sqrt(v / (1 - beta2^t)))   (arXiv 2407.05872)

    The mean is over the whole tensor. The ranks add up their shares of all tensors' sums in one all-reduce a step, of
    as many numbers as there are tensors.

    Args:
        groups: as for `ShardedOptimizer`, with `betas` and `eps`.
    """

    STATE = ("exp_avg", "exp_avg_sq")

    def update(self, group: dict[str, Any], views: list[Views]) -> None:
        """Update the moments, agree on the tensors' root mean squares, and move the weights."""
        (beta1, beta2), eps, step = group["betas"], group["eps"], group["steps_done"]
        ratios = torch.zeros(len(group["tensors"]), device=group["params"][0].device)
        for each in views:
            mean, square, gradient = each.state["exp_avg"], each.state["exp_avg_sq"], each.gradient
            if step == 1:
                mean.copy_(gradient)
                square.copy_(gradient.square())
            else:
                mean.lerp_(gradient, 1.0 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
            square.clamp_(min=eps * eps)
            ratios[each.index] = (gradient.square() / square).sum()
        if self._sharers is not None:
            sums = ratios.to(self._sharers.device)
            with journal.collective("all_reduce", sums.nbytes, self._sharers.name):
                torch.distributed.all_reduce(sums, group=self._sharers.group)
            ratios = sums.to(ratios.device)
        numels = torch.tensor([whole.shape.numel() for whole in group["tensors"]], device=ratios.device)
        rates = group["lr"] / (ratios / numels).sqrt().clamp(min=1.0) / (1.0 - beta1**step)
        root = math.sqrt(1.0 - beta2**step)
        for each in views:
            decay(group, each)
            direction = torch.atan2(each.state["exp_avg"], each.state["exp_avg_sq"].sqrt().div_(root))
            each.weight.sub_(direction * rates[each.index])
