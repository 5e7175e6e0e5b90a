"""Timing of calls in turn, with the median as the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median


def turns(calls: Mapping[str, Callable[[], object]], repeats: int, pause: float = 0.0) -> dict[str, list[float]]:
    """Time each call `repeats` times, in seconds.

    The calls take turns, so that other work on the machine affects all of them alike. `pause` seconds pass before each
    call: the threads of a library may spin for some time after its call, and keep a core from the next one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(pause)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(calls: Mapping[str, Callable[[], object]], repeats: int, pause: float = 0.0) -> dict[str, float]:
    """Median seconds of each call; see `turns`."""
    return {name: median(times) for name, times in turns(calls, repeats, pause).items()}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Interval that holds the median of the population with a probability of about 95 %.

    Its ends are two of the values: their ranks are the quantiles of a binomial distribution, approximated by a normal
    one (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    values = sorted(values)
    reach = 1.96 * math.sqrt(len(values)) / 2
    low = max(0, math.floor(len(values) / 2 - reach))
    high = min(len(values) - 1, math.ceil(len(values) / 2 + reach))
    return values[low], values[high]
