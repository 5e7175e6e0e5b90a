"""Accumulators of the results of travelling tokens. Results follow their tokens one hop behind.

At each rank a result arrives, this rank's part is added in place, and the sum goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.arrays import view
from ..core.intervals import Spans, indices, length, tokens_at
from ..core.online_softmax import State, merge_states
from ..tracing.spans import RESULTS
from ..transport.interface import Direction, Signal, Transfer, Transport
from .blocks import Block, copy_tokens
from .relay import Slots
from .schedule import Schedule

TAGS = RESULTS  # the first tag of results; the tag of a block is its hop
ROWS = 1024  # tokens merged at a time, to bound the memory

Arrays = Sequence[mx.array]


@dataclass(frozen=True)
class Accumulator:
    """Operations on one kind of results (states or gradients): float32 arrays whose third axis is the tokens.

    Attributes:
        zeros: A function that makes the neutral arrays of a number of tokens.
        merge: A function that adds the second arrays to the first, in place: NumPy arrays of the same tokens.
    """

    zeros: Callable[[int], Arrays]
    merge: Callable[[Sequence[Any], Sequence[Any]], None]

    def block(self, arrays: Arrays, spans: Spans) -> Block:
        """Make a block of `arrays` with the tokens at `spans`. It can be sent and added to."""
        return Block(tuple(map(mx.contiguous, arrays)), (2,) * len(arrays), spans)

    def expand(self, block: Block | None, spans: Spans) -> Block:
        """Expand `block` to the tokens at `spans`, which include its own. The other tokens get zeros."""
        if block is not None and block.spans == spans:
            return block
        whole = self.block(self.zeros(length(spans)), spans)
        mx.eval(whole.arrays)
        if block is not None:
            mx.eval(block.arrays)
            for into, x in zip(whole.arrays, block.arrays):
                copy_tokens(view(x), block.spans, view(into), spans, 2, block.spans)
        return whole

    def add(self, into: Block, part: Block) -> None:
        """Add `part` to `into`, whose tokens include its own."""
        mx.eval(into.arrays, part.arrays)
        whole, added = ([view(x) for x in block.arrays] for block in (into, part))
        starts = zip(part.spans, indices(part.spans, into.spans), indices(part.spans, part.spans))
        for span, at, start in starts:
            stop = start + length((span,))
            for first in range(start, stop, ROWS):
                last = min(first + ROWS, stop)
                here = tokens_at(2, at + first - start, at + last - start)
                self.merge([x[here] for x in whole], [x[tokens_at(2, first, last)] for x in added])


def add_sums(into: Sequence[np.ndarray], part: Sequence[np.ndarray]) -> None:
    """Merge running sums."""
    for x, y in zip(into, part):
        x += y


def add_states(into: Sequence[np.ndarray], part: Sequence[np.ndarray]) -> None:
    """Merge states."""
    with np.errstate(all="ignore"):  # an infinite score needs no warning
        merged = merge_states(State(*into), State(*part))
    for x, y in zip(into, merged):
        x[:] = y


class ResultHop:
    """Results that one hop receives, adds to and sends on."""

    def __init__(self, direction: Direction, slots: Slots, spans: Spans, tag: int, wanted: Spans):
        """Post the receive of the results at `spans` under `tag`. The results at `wanted` go on."""
        self._allowed = Signal()
        self.arrival = slots.recv(direction, spans, tag, [self._allowed])
        self.wanted = wanted
        self.sent: Transfer | None = None
        self._added = Signal()
        self._loads = list[Callable]()

    def allow_receive(self) -> None:
        """Allow the receive to start. Call it when this rank has done the hop before: then the sender may have too."""
        self._allowed.open()

    def send(self, direction: Direction, tag: int) -> None:
        """Post the send. It starts with `send_total`."""
        self.sent = direction.send(lambda: self._loads.pop()(), tag=tag, after=(self._added,))
        if self.arrival.users is not None:
            self.arrival.users.append(self.sent)

    def send_total(self, total: Block) -> None:
        """Start the send of `total`."""
        self._loads.append(total.load(self.wanted))
        self._added.open()

    def total(self, accumulator: Accumulator, added: Block | None) -> Block:
        """Sum the results that arrived and those that this rank `added`.

        The sum reuses the memory of one of them where it has all tokens.
        """
        parts = [self.arrival.block] if self.arrival.transfer is not None else []
        parts += [] if added is None else [added]
        parts.sort(key=lambda block: block.spans != self.wanted)
        total = accumulator.expand(parts[0] if parts else None, self.wanted)
        for part in parts[1:]:
            accumulator.add(total, part)
        return total


def post_results(ring: Transport, schedule: Schedule, accumulator: Accumulator) -> list[ResultHop]:
    """Post all messages of the results: one for each hop, and at the end the one that returns home."""
    direction = Direction(ring, schedule.step)
    slots = Slots(
        accumulator.block(accumulator.zeros(1), ((0, 1),)), [*(hop.returning for hop in schedule.hops), schedule.home]
    )
    results = []
    for h, hop in enumerate(schedule.hops):
        result = ResultHop(direction, slots, hop.returning, TAGS + h - 1, hop.state if h else schedule.own)
        if h and hop.state:
            result.send(direction, TAGS + h)
        results.append(result)
    return [*results, ResultHop(direction, slots, schedule.home, TAGS + ring.size - 1, schedule.own)]
