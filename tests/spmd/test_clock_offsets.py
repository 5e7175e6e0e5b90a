"""Offsets between the clocks of ranks, measured through a ring: one rank's clock is wrong by a known time."""

from __future__ import annotations

import time

import pytest

from ringattn.transport import trace_file

AHEAD = 1000.0  # s


@pytest.mark.parametrize("hosts", ["one", "several"])
def test_a_wrong_clock_is_measured(ring, monkeypatch, hosts):
    if hosts == "several":
        monkeypatch.setattr(ring, "hosts", tuple(f"mac{rank}" for rank in range(ring.size)))
        if ring.rank == ring.size - 1:
            now = time.time
            monkeypatch.setattr(trace_file.time, "time", lambda: now() + AHEAD * (ring.size > 1))
    offsets = trace_file.measure_offsets(ring)
    assert len(offsets) == ring.size
    for rank, offset in enumerate(offsets):
        wrong = hosts == "several" and rank == ring.size - 1 and ring.size > 1
        assert abs(offset.seconds - AHEAD * wrong) <= offset.error <= 1.0
        assert (offset.error == 0) == (rank == 0 or hosts == "one")
