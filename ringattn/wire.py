"""Blocks on their way: arrays with a token axis, the memory they arrive in, and the bytes of some of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .backends.views import view
from .comm.base import Gate, Ring, Transfer, Way
from .schedule import Hop, Schedule
from .spans import Spans, intersection, length, locate, tokens_at, union

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Arrays that hold the same tokens, those at the positions `spans`, in order.

    Attributes:
        arrays: Of any dtypes.
        axes: The token axis of each.
        spans: The positions of the tokens.
    """

    arrays: tuple[mx.array, ...]
    axes: tuple[int, ...]
    spans: Spans

    def load(self, spans: Spans) -> Callable[[], list[memoryview]]:
        """What a transfer sends to move the tokens at `spans`, read when it starts and not before.

        All tokens go as they lie in memory, for which the arrays must be packed; a part of them is copied.
        """
        mx.eval(self.arrays)
        if spans == self.spans:
            buffers = [raw(x) for x in self.arrays]
            return lambda: buffers
        views = [view(x) for x in self.arrays]
        at = locate(spans, self.spans)
        return lambda: [_pack(x, axis, at) for x, axis in zip(views, self.axes)]

    @property
    def packed(self) -> bool:
        """Whether the arrays lie in memory as they are sent."""
        mx.eval(self.arrays)
        return all(memoryview(x).c_contiguous for x in self.arrays if x.size)  # type: ignore[arg-type]


NOTHING = Block((), (), ())


def raw(x: Any) -> memoryview:
    """The bytes of an evaluated, contiguous array, mx or NumPy, without a copy."""
    return memoryview(x).cast("B") if x.size else memoryview(b"")


def _pack(x: np.ndarray, axis: int, at: Spans) -> memoryview:
    pieces = [x[tokens_at(axis, start, stop)] for start, stop in at]
    return raw(np.ascontiguousarray(np.concatenate(pieces, axis)))


def rows(block: Block, spans: Spans) -> Block:
    """The tokens of `block` at `spans`."""
    if spans == block.spans:
        return block
    at = locate(spans, block.spans)
    pairs = zip(block.arrays, block.axes)
    arrays = [mx.concatenate([x[tokens_at(axis, *span)] for span in at], axis) for x, axis in pairs]
    return Block(tuple(arrays), block.axes, spans)


class Slots:
    """The two buffers that the blocks of one kind arrive in, by turns."""

    def __init__(self, like: Block, spans: Sequence[Spans], keep: Spans = ()):
        """`like` has the shapes and dtypes; `spans` are those of all blocks to come: the largest sets the size.

        The tokens of `like` at `keep` will be kept in a slot as well, at first.
        """
        self._like = like
        most = max(map(length, [*spans, keep]), default=0)
        count = min(2, sum(1 for held in [*spans, keep] if held))
        shapes = [_flat(self._shape(i, most), axis) for i, axis in enumerate(like.axes)]
        self._memory = [[mx.zeros(shape, x.dtype) for shape, x in zip(shapes, like.arrays)] for _ in range(count)]
        mx.eval(self._memory)
        self._users: list[list[Transfer | Gate]] = [[] for _ in range(count)]
        self._next = 0

    def keep(self, spans: Spans) -> Arrival:
        """A packed copy of the tokens of `like` at `spans`, in the slot that is wanted again last."""
        at, arrays = len(self._memory) - 1, self._arrays(len(self._memory) - 1, spans)
        for x, own, axis in zip(arrays, self._like.arrays, self._like.axes):
            copy_tokens(view(own), self._like.spans, view(x), spans, axis, spans)
        return Arrival(Block(tuple(arrays), self._like.axes, spans), users=self._users[at])

    def _arrays(self, at: int, spans: Spans) -> list[mx.array]:
        """The front of a slot, in the shapes of a block of the tokens at `spans`."""
        arrays = []
        for i, (memory, axis) in enumerate(zip(self._memory[at], self._like.axes)):
            shape = self._shape(i, length(spans))
            arrays.append(memory[: _flat(shape, axis)[0]].reshape(shape))
        mx.eval(arrays)
        return arrays

    def recv(self, way: Way, spans: Spans, tag: int, after: Sequence[Gate] = ()) -> Arrival:
        """Receive the tokens at `spans` into the slot whose turn it is, once its last users are done.

        And not before all of `after`: a receive that is open long before anything comes keeps the helper polling.
        """
        if not spans:
            return Arrival(NOTHING)
        at, self._next = self._next, (self._next + 1) % len(self._memory)
        arrays = self._arrays(at, spans)
        transfer = way.recv([raw(x) for x in arrays], tag=tag, after=[*self._users[at], *after])
        users: list[Transfer | Gate] = [Gate()]
        self._users[at] = users
        return Arrival(Block(tuple(arrays), self._like.axes, spans), transfer, users)

    def _shape(self, i: int, tokens: int) -> tuple[int, ...]:
        return _with_tokens(self._like.arrays[i].shape, self._like.axes[i], tokens)


