"""Slots on a GPU: buffers that blocks arrive in without passing the host.

In these buffers the tokens are the first axis. So the tokens of a span are one piece of memory, and a rank passes on
a part of a block without a copy. Kernels read the buffers through transposed views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import mlx.core as mx

from ..autograd.evaluation import start_evaluation
from ..core.intervals import Spans, length, locate
from ..native.cuda import Kind
from ..transport.interface import DeviceBuffer, Direction, Links, Load, Signal, Transfer
from .blocks import Block, rows
from .slots import Arrival, Slots

MOST_PIECES = 8  # spans of a block that travel as messages of their own; more are packed first


@dataclass(frozen=True)
class DeviceBlock(Block):
    """A block on the GPU, in buffers whose first axis is the tokens.

    Attributes:
        links: The links that it travels on.
        places: Returns the address of each array.
    """

    links: Links
    places: Callable[[], Sequence[int]]

    def load(self, spans: Spans) -> Load:
        """Return a function that finds the tokens at `spans` for a message. Both ends cut a message at its spans."""
        if self.packs(spans):
            return lambda: packed(self, spans, self.links).load(spans)()
        few = len(spans) <= MOST_PIECES
        cuts = [locate((span,), self.spans)[0] for span in spans] if few else [(0, length(spans))]
        widths = [x.dtype.size * prod(x.shape) // max(1, x.shape[axis]) for x, axis in zip(self.arrays, self.axes)]

        def load() -> list[DeviceBuffer]:
            return [
                DeviceBuffer(place + start * width, (stop - start) * width, x)
                for place, width, x in zip(self.places(), widths, self.arrays)
                for start, stop in cuts
            ]

        return load

    def packs(self, spans: Spans) -> bool:
        return spans != self.spans and len(spans) > MOST_PIECES


@dataclass(frozen=True)
class Memory:
    """Buffers on the GPU, one for each array of a block, with the tokens as the first axis.

    Attributes:
        buffers: The arrays.
        axes: The token axis that each array of a block has.
        links: The links that blocks travel on.
        places: Returns the address of each buffer.
    """

    buffers: tuple[mx.array, ...]
    axes: tuple[int, ...]
    links: Links
    places: Callable[[], Sequence[int]]

    def block(self, spans: Spans) -> DeviceBlock:
        """View the front of the buffers as a block of the tokens at `spans`."""
        n = length(spans)
        arrays = tuple(mx.moveaxis(x[:n], 0, axis) for x, axis in zip(self.buffers, self.axes))
        return DeviceBlock(arrays, self.axes, spans, self.links, self.places)


def packed(block: Block, spans: Spans, links: Links) -> DeviceBlock:
    """Pack the tokens at `spans` of `block` into buffers, to send them."""
    memory, lazy = _filled(block, spans, length(spans), links)
    start_evaluation(*lazy)
    return memory.block(spans)


def _filled(block: Block, spans: Spans, room: int, links: Links) -> tuple[Memory, list[mx.array]]:
    """Make buffers with place for `room` tokens that begin with the tokens at `spans` of `block`.

    Returns:
        The buffers, and the arrays to evaluate before they are used.
    """
    cut = rows(block, spans)
    buffers = links.gpu.pack(cut.arrays, cut.axes, room)
    lazy, read = links.gpu.locate(buffers)
    return Memory(tuple(buffers), cut.axes, links, cache(read)), [*buffers, *lazy]


def _empty(
    kinds: Sequence[Kind], count: int, axes: tuple[int, ...], links: Links
) -> tuple[list[Memory], list[mx.array]]:
    """Make the buffers of `count` blocks. Returns as `_filled` does."""
    buffers, read = links.gpu.allocate([*kinds] * count)
    places = cache(read)

    def memory(at: int) -> Memory:
        part = slice(at, at + len(axes))
        return Memory(tuple(buffers[part]), axes, links, lambda: places()[part])

    return [memory(i * len(axes)) for i in range(count)], buffers


class DeviceSlots(Slots):
    """Two buffers on the GPU that receive the blocks of one kind in turn."""

    def __init__(self, links: Links, like: Block, spans: Sequence[Spans], keep: Spans = ()):
        """Allocate the buffers. See `Slots`."""
        most = max(map(length, [*spans, keep]), default=0)
        count = min(2, sum(1 for held in [*spans, keep] if held))
        kinds = [(_token_first(x.shape, axis, most), x.dtype) for x, axis in zip(like.arrays, like.axes)]
        self._on_gpu, lazy = _empty(kinds, count - bool(keep), like.axes, links)
        if keep:
            kept, more = _filled(like, keep, most, links)
            self._on_gpu.append(kept)
            lazy = [*lazy, *more]
        start_evaluation(*lazy)
        self._users: list[list[Transfer | Signal]] = [[] for _ in self._on_gpu]
        self._next = 0

    def keep(self, spans: Spans) -> Arrival:
        return Arrival(self._block(-1, spans), users=self._users[-1])

    def _block(self, at: int, spans: Spans) -> Block:
        return self._on_gpu[at].block(spans)

    def _places(self, block: Block) -> Load:
        return block.load(block.spans)


def _token_first(shape: Sequence[int], axis: int, tokens: int) -> tuple[int, ...]:
    return (tokens, *(n for i, n in enumerate(shape) if i != axis))


def slots_for(direction: Direction) -> Callable[..., Slots]:
    """Return what makes the slots of a direction: on the host, or on the GPU."""
    links = direction.links
    return Slots if links is None else lambda *arguments, **named: DeviceSlots(links, *arguments, **named)
