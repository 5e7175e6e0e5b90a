"""Slots: the two buffers that blocks arrive in, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..core.arrays import view
from ..core.intervals import Spans, length
from ..transport.interface import Direction, Load, Signal, Transfer
from .blocks import NOTHING, Block, copy_tokens, evaluate, raw


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
        self._memory = [[like.empty(i, shape) for i, shape in enumerate(shapes)] for _ in range(count)]
        self._users: list[list[Transfer | Signal]] = [[] for _ in range(count)]
        self._next = 0

    def keep(self, spans: Spans) -> Arrival:
        """Copy the tokens of `like` at `spans`, packed, into the slot that is reused last."""
        at = len(self._memory) - 1
        block = self._block(at, spans)
        for x, own, axis in zip(block.arrays, self._like.arrays, self._like.axes):
            copy_tokens(view(own), self._like.spans, view(x), spans, axis, spans)
        return Arrival(block, users=self._users[at])

    def _block(self, at: int, spans: Spans) -> Block:
        """View the front of a slot as a block of the tokens at `spans`."""
        arrays = []
        for i, (memory, axis) in enumerate(zip(self._memory[at], self._like.axes)):
            shape = self._shape(i, length(spans))
            arrays.append(memory[: _flat(shape, axis)[0]].reshape(shape))
        evaluate(arrays)
        return self._like.like(arrays, spans)

    def recv(self, direction: Direction, spans: Spans, tag: int, after: Sequence[Signal] = ()) -> Arrival:
        """Receive the tokens at `spans` into the next slot, once its last users and all of `after` are done.

        `after` delays a receive until its message can come. An open receive keeps the progress thread polling.
        """
        if not spans:
            return Arrival(NOTHING)
        at = self._next
        self._next = (at + 1) % len(self._users)
        block = self._block(at, spans)
        transfer = direction.recv(self._places(block), tag=tag, after=[*self._users[at], *after])
        users: list[Transfer | Signal] = [Signal()]
        self._users[at] = users
        return Arrival(block, transfer, users)

    def _places(self, block: Block) -> Load:
        """The places of a block that arrives."""
        buffers = [raw(x) for x in block.arrays]
        return lambda: buffers

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
        after = () if self.transfer is None else (self.transfer,)
        sent = direction.send(self.block.load(spans), tag=tag, after=after, late=self.block.packs(spans))
        if self.users is not None:
            self.users.append(sent)
        return sent

    @property
    def awaited(self) -> bool:
        """Whether another block comes into its slot."""
        return any(signal.awaited for signal in _signals(self.users))

    def release(self) -> None:
        """Release the block. This rank does not read it again."""
        for signal in _signals(self.users):
            signal.open()


def _signals(users: Sequence[Transfer | Signal] | None) -> list[Signal]:
    """The signals among the users of a slot: a rank's own reading, where a block arrived."""
    return [user for user in users or () if isinstance(user, Signal)]
