"""Accumulators of the results of travelling tokens. Results follow their tokens one hop behind.

At each rank a result arrives, this rank's part is added in place, and the sum goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.arrays import view
from ..core.intervals import Spans, indices, length, tokens_at
from ..core.online_softmax import State, merge_states
from ..tracing.spans import RESULTS as TAGS
from ..transport.interface import Direction, Links, Signal, Transfer, Transport
from .blocks import Block, copy_tokens, evaluate
from .device_slots import slots_for
from .schedule import Schedule
from .slots import Slots
from .staging import to_host

ROWS = 1024  # tokens merged at a time, to bound the memory

Arrays = Sequence[mx.array]


@dataclass(frozen=True)
class Accumulator:
    """Operations on one kind of results (states or gradients): float32 arrays whose third axis is the tokens.

    Attributes:
        zeros: A function that makes the neutral arrays of a number of tokens.
        merge: A function of two lists of arrays, of NumPy or of MLX, of the same tokens. It returns their sum.
    """

    zeros: Callable[[int], Arrays]
    merge: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]

    def block(self, arrays: Arrays, spans: Spans) -> Block:
        """Make a block of `arrays` with the tokens at `spans`. It can be sent and added to."""
        return to_host(Block(tuple(map(mx.contiguous, arrays)), (2,) * len(arrays), spans))

    def expand(self, block: Block | None, spans: Spans) -> Block:
        """Expand `block` to the tokens at `spans`, which include its own. The other tokens get zeros."""
        if block is not None and block.spans == spans:
            return block
        whole = self.block(self.zeros(length(spans)), spans)
        evaluate(whole.arrays)
        if block is not None:
            evaluate(block.arrays)
            for into, x in zip(whole.arrays, block.arrays):
                copy_tokens(view(x), block.spans, view(into), spans, 2, block.spans)
        return whole

    def add(self, into: Block, part: Block) -> Block:
        """Add `part` to `into`, whose tokens include its own, and return the sum. It may reuse the memory of `into`."""
        evaluate(into.arrays, part.arrays)
        whole, added = ([view(x) for x in block.arrays] for block in (into, part))
        for here, there in shared_tokens(part.spans, into.spans, ROWS):
            cut = [x[here] for x in whole]
            for x, merged in zip(cut, self.merge(cut, [x[there] for x in added])):
                x[:] = merged
        return into

    def sendable(self, total: Block, spans: Spans) -> Block:
        """Make a block that a message can take the tokens at `spans` of a finished `total` from."""
        return total


def shared_tokens(part: Spans, whole: Spans, most: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield the places of the tokens of `part` in `whole`, which includes them, and in `part`, `most` at a time."""
    for span, at, start in zip(part, indices(part, whole), indices(part, part)):
        stop = start + length((span,))
        for first in range(start, stop, most):
            last = min(first + most, stop)
            yield tokens_at(2, at + first - start, at + last - start), tokens_at(2, first, last)


def merge_sums(x: Sequence[Any], y: Sequence[Any]) -> list[Any]:
    """Merge running sums."""
    return [a + b for a, b in zip(x, y)]


def merge_state_arrays(x: Sequence[Any], y: Sequence[Any]) -> State:
    """Merge states."""
    with np.errstate(all="ignore"):  # an infinite score needs no warning
        return merge_states(State(*x), State(*y))


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
        """Start the send of a sendable `total`, and release what arrived."""
        self._loads.append(total.load(self.wanted))
        self._added.open()
        self.arrival.release()

    def total(self, accumulator: Accumulator, added: Block | None) -> Block:
        """Sum the results that arrived and those that this rank `added`.

        The sum reuses the memory of one of them where it has all tokens.
        """
        parts = [self.arrival.block] if self.arrival.transfer is not None else []
        parts += [] if added is None else [added]
        parts.sort(key=lambda block: block.spans != self.wanted)
        total = accumulator.expand(parts[0] if parts else None, self.wanted)
        for part in parts[1:]:
            total = accumulator.add(total, part)
        return total


def post_results(
    ring: Transport, schedule: Schedule, accumulator: Accumulator, links: Links | None = None
) -> list[ResultHop]:
    """Post all messages of the results: one for each hop, and at the end the one that returns home."""
    direction = Direction(ring, schedule.step, links)
    slots = slots_for(direction)(
        accumulator.block(accumulator.zeros(1), ((0, 1),)), [*(hop.returning for hop in schedule.hops), schedule.home]
    )
    results = []
    for h, hop in enumerate(schedule.hops):
        result = ResultHop(direction, slots, hop.returning, TAGS + h - 1, hop.state if h else schedule.own)
        if h and hop.state:
            result.send(direction, TAGS + h)
        results.append(result)
    return [*results, ResultHop(direction, slots, schedule.home, TAGS + ring.size - 1, schedule.own)]
