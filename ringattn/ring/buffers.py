"""The memory that blocks arrive in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from ..core.arrays import view
from ..core.intervals import Spans, length
from ..transport.interface import Direction, Signal, Transfer
from .blocks import NOTHING, Block, copy_tokens, raw


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
        self._users: list[list[Transfer | Signal]] = [[] for _ in range(count)]
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

    def recv(self, direction: Direction, spans: Spans, tag: int, after: Sequence[Signal] = ()) -> Arrival:
        """Receive the tokens at `spans` into the slot whose turn it is, once its last users are done.

        And not before all of `after`: a receive that is open long before anything comes keeps the helper polling.
        """
        if not spans:
            return Arrival(NOTHING)
        at, self._next = self._next, (self._next + 1) % len(self._memory)
        arrays = self._arrays(at, spans)
        transfer = direction.recv([raw(x) for x in arrays], tag=tag, after=[*self._users[at], *after])
        users: list[Transfer | Signal] = [Signal()]
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
    users: list[Transfer | Signal] | None = None

    def forward(self, direction: Direction, spans: Spans, tag: int) -> Transfer:
        """Send the tokens at `spans` on to the next rank as soon as the block is here."""
        sent = direction.send(self.block.load(spans), tag=tag, after=() if self.transfer is None else (self.transfer,))
        if self.users is not None:
            self.users.append(sent)
        return sent

    def release(self) -> None:
        """Say that this rank has read the block."""
        for signal in self.users or ():
            if isinstance(signal, Signal):
                signal.open()
