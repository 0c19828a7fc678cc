"""Being at any sample of a run: how long the order takes from nothing, at sample 10^3 and at sample 10^12.

For comparison the usual way, an index array shuffled at the start of an epoch (numpy's permutation of as many rows).
    python -m benchmarks.data_order
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.harness import arguments, in_turn, machine, median, publish
from pipeline.mixture import Change, Mixture, Source

ROWS = 244_140_625  # 1 T tokens in rows of 4,096
BATCH = 4096


def main() -> None:
    options = arguments(__doc__ or "", rounds=7, shuffled_rows=20_000_000)
    weights = np.random.default_rng(0).random(100).tolist()
    kinds: dict[str, Callable[[], Mixture]] = {
        "one dataset": lambda: Mixture([Source("all", ROWS)], 1),
        "7 : 2 : 1": lambda: Mixture([Source(str(i), ROWS, weight) for i, weight in enumerate((7.0, 2.0, 1.0))], 1),
        "100 datasets, random weights": lambda: Mixture(
            [Source(str(i), ROWS // 100, weight) for i, weight in enumerate(weights)], 1
        ),
        "the same, two changes, limits": lambda: Mixture(
            [Source(str(i), ROWS // 100, weight, 10**9 if i < 3 else None) for i, weight in enumerate(weights)],
            1,
            [Change(10**6, {"5": 3.0}), Change(10**9, {"6": 3.0})],
        ),
    }
    cases = {
        f"{kind}|{count}|{sample}": seek(make, sample, count)
        for kind, make in kinds.items()
        for count in (1, BATCH)
        for sample in (10**3, 10**12)
    }
    cases[f"numpy permutation of {options.shuffled_rows:,} rows"] = lambda: shuffle(options.shuffled_rows)
    results = in_turn(cases, options.rounds)
    table = [[*name.split("|"), *[""] * (2 - name.count("|")), f"{median(s) * 1e3:.1f}"] for name, s in results.items()]
    title = "From nothing to the rows of the samples that follow (construction included)"
    record = {"machine": machine(), "seconds": results}
    publish(options.out, title, ("order", "samples", "from sample", "ms"), table, record)


def seek(make: Callable[[], Mixture], sample: int, count: int) -> Callable[[], float]:
    def case() -> float:
        started = time.perf_counter()
        make().locate(sample + np.arange(count))
        return time.perf_counter() - started

    return case


def shuffle(rows: int) -> float:
    started = time.perf_counter()
    np.random.default_rng(0).permutation(rows)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
