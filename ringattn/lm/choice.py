"""Decisions of rank 0 for all ranks during generation: each token, and whether another one follows."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..transport.consensus import Fields, agree, raise_on_all_ranks
from ..transport.interface import Transport

# Names of the collective calls, one for each kind of turn, so that a rank that left a text early is noticed.
BEGIN = "stream_generate"
ROUND = "a round of stream_generate's prompt"
NEXT = "the next token of stream_generate"

Sampler = Callable[[mx.array], mx.array]


def agreed(ring: Transport, what: str, fields: Fields = (), own: np.ndarray | None = None) -> np.ndarray:
    """Agree with the other ranks; return the int32 numbers that rank 0 gave as `own`."""
    payload = [] if own is None else [memoryview(own.tobytes())]
    with ring.call(what):
        return np.frombuffer(agree(ring, what, fields, payload=payload)[0], np.int32)


class StoppedError(Exception):
    """Raised where rank 0 ends a text before all of its prompt is read."""


class Choice:
    """Decisions of rank 0 for all ranks: each token, and whether another one follows.

    Attributes:
        ended: Whether `stopped` has ended the text.
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
        """Sample on rank 0; return the token ``[1]`` on every rank.

        Every rank evaluates `logprobs`, because rank 0 may need the other ranks of its row for it. On one rank the
        token stays lazy: mlx-lm starts the work on the next one before it reads this one.
        """
        if self._ring.size == 1:
            token = self._sampler(logprobs).reshape(1).astype(mx.int32)
            self.ended = self._end()
            return token
        own: np.ndarray | None = None
        with raise_on_all_ranks(self._ring, NEXT):
            mx.eval(logprobs)
        if self._ring.rank == 0:
            with raise_on_all_ranks(self._ring, NEXT):
                sample = self._sampler(logprobs).reshape(1).item()
                own = np.array([sample, self._end()], np.int32)
        token, ended = agreed(self._ring, NEXT, own=own).tolist()
        self.ended = bool(ended)
        return mx.array([token], mx.int32)

    def progress(self, done: int, total: int) -> None:
        """Handle mlx-lm's call after each round of prefill, also the last one. StoppedError ends the text."""
        own: np.ndarray | None = None
        with raise_on_all_ranks(self._ring, ROUND):
            if self._progress is not None:
                self._progress(done, total)
            if self._ring.rank == 0:
                own = np.array([done < total and self._end()], np.int32)
        if agreed(self._ring, ROUND, own=own)[0]:
            raise StoppedError

    def _end(self) -> bool:
        return self._stopped is not None and bool(self._stopped())
