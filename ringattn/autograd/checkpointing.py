"""Results of attention kept for recomputation. A checkpoint keeps `out` and lse, and recomputes everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

from ..errors import RingAttentionError

Arrays = Sequence[mx.array]


class ResultRecord:
    """Results of the attention calls of one function, in order. The first run records them, later runs read them."""

    def __init__(self) -> None:
        self._results: list[Arrays] = []
        self._next: int | None = None  # None while recording

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the results of the calls inside."""
        self._results = []
        self._next = None
        with self._current():
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Return the recorded results from the calls inside, without running them."""
        self._next = 0
        with self._current():
            yield

    @contextmanager
    def _current(self) -> Iterator[None]:
        before = _record.set(self)
        try:
            yield
        finally:
            _record.reset(before)

    def results_of(self, compute: Callable[..., Arrays], arrays: Arrays) -> Arrays:
        """Return the results of one call: compute and record them, or read the record."""
        if self._next is None:
            self._results.append(compute(*arrays))
            return self._results[-1]
        if self._next == len(self._results):
            raise RingAttentionError("checkpoint: the function makes more attention calls when it is run again")
        self._next += 1
        return self._results[self._next - 1]


_record: ContextVar[ResultRecord | None] = ContextVar("ringattn_record", default=None)


def record_or_replay(compute: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Wrap `compute` so that an active `ResultRecord` records or replays its results."""

    def recorded(*arrays: mx.array) -> Arrays:
        record = _record.get()
        return compute(*arrays) if record is None else record.results_of(compute, arrays)

    return recorded
