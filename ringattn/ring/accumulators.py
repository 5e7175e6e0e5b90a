"""What comes of tokens that travel, one hop behind them: it arrives, is added to in place, and goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.arrays import view
from ..core.intervals import Spans, length, locate, tokens_at
from ..core.online_softmax import State, merge_states
from ..transport.base import Gate, Ring, Transfer, Way
from .blocks import Block, copy_tokens
from .buffers import Slots
from .schedule import Schedule

TAGS = 4096  # tags of results; those of blocks are their hop
ROWS = 1024  # tokens that are merged at once: this bounds the memory that it takes

Arrays = Sequence[mx.array]


@dataclass(frozen=True)
class Kind:
    """One kind of results: some float32 arrays whose third axis is the tokens.

    Attributes:
        nothing: Those of so many tokens to which nothing was added.
        merge: Adds to the first, in place, what is the second: NumPy arrays of the same tokens.
    """

    nothing: Callable[[int], Arrays]
    merge: Callable[[Sequence[Any], Sequence[Any]], None]

    def block(self, arrays: Arrays, spans: Spans) -> Block:
        """`arrays`, of the tokens at `spans`, as they can be sent and added to."""
        return Block(tuple(map(mx.contiguous, arrays)), (2,) * len(arrays), spans)

    def over(self, block: Block | None, spans: Spans) -> Block:
        """`block` as one of the tokens at `spans`, which include its own; nothing for the others."""
        if block is not None and block.spans == spans:
            return block
        whole = self.block(self.nothing(length(spans)), spans)
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
        for span in part.spans:
            ((at, _),), ((start, stop),) = locate((span,), into.spans), locate((span,), part.spans)
            for first in range(start, stop, ROWS):
                last = min(first + ROWS, stop)
                here = tokens_at(2, at + first - start, at + last - start)
                self.merge([x[here] for x in whole], [x[tokens_at(2, first, last)] for x in added])


def add_sums(into: Sequence[np.ndarray], part: Sequence[np.ndarray]) -> None:
    """The `merge` of running sums."""
    for x, y in zip(into, part):
        x += y


def add_states(into: Sequence[np.ndarray], part: Sequence[np.ndarray]) -> None:
    """The `merge` of states."""
    with np.errstate(all="ignore"):  # an infinite score is no matter for a warning
        merged = merge_states(State(*into), State(*part))
    for x, y in zip(into, merged):
        x[:] = y


class Returning:
    """The results that one hop adds to: those that come in, and the message that takes them on."""

    def __init__(self, way: Way, slots: Slots, spans: Spans, tag: int, wanted: Spans):
        """Those of the tokens at `spans` come in under `tag`, once they are `due`; those at `wanted` go on."""
        self._due = Gate()
        self.arrival, self.wanted = slots.recv(way, spans, tag, [self._due]), wanted
        self.sent: Transfer | None = None
        self._added, self._loads = Gate(), list[Callable]()

    def due(self) -> None:
        """Say that this rank has done the hop before, so that the one that sends them may have as well."""
        self._due.open()

    def send(self, way: Way, tag: int) -> None:
        """Post the message; it starts once results were `passed` on."""
        self.sent = way.send(lambda: self._loads.pop()(), tag=tag, after=(self._added,))
        if self.arrival.users is not None:
            self.arrival.users.append(self.sent)

    def passed(self, total: Block) -> None:
        """Let `total` go."""
        self._loads.append(total.load(self.wanted))
        self._added.open()

    def total(self, kind: Kind, added: Block | None) -> Block:
        """What has arrived and what this rank `added`, in the memory of one of the two if its tokens are those."""
        parts = [self.arrival.block] if self.arrival.transfer is not None else []
        parts += [] if added is None else [added]
        parts.sort(key=lambda block: block.spans != self.wanted)
        total = kind.over(parts[0] if parts else None, self.wanted)
        for part in parts[1:]:
            kind.add(total, part)
        return total


def post(ring: Ring, schedule: Schedule, kind: Kind) -> list[Returning]:
    """Post all messages of the results: those of each hop, and in the end those that come home."""
    way = Way(ring, schedule.step)
    slots = Slots(kind.block(kind.nothing(1), ((0, 1),)), [*(hop.returning for hop in schedule.hops), schedule.home])
    stops = []
    for h, hop in enumerate(schedule.hops):
        stop = Returning(way, slots, hop.returning, TAGS + h - 1, hop.state if h else schedule.own)
        if h and hop.state:
            stop.send(way, TAGS + h)
        stops.append(stop)
    return [*stops, Returning(way, slots, schedule.home, TAGS + ring.size - 1, schedule.own)]
