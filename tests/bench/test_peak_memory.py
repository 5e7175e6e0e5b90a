"""Peak memory of a process."""

from __future__ import annotations

import numpy as np

from ringattn.bench.memory import PeakMemory

SIZE = 64 << 20  # bytes


def test_memory_that_was_freed_again_counts_once() -> None:
    np.ones(SIZE, np.uint8)  # an earlier peak, which does not count
    peak = PeakMemory()
    for _ in range(3):
        np.ones(SIZE, np.uint8)
    assert 0.95 * SIZE < peak.growth() < 1.25 * SIZE  # other pages may be given back meanwhile
    assert peak.highest() > peak.growth()


def test_an_earlier_peak_does_not_count() -> None:
    np.ones(SIZE, np.uint8)
    assert PeakMemory().growth() < SIZE / 4
