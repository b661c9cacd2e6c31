"""Contenders timed in rotation in one process, so that a noisy machine is noisy for all of them
alike.

A ratio is the median over pairs taken next to each other, never a quotient of two separate runs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

PAIRS = 15


def interleaved(
    contenders: dict[str, Callable[[], object]],
    pairs: int = PAIRS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every contender in every rotation, by `clock`; one rotation warms up.

    Every rotation has an order of its own, drawn by a fixed seed: who comes first leaves its
    successor the caches and the allocator, and must not always be the same.
    """
    order, names = random.Random(0), list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for rotation in range(pairs + 1):
        for name in order.sample(names, len(names)):
            start = clock()
            contenders[name]()
            if rotation:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median of `name` over `base`, pair by pair."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def report(
    benchmark, times: dict[str, list[float]], name: str, base: str | None = None, **extra
) -> None:
    """Hands the durations of one contender, measured in rotation with its group, to
    pytest-benchmark's table.
    """
    if benchmark.disabled:
        return
    stats = benchmark._make_stats(1)
    for seconds in times[name]:
        stats.update(seconds)
    benchmark.extra_info.update(extra)
    if base is not None:
        benchmark.extra_info.update(
            {f"ratio_to_{other}": ratio(times, name, other) for other in times if other != name}
        )
