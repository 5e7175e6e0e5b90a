"""Blocks passed on around the ring: the relay, and the buffers that they arrive in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import TypeVar

import mlx.core as mx

from ..core.arrays import view
from ..core.intervals import Spans, length, union
from ..transport.interface import Direction, Signal, Transfer, Transport
from .blocks import NOTHING, Block, copy_tokens, raw
from .schedule import Hop, Schedule

T = TypeVar("T")


def relay(
    ring: Transport, own: Block, schedules: Sequence[Schedule]
) -> tuple[list[tuple[int, Hop, Arrival]], list[Transfer]]:
    """Post all transfers of blocks. Each block is forwarded on arrival, even while this rank computes.

    Returns:
        The hops of all schedules in the order in which ranks must do them, each with its number and its block. The
        caller releases each block after use. And the sends, which the caller waits for at the end.
    """
    posted = [_post_route(Direction(ring, schedule.step), own, schedule.hops) for schedule in schedules]
    return interleave_hops([arrivals for arrivals, _ in posted]), [sent for _, sends in posted for sent in sends]


def _post_route(
    direction: Direction, own: Block, hops: Sequence[Hop]
) -> tuple[list[tuple[int, Hop, Arrival]], list[Transfer]]:
    first = hops[0].send
    copied = first if first and not (first == own.spans and own.packed) else ()
    slots = Slots(own, [hop.held for hop in hops[1:]], keep=copied)
    arrivals, sends = [], []
    for h, hop in enumerate(hops):
        arrival = slots.recv(direction, hop.held, h - 1) if h else Arrival(own)
        if hop.send:
            source = slots.keep(copied) if h == 0 and copied else arrival
            sends.append(source.forward(direction, hop.send, h))
        arrivals.append((h, hop, arrival))
    return arrivals, sends


def interleave_hops(routes: Iterable[Iterable[T]]) -> list[T]:
    """Return hop 0 of each route, then hop 1 of each, and so on.

    All ranks use this order, so that none blocks: a hop needs only the previous hops of other ranks.
    """
    return [x for turn in zip_longest(*routes) for x in turn if x is not None]


def collect(ring: Transport, own: Block, schedules: Sequence[Schedule]) -> Block:
    """Collect all tokens that the hops of `schedules` compute on in one block, in the order of their positions."""
    arrivals, sends = relay(ring, own, schedules)
    spans = union(span for _, hop, _ in arrivals for span in hop.compute)
    shapes = [with_tokens(x.shape, axis, length(spans)) for x, axis in zip(own.arrays, own.axes)]
    arrays = [mx.zeros(shape, x.dtype) for shape, x in zip(shapes, own.arrays)]
    mx.eval(arrays, own.arrays)
    for h, hop, arrival in arrivals:
        if hop.compute and arrival.transfer is not None:
            with ring.tracer.span("wait", h):
                ring.wait(arrival.transfer)
        if hop.compute:
            for into, x, axis in zip(arrays, arrival.block.arrays, own.axes):
                copy_tokens(view(x), arrival.block.spans, view(into), spans, axis, hop.compute)
        arrival.release()
    ring.wait(*sends)
    return Block(tuple(arrays), own.axes, spans)


class Slots:
    """Two buffers that receive the blocks of one kind in turn."""

    def __init__(self, like: Block, spans: Sequence[Spans], keep: Spans = ()):
        """Allocate the buffers.

        Args:
            like: A block with the shapes and dtypes.
            spans: The spans of all blocks to come. The largest sets the size.
            keep: The tokens of `like` that a slot holds first, for `Slots.keep`.
        """
        self._like = like
        most = max(map(length, [*spans, keep]), default=0)
        count = min(2, sum(1 for held in [*spans, keep] if held))
        shapes = [_flat(self._shape(i, most), axis) for i, axis in enumerate(like.axes)]
        self._memory = [[mx.zeros(shape, x.dtype) for shape, x in zip(shapes, like.arrays)] for _ in range(count)]
        mx.eval(self._memory)
        self._users: list[list[Transfer | Signal]] = [[] for _ in range(count)]
        self._next = 0

    def keep(self, spans: Spans) -> Arrival:
        """Copy the tokens of `like` at `spans`, packed, into the slot that is reused last."""
        at = len(self._memory) - 1
        arrays = self._arrays(at, spans)
        for x, own, axis in zip(arrays, self._like.arrays, self._like.axes):
            copy_tokens(view(own), self._like.spans, view(x), spans, axis, spans)
        return Arrival(Block(tuple(arrays), self._like.axes, spans), users=self._users[at])

    def _arrays(self, at: int, spans: Spans) -> list[mx.array]:
        """View the front of a slot in the shapes of a block of the tokens at `spans`."""
        arrays = []
        for i, (memory, axis) in enumerate(zip(self._memory[at], self._like.axes)):
            shape = self._shape(i, length(spans))
            arrays.append(memory[: _flat(shape, axis)[0]].reshape(shape))
        mx.eval(arrays)
        return arrays

    def recv(self, direction: Direction, spans: Spans, tag: int, after: Sequence[Signal] = ()) -> Arrival:
        """Receive the tokens at `spans` into the next slot, once its last users and all of `after` are done.

        `after` delays a receive until its message can come. An open receive keeps the progress thread polling.
        """
        if not spans:
            return Arrival(NOTHING)
        at = self._next
        self._next = (at + 1) % len(self._memory)
        arrays = self._arrays(at, spans)
        transfer = direction.recv([raw(x) for x in arrays], tag=tag, after=[*self._users[at], *after])
        users: list[Transfer | Signal] = [Signal()]
        self._users[at] = users
        return Arrival(Block(tuple(arrays), self._like.axes, spans), transfer, users)

    def _shape(self, i: int, tokens: int) -> tuple[int, ...]:
        return with_tokens(self._like.arrays[i].shape, self._like.axes[i], tokens)


def _flat(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Flatten `shape` to rows of its last axis, or to one column where that is the token `axis`.

    One axis alone could exceed 2**31 - 1.
    """
    last = shape[-1] if axis != len(shape) - 1 else 1
    return prod(shape) // max(1, last), last


def with_tokens(shape: Sequence[int], axis: int, tokens: int) -> tuple[int, ...]:
    """Replace the length of the token `axis` in `shape`."""
    return (*shape[:axis], tokens, *shape[axis + 1 :])


@dataclass(frozen=True)
class Arrival:
    """A block that has arrived or will arrive. Its slot is reused once it is released and all its sends are done."""

    block: Block
    transfer: Transfer | None = None
    users: list[Transfer | Signal] | None = None

    def forward(self, direction: Direction, spans: Spans, tag: int) -> Transfer:
        """Send the tokens at `spans` to the next rank as soon as the block has arrived."""
        sent = direction.send(self.block.load(spans), tag=tag, after=() if self.transfer is None else (self.transfer,))
        if self.users is not None:
            self.users.append(sent)
        return sent

    def release(self) -> None:
        """Release the block. This rank does not read it again."""
        for signal in self.users or ():
            if isinstance(signal, Signal):
                signal.open()
