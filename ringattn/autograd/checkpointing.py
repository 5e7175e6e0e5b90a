"""Results that recomputation need not make again: attention's `out` and lse are kept, everything else is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

from ..errors import RingAttentionError

Arrays = Sequence[mx.array]


class Tape:
    """The results of the attention calls of one function, in order: written when it is first run, then read."""

    def __init__(self) -> None:
        self._results: list[Arrays] = []
        self._next: int | None = None  # None: recording

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the results of the calls inside."""
        self._results, self._next = [], None
        with self._current():
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give the calls inside the results that were kept, and run none of them."""
        self._next = 0
        with self._current():
            yield

    @contextmanager
    def _current(self) -> Iterator[None]:
        before = _tape.set(self)
        try:
            yield
        finally:
            _tape.reset(before)

    def pass_through(self, compute: Callable[..., Arrays], arrays: Arrays) -> Arrays:
        """The results of one call: computed and kept, or those that were kept."""
        if self._next is None:
            self._results.append(compute(*arrays))
            return self._results[-1]
        if self._next == len(self._results):
            raise RingAttentionError("checkpoint: the function makes more attention calls when it is run again")
        self._next += 1
        return self._results[self._next - 1]


_tape: ContextVar[Tape | None] = ContextVar("ringattn_tape", default=None)


def kept(compute: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """`compute`, or while a `Tape` is recording or replaying what that makes of it."""

    def through(*arrays: mx.array) -> Arrays:
        tape = _tape.get()
        return compute(*arrays) if tape is None else tape.pass_through(compute, arrays)

    return through
