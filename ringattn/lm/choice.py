"""What rank 0 decides for all ranks while a text is generated: each token, and whether there is another one."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..transport.consensus import Fields, agree, raise_on_all_ranks
from ..transport.interface import Transport

# What ranks call, one for each kind of turn: a rank that has left a text early is never taken to be still in it.
BEGIN = "stream_generate"
ROUND = "a round of stream_generate's prompt"
NEXT = "the next token of stream_generate"

Sampler = Callable[[mx.array], mx.array]


def agreed(ring: Transport, what: str, fields: Fields = (), told: np.ndarray | None = None) -> np.ndarray:
    """Agree with the other ranks; the int32 numbers that rank 0 `told`."""
    payload = [] if told is None else [memoryview(told.tobytes())]
    with ring.call(what):
        return np.frombuffer(agree(ring, what, fields, payload=payload)[0], np.int32)


class StoppedError(Exception):
    """The text ends in the middle of its prompt."""


class Choice:
    """What rank 0 decides for all: each token, and whether there is to be another one.

    Attributes:
        ended: Whether the text has ended before its time.
    """

    def __init__(
        self,
        ring: Transport,
        sampler: Sampler,
        stopped: Callable[[], bool] | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.ended = False
        self._ring = ring
        self._sampler = sampler
        self._stopped = stopped
        self._progress = progress

    def token(self, logprobs: mx.array) -> mx.array:
        """Rank 0's sample ``[1]``, on every rank."""
        own: np.ndarray | None = None
        if self._ring.rank == 0:
            with raise_on_all_ranks(self._ring, NEXT):
                sample = self._sampler(logprobs).reshape(1).item()
                own = np.array([sample, self._end()], np.int32)
        token, ended = agreed(self._ring, NEXT, told=own).tolist()
        self.ended = bool(ended)
        return mx.array([token], mx.int32)

    def progress(self, done: int, total: int) -> None:
        """mlx-lm's call after each round of prefill: the place to end it. The call at the end of all is told too."""
        own: np.ndarray | None = None
        with raise_on_all_ranks(self._ring, ROUND):
            if self._progress is not None:
                self._progress(done, total)
            if self._ring.rank == 0:
                own = np.array([done < total and self._end()], np.int32)
        if agreed(self._ring, ROUND, told=own)[0]:
            raise StoppedError

    def _end(self) -> bool:
        return self._stopped is not None and bool(self._stopped())
