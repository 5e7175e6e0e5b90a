"""The trace of a ring as a file: what ``--trace`` and the variable ``RINGATTN_TRACE`` switch on.

Every rank records its events in memory. When the ring is closed, all ranks give theirs to rank 0, which writes the
files. If the ring broke, each rank writes its own events beside them, into NAME.rankN.SUFFIX, so that the last spans
before the failure can be read.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import RingAttentionError
from ..tracing.clocks import Offset, estimate_offsets, to_first_clock
from ..tracing.files import VARIABLE, split_names, write
from ..tracing.spans import Event, Recorder
from ..tracing.tracks import Track
from .base import Ring
from .consensus import agree
from .interface import Transport

MOST = 200_000  # events that a rank keeps, the latest: about 40 MB
ROUNDS = 24  # of messages that align the clocks
CALL = "trace"

_TIMES = struct.Struct("<dd")  # when this rank began this round, and when it had ended the round before
_opened = 0  # traces of this process
AnyRing = TypeVar("AnyRing", bound=Ring)


def traced(ring: AnyRing) -> AnyRing:
    """Begin a trace of a new `ring` if the environment asks for one. Collective then."""
    global _opened
    paths = split_names(os.environ.get(VARIABLE, ""))
    if paths and isinstance(ring, Transport):
        _opened += 1
        number = "" if _opened == 1 else f".{_opened}"
        TraceFile(ring, [path.with_stem(path.stem + number) for path in paths]).start()
    return ring


class TraceFile:
    """Trace of a ring, which rank 0 writes to `paths` when the ring is closed."""

    def __init__(self, ring: Transport, paths: Sequence[Path]):
        self._ring = ring
        self._paths = paths
        self._events: deque[tuple] = deque(maxlen=MOST)
        self._recorder = Recorder(self._events, plain=True)
        self._offsets: list[list[Offset]] = []  # of all ranks: measured in the beginning and in the end

    def start(self) -> None:
        """Align the clocks and begin to record. Collective."""
        agree(self._ring, CALL)
        self._offsets.append(measure_offsets(self._ring))
        self._ring.finish_trace = self.finish
        self._ring.tracer = self._recorder

    def finish(self) -> None:
        """Collect the events of all ranks and write the files. Collective. Errors are printed and not raised."""
        ring = self._ring
        ring.finish_trace = lambda: None  # the ring may be closed twice
        events = list(self._events)  # without those of the rounds below
        dropped = self._recorder.added - len(events)
        try:
            with ring.call(CALL):
                tracks = self._collect(events, dropped)
        except (RingAttentionError, RuntimeError):  # the ring broke, and says so elsewhere
            _save([self._track(ring.rank, dropped, events)], self._paths, f".rank{ring.rank}")
            return
        if tracks:
            _save(tracks, self._paths)

    def _collect(self, events: list[tuple], dropped: int) -> list[Track]:
        """Tracks of all ranks on rank 0; none elsewhere."""
        self._offsets.append(measure_offsets(self._ring))
        packed = zlib.compress(json.dumps([dropped, events]).encode(), 1)
        replies = agree(self._ring, CALL, payload=[memoryview(packed)])
        if self._ring.rank:
            return []
        found = [json.loads(zlib.decompress(bytes(reply))) for reply in replies]
        return [self._track(rank, dropped, events) for rank, (dropped, events) in enumerate(found)]

    def _track(self, rank: int, dropped: int, fields: Sequence[Sequence]) -> Track:
        """Track of a rank on the clock of rank 0, from the fields of its events."""
        events = [Event(*one) for one in fields]
        offsets = [of_all[rank] for of_all in self._offsets]
        shifted = [
            e._replace(start=to_first_clock(e.start, offsets), stop=to_first_clock(e.stop, offsets)) for e in events
        ]
        return Track(rank, self._ring.hosts[rank], shifted, max(offset.error for offset in offsets), dropped)


def measure_offsets(ring: Transport) -> list[Offset]:
    """Offsets of all ranks' clocks from rank 0's, the same on all ranks. Collective; see `tracing.clocks`.

    The ranks of one host have one clock.
    """
    sent: list[list[float]] = []
    done: list[list[float]] = []
    ended = 0.0
    for _ in range(ROUNDS + 1):
        replies = ring.exchange([memoryview(_TIMES.pack(time.time(), ended))])
        ended = time.time()
        times = [_TIMES.unpack(reply) for reply in replies]
        sent.append([began for began, _ in times])
        done.append([end for _, end in times])
    offsets = estimate_offsets(sent[:-1], done[1:])
    return [
        offset._replace(seconds=0.0, error=0.0) if host == ring.hosts[0] else offset
        for offset, host in zip(offsets, ring.hosts)
    ]


def _save(tracks: Sequence[Track], paths: Sequence[Path], part: str = "") -> None:
    for path in paths:
        path = path.with_stem(path.stem + part)
        try:
            write(tracks, path)
        except (OSError, ImportError) as error:
            print(f"ringattn: trace: {path} cannot be written: {error}", file=sys.stderr, flush=True)
