"""Traces in the JSON of Chrome's tracing, which https://ui.perfetto.dev and chrome://tracing show.

Format: "Trace Event Format" of the Chromium project. Each rank is a process. Its threads are its work ("main": calls,
and in them computation and waits), its sends and its receives. Spans of one thread must not overlap, so transfers that
do have further threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .spans import RESULTS, Event
from .tracks import Track, lanes

LANES = 64  # threads of one kind at most
_THREADS = {"main": 1, "send": 100, "receive": 200}  # name: number of its first thread
_TRANSFERS = {"send": "send", "recv": "receive"}  # kind of an event: name of its thread


def to_json(tracks: Sequence[Track]) -> dict[str, Any]:
    """Convert tracks to the object that the file holds. Times are in microseconds since the first event."""
    zero = min((event.start for track in tracks for event in track.events), default=0.0)
    return {
        "traceEvents": [event for track in tracks for event in _of_rank(track, zero)],
        "displayTimeUnit": "ms",
        "otherData": {
            "start_unix_s": zero,
            "largest_clock_error_us": {track.rank: round(1e6 * track.clock_error, 1) for track in tracks},
            "dropped_events": {track.rank: track.dropped for track in tracks},
        },
    }


def _of_rank(track: Track, zero: float) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", track.rank, 0, name=f"rank {track.rank} ({track.host})")
    yield _metadata("process_sort_index", track.rank, 0, sort_index=track.rank)
    for name, first in _THREADS.items():
        events = sorted((e for e in track.events if _TRANSFERS.get(e.kind, "main") == name), key=lambda e: e.start)
        chosen = lanes(events) if name in _TRANSFERS.values() else [0] * len(events)
        for lane in range(min(LANES, max(chosen, default=0) + 1)):
            yield _metadata("thread_name", track.rank, first + lane, name=f"{name} {lane + 1}" if lane else name)
        for event, lane in zip(events, chosen):
            yield _span(event, track.rank, first + lane % LANES, zero)


def _span(event: Event, rank: int, thread: int, zero: float) -> dict[str, Any]:
    about = {"bytes": event.bytes, "call": event.call, "strategy": event.strategy}
    if event.kind not in ("call", "exchange"):
        about["hop"] = event.hop % RESULTS
    return {
        "ph": "X",
        "name": name_of(event),
        "cat": event.kind,
        "pid": rank,
        "tid": thread,
        "ts": round(1e6 * (event.start - zero), 3),
        "dur": round(1e6 * (event.stop - event.start), 3),
        "args": {key: value for key, value in about.items() if value != ""},
    }


def name_of(event: Event) -> str:
    """Short name of a span."""
    if event.kind == "call":
        return f"{event.call} {event.strategy}".strip()
    if event.kind == "exchange":
        return "exchange"
    what = "result of hop" if event.hop >= RESULTS else "hop"
    return f"{event.kind}: {what} {event.hop % RESULTS}"


def _metadata(kind: str, rank: int, thread: int, **about: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": about}
