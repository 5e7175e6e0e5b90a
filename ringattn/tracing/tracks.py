"""Tracks: the events of each rank, on one clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .spans import Event


@dataclass(frozen=True)
class Track:
    """Events of one rank.

    Attributes:
        rank: Number of the rank.
        host: Name of its host.
        events: Events, on the clock of rank 0.
        clock_error: Largest error of the alignment in seconds.
        dropped: Number of earlier events that were not kept.
    """

    rank: int
    host: str
    events: Sequence[Event]
    clock_error: float = 0.0
    dropped: int = 0


def lanes(events: Iterable[Event]) -> list[int]:
    """Lane of each event, so that events which overlap in time have different lanes. `events` are ordered by start."""
    busy_until: list[float] = []
    chosen = []
    for event in events:
        free = [lane for lane, stop in enumerate(busy_until) if stop <= event.start]
        lane = free[0] if free else len(busy_until)
        busy_until[lane : lane + 1] = [event.stop]
        chosen.append(lane)
    return chosen


def within(events: Iterable[Event], start: float, stop: float) -> list[Event]:
    """Parts of `events` between two times, ordered by their start."""
    cut = [event._replace(start=max(event.start, start), stop=min(event.stop, stop)) for event in events]
    return sorted((event for event in cut if event.start < event.stop), key=lambda event: event.start)
