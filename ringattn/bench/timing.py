"""How things are timed: by turns, and the median counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def turns(calls: Mapping[str, Callable[[], object]], repeats: int, pause: float = 0.0) -> dict[str, list[float]]:
    """The seconds of each call; the calls take turns, so that a slow spell of the machine hits all alike.

    `pause` seconds go by before each: a library's threads may spin for some time after its call, and take a core from
    whoever comes next.
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
    """The median seconds of each call; see `turns`."""
    return {name: median(times) for name, times in turns(calls, repeats, pause).items()}
