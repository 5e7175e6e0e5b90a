"""Collective helpers of benchmarks on a ring: what all ranks measured, calls that all ranks end together, traces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..tracing.spans import Event, Recorder
from ..transport.interface import Transport


def of_all(ring: Transport, figures: Mapping[str, float]) -> dict[str, list[float]]:
    """Collect each figure of all ranks, in rank order. Collective."""
    replies = ring.exchange([memoryview(json.dumps(dict(figures)).encode())])
    found = [json.loads(bytes(reply)) for reply in replies]
    return {name: [one[name] for one in found] for name in figures}


def together(ring: Transport, call: Callable[[], Any]) -> Callable[[], None]:
    """Include the wait for the last rank in `call`, so that the next call does not include it."""

    def timed() -> None:
        call()
        ring.barrier()

    return timed


@contextmanager
def recorded(ring: Transport) -> Iterator[list[Event]]:
    """Record this rank's events of the body, in the place of any other trace."""
    events: list[Event] = []
    before = ring.tracer
    ring.tracer = Recorder(events)
    try:
        yield events
    finally:
        ring.tracer = before
