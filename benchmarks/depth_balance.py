"""How evenly ranks work when every micro-batch has a depth of its own: dealt, in order, or one depth for all.

At ZeRO stages 2 and 3 ranks meet at every micro-batch, not once a step. E[max over ranks] / mean of a step's cost,
in FLOPs of the published 3.5 B model with recomputed iterations.
    python -m benchmarks.depth_balance
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.harness import arguments, machine, publish
from pipeline.config import load_config
from pipeline.depth import DepthSchedule, deal
from pipeline.flops import sequence_flops

WORLDS = (8, 64, 512, 4096)
SHARES = (1, 2, 4, 8, 16)


def main() -> None:
    options = arguments(__doc__ or "", steps=40)
    config = load_config("huginn-3.5b")
    schedule = DepthSchedule(config.depth, config.seed)
    flops = sequence_flops(config.model, recomputes=config.train.checkpoint_iterations)

    def ratio(ranks: int, share: int, loads_of: Callable[[list[float]], list[float]]) -> float:
        ratios = []
        for step in range(options.steps):
            loads = loads_of([flops.training(depth) for depth in schedule.balanced(step, ranks * share)])
            ratios.append(max(loads) / np.mean(loads))
        return float(np.mean(ratios))

    table, record = [], {}
    for ranks in WORLDS:
        for share in SHARES:

            def dealt(costs: list[float], ranks: int = ranks) -> list[float]:
                return [sum(costs[item] for item in hand) for hand in deal(costs, ranks)]

            def in_order(costs: list[float], share: int = share) -> list[float]:
                return [sum(costs[start : start + share]) for start in range(0, len(costs), share)]

            def dealt_and_met(costs: list[float], ranks: int = ranks) -> list[float]:
                hands = np.array(costs)[np.array(deal(costs, ranks))]
                return [float(hands.max(axis=0).sum()), *hands.sum(axis=1)[1:].tolist()]

            found = {
                "balanced": ratio(ranks, share, dealt),
                "balanced, stages 2 and 3": ratio(ranks, share, dealt_and_met),
                "in order": ratio(ranks, share, in_order),
                "lockstep": 1.0,
            }
            record[f"{ranks}x{share}"] = found
            table.append([ranks, share, *(f"{value:.3f}" for value in found.values())])
    title = f"E[max] / mean of the ranks' FLOPs in a step, over {options.steps} steps"
    header = ("ranks", "micro-batches a rank", "balanced", "stages 2 and 3", "in order", "lockstep")
    publish(options.out, title, header, table, {"machine": machine(), "ratios": record})


if __name__ == "__main__":
    main()
