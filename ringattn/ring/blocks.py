"""Blocks: arrays with a token axis, and the bytes of some of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.arrays import view
from ..core.intervals import Spans, indices, intersection, locate, tokens_at
from ..transport.interface import Load


@dataclass(frozen=True)
class Block:
    """Arrays that hold the same tokens, those at the positions `spans`, in order.

    Attributes:
        arrays: The arrays, of any dtypes.
        axes: The token axis of each array.
        spans: The positions of the tokens.
    """

    arrays: tuple[Any, ...]
    axes: tuple[int, ...]
    spans: Spans

    def load(self, spans: Spans) -> Load:
        """Return a function that reads the tokens at `spans` for a send. A transfer calls it when it starts.

        All tokens together are sent from their memory, without a copy: the arrays must be packed. A part is copied.
        """
        evaluate(self.arrays)
        if spans == self.spans:
            buffers = [raw(x) for x in self.arrays]
            return lambda: buffers
        views = [view(x) for x in self.arrays]
        at = locate(spans, self.spans)
        return lambda: [_pack(x, axis, at) for x, axis in zip(views, self.axes)]

    def like(self, arrays: Sequence[Any], spans: Spans) -> Block:
        """Make a block of `arrays` of the same kind, with the tokens at `spans`."""
        return Block(tuple(arrays), self.axes, spans)

    def empty(self, i: int, shape: Sequence[int]) -> Any:
        """Allocate an array of the same kind and dtype as array `i`, to write to."""
        x = mx.zeros(shape, self.arrays[i].dtype)
        mx.eval(x)
        return x

    def packs(self, spans: Spans) -> bool:
        """Whether `load` reads the tokens when the message is ready to start, and not where they are."""
        return spans != self.spans

    @property
    def packed(self) -> bool:
        """Whether the arrays are contiguous, so that they can be sent without a copy."""
        evaluate(self.arrays)
        return all(memoryview(x).c_contiguous for x in self.arrays if x.size)


def evaluate(*groups: Sequence[Any]) -> None:
    """Evaluate arrays of MLX; those of NumPy need no evaluation."""
    mx.eval([x for arrays in groups for x in arrays if isinstance(x, mx.array)])


NOTHING = Block((), (), ())


def raw(x: Any) -> memoryview:
    """View the bytes of an evaluated, contiguous array, mx or NumPy, without a copy."""
    return memoryview(x).cast("B") if x.size else memoryview(b"")


def _pack(x: np.ndarray, axis: int, at: Spans) -> memoryview:
    pieces = [x[tokens_at(axis, start, stop)] for start, stop in at]
    return raw(np.ascontiguousarray(np.concatenate(pieces, axis)))


def rows(block: Block, spans: Spans) -> Block:
    """Cut the tokens at `spans` out of `block`."""
    if spans == block.spans:
        return block
    at = locate(spans, block.spans)
    pairs = zip(block.arrays, block.axes)
    arrays = [mx.concatenate([x[tokens_at(axis, *span)] for span in at], axis) for x, axis in pairs]
    return Block(tuple(arrays), block.axes, spans)


def copy_tokens(x: np.ndarray, held: Spans, into: np.ndarray, wanted: Spans, axis: int, tokens: Spans) -> None:
    """Copy `tokens` from `x`, which holds `held`, to their places in `into`, which holds `wanted`."""
    pieces = intersection(tokens, held)
    for (start, stop), at, to in zip(pieces, indices(pieces, held), indices(pieces, wanted)):
        n = stop - start
        into[tokens_at(axis, to, to + n)] = x[tokens_at(axis, at, at + n)]