def _flat(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """`shape` as rows of its last axis, unless that is the tokens' `axis`: one axis alone could pass 2**31 - 1."""
    last = shape[-1] if axis != len(shape) - 1 else 1
    return prod(shape) // max(1, last), last


def _with_tokens(shape: Sequence[int], axis: int, tokens: int) -> tuple[int, ...]:
    return (*shape[:axis], tokens, *shape[axis + 1 :])


@dataclass(frozen=True)
class Arrival:
    """A block that is here or on its way, in a slot that is kept until it is released and all its sends are done."""

    block: Block
    transfer: Transfer | None = None
    users: list[Transfer | Gate] | None = None

    def forward(self, way: Way, spans: Spans, tag: int) -> Transfer:
        """Send the tokens at `spans` on to the next rank as soon as the block is here."""
        sent = way.send(self.block.load(spans), tag=tag, after=() if self.transfer is None else (self.transfer,))
        if self.users is not None:
            self.users.append(sent)
        return sent

    def release(self) -> None:
        """Say that this rank has read the block."""
        for gate in self.users or ():
            if isinstance(gate, Gate):
                gate.open()


def relay(
    ring: Ring, own: Block, schedules: Sequence[Schedule]
) -> tuple[list[tuple[int, Hop, Arrival]], list[Transfer]]:
    """Post all transfers of blocks; one is forwarded as it arrives, whatever this rank is doing.

    Returns:
        The hops of all schedules in the order in which ranks have to do them, each with its number and its block, to be
        released after use; and the sends, to be waited for in the end.
    """
    posted = [_relay(Way(ring, schedule.step), own, schedule.hops) for schedule in schedules]
    return by_turns([arrivals for arrivals, _ in posted]), [sent for _, sends in posted for sent in sends]


def _relay(way: Way, own: Block, hops: Sequence[Hop]) -> tuple[list[tuple[int, Hop, Arrival]], list[Transfer]]:
    first = hops[0].send
    copied = first if first and not (first == own.spans and own.packed) else ()
    slots = Slots(own, [hop.held for hop in hops[1:]], keep=copied)
    arrivals, sends = [], []
    for h, hop in enumerate(hops):
        arrival = slots.recv(way, hop.held, h - 1) if h else Arrival(own)
        if hop.send:
            source = slots.keep(copied) if h == 0 and copied else arrival
            sends.append(source.forward(way, hop.send, h))
        arrivals.append((h, hop, arrival))
    return arrivals, sends


def by_turns(journeys: Iterable[Iterable[T]]) -> list[T]:
    """Hop 0 of each journey, hop 1 of each, and so on.

    On every rank, so that none waits: a hop needs of other ranks only what they do in the hop before.
    """
    return [x for turn in zip_longest(*journeys) for x in turn if x is not None]


def collect(ring: Ring, own: Block, schedules: Sequence[Schedule]) -> Block:
    """All the tokens that the hops of `schedules` compute on in one block, in the order of their positions."""
    arrivals, sends = relay(ring, own, schedules)
    spans = union(span for _, hop, _ in arrivals for span in hop.compute)
    shapes = [_with_tokens(x.shape, axis, length(spans)) for x, axis in zip(own.arrays, own.axes)]
    arrays = [mx.zeros(shape, x.dtype) for shape, x in zip(shapes, own.arrays)]
    mx.eval(arrays, own.arrays)
    for _, hop, arrival in arrivals:
        if hop.compute and arrival.transfer is not None:
            ring.wait(arrival.transfer)
        if hop.compute:
            for into, x, axis in zip(arrays, arrival.block.arrays, own.axes):
                copy_tokens(view(x), arrival.block.spans, view(into), spans, axis, hop.compute)
        arrival.release()
    ring.wait(*sends)
    return Block(tuple(arrays), own.axes, spans)


def copy_tokens(x: np.ndarray, held: Spans, into: np.ndarray, wanted: Spans, axis: int, tokens: Spans) -> None:
    """Copy `tokens` from `x`, which holds `held`, to their places in `into`, which holds `wanted`."""
    for span in tokens:
        for piece in intersection((span,), held):
            ((start, stop),), ((to, end),) = locate((piece,), held), locate((piece,), wanted)
            into[tokens_at(axis, to, end)] = x[tokens_at(axis, start, stop)]
