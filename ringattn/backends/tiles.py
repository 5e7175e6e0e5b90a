"""How the host kernel's work is cut."""

from __future__ import annotations

from typing import NamedTuple

from ..mask import Tile


class Piece(NamedTuple):
    """Queries ``q_start:q_stop`` x keys ``k_start:k_stop``, and what a mask leaves of them."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    tile: Tile


class Unit(NamedTuple):
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
