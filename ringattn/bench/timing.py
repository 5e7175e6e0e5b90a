"""Timing of calls in turn, with the median as the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
