"""Units of work of the kernels outside MLX's graph, and runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..core.masks import Tile


class Piece(NamedTuple):
    """Queries ``q_start:q_stop`` x keys ``k_start:k_stop``, and their class under a mask."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    tile: Tile


class WorkUnit(NamedTuple):
    """Queries ``start:stop`` of key/value heads ``first:last`` of a batch entry, and the pieces that they see."""

    batch: int
    first: int
    last: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def cost(self) -> int:
        return (self.last - self.first) * sum(
            (piece.q_stop - piece.q_start) * (piece.k_stop - piece.k_start) for piece in self.pieces
        )


def cut(positions: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Cut ascending positions into runs of at most `step` tokens, and wherever they jump by more than `step`.

    A run with tokens from both ends of the sequence would make all the tiles between them partial.
    """
    if len(positions) <= 1:
        yield from [(0, 1)] * len(positions)
        return
    jumps = np.flatnonzero(np.diff(positions) > step) + 1
    for first, last in zip([0, *jumps], [*jumps, len(positions)]):
        yield from ((start, min(start + step, last)) for start in range(int(first), int(last), step))
