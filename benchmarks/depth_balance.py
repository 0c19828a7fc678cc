"""How evenly ranks work when every micro-batch has a depth of its own: dealt, in order, or one depth for all.

At ZeRO stages 2 and 3 ranks meet at every micro-batch, not once a step. E[max over ranks] / mean of a step's cost,
in FLOPs of the published 3.5 B model with recomputed iterations.
    python -m benchmarks.depth_balance
"""

from __future__ import annotations

import numpy as np

from benchmarks.harness import arguments, machine, publish
from pipeline.config import load_config
from pipeline.depth import DepthSchedule, deal
from pipeline.flops import sequence_flops
from pipeline.forecast import waiting

WORLDS = (8, 64, 512, 4096)
SHARES = (1, 2, 4, 8, 16)


def main() -> None:
    options = arguments(__doc__ or "", steps=40)
    config = load_config("huginn-3.5b")
    schedule = DepthSchedule(config.depth, config.seed)
    flops = sequence_flops(config.model, config.train.activation_checkpointing)

    def drawn(step: int, ranks: int, share: int) -> dict[str, float]:
        costs = np.array([flops.training(depth) for depth in schedule.balanced(step, ranks * share)])
        dealt = costs[np.array(deal(costs.tolist(), ranks))]
        return {
            "balanced": waiting(dealt, every_micro_batch=False),
            "balanced, stages 2 and 3": waiting(dealt, every_micro_batch=True),
            "in order": waiting(costs.reshape(ranks, share), every_micro_batch=False),
        }

    table, record = [], {}
    for ranks in WORLDS:
        for share in SHARES:
            steps = [drawn(step, ranks, share) for step in range(options.steps)]
            found = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]} | {"lockstep": 1.0}
            record[f"{ranks}x{share}"] = found
            table.append([ranks, share, *(f"{value:.3f}" for value in found.values())])
    title = f"E[max] / mean of the ranks' FLOPs in a step, over {options.steps} steps"
    header = ("ranks", "micro-batches a rank", "balanced", "stages 2 and 3", "in order", "lockstep")
    publish(options.out, title, header, table, {"machine": machine(), "ratios": record})


if __name__ == "__main__":
    main()
