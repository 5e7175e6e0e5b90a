"""Alignment of clocks, on simulated rounds whose true offsets are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn.tracing.clocks import Offset, estimate_offsets, to_first_clock


def rounds(offsets: np.ndarray, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Times at which ranks began and ended rounds, by their own clocks, with random delays of every message."""
    size = len(offsets)
    now = 100.0
    sent, done = [], []
    for _ in range(count):
        begin = now + random.exponential(1e-4, size)
        delays = random.exponential(2e-4, (size, size))  # of a message from the first to the second
        np.fill_diagonal(delays, 0)
        end = np.maximum((begin[:, None] + delays).max(0), begin)
        sent.append(begin + offsets)
        done.append(end + offsets)
        now = end.max()
    return np.array(sent), np.array(done)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_the_true_offset_is_within_the_error(size: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    true = random.normal(0, 10, size)
    found = estimate_offsets(*rounds(true, count, random))
    for rank, offset in enumerate(found):
        assert abs(offset.seconds - (true[rank] - true[0])) <= offset.error + 1e-9


def test_more_rounds_narrow_the_error() -> None:
    true = np.array([0.0, 5.0])
    few, many = (estimate_offsets(*rounds(true, n, np.random.default_rng(0)))[1] for n in (1, 50))
    assert many.error < few.error < 2e-3


@pytest.mark.parametrize(
    ("time", "expected"), [(100.0, 98.0), (200.0, 197.0), (150.0, 147.5), (50.0, 48.0), (300.0, 297.0)]
)
def test_clocks_drift_evenly_between_two_measurements(time: float, expected: float) -> None:
    offsets = [Offset(100.0, 2.0, 0.1), Offset(200.0, 3.0, 0.1)]
    assert to_first_clock(time, offsets) == pytest.approx(expected)


def test_one_measurement_is_enough() -> None:
    assert to_first_clock(50.0, [Offset(100.0, 2.0, 0.1)]) == 48.0
