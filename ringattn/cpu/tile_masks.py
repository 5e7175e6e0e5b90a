"""Masks of the CPU kernel, tile by tile: the band, segments and array masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..core.arrays import as_float32, view
from ..core.masks import Tile, array_tile, segment_tile
from ..core.rules import ScoreRules


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


@dataclass(frozen=True)
class TileMask:
    """The mask of one kernel call on NumPy views.

    Attributes:
        hidden_by_band: A function of a, b, c, d. It returns a run of the queries ``a:b`` and a boolean array of the
            pairs of this run x the keys ``c:d`` that the band hides. The band hides nothing from other queries.
        mask: Boolean or additive ``[B, Hq, Lq, columns]``, broadcast without a copy, or ``None``.
        columns: The column of each key, or ``None`` for the same order.
        group: The number of query heads for each key/value head.
        q_ids, k_ids: Segment ids ``[B, Lq]`` and ``[B, Lk]``, or ``None``.
    """

    hidden_by_band: Callable[[int, int, int, int], tuple[np.ndarray, slice]]
    mask: np.ndarray | None
    columns: np.ndarray | None
    group: int
    q_ids: np.ndarray | None
    k_ids: np.ndarray | None

    @classmethod
    def of(cls, rules: ScoreRules, group: int, q_pos: np.ndarray, k_pos: np.ndarray) -> TileMask:
        """Evaluate the arrays of `rules` and make views of them."""
        q_ids, k_ids = rules.segments or (None, None)
        arrays = [x for x in (rules.mask, q_ids, k_ids) if x is not None]
        mx.eval(*arrays)
        views = [None if x is None else view(x) for x in (rules.mask, q_ids, k_ids)]

        @lru_cache(maxsize=16)  # successive heads need the same piece
        def hidden_by_band(a: int, b: int, c: int, d: int) -> tuple[np.ndarray, slice]:
            edge = rules.band.partial_rows(q_pos[a:b], int(k_pos[c]), int(k_pos[d - 1]))
            return ~rules.band.visible(q_pos[a:b][edge], k_pos[c:d]), edge

        return cls(hidden_by_band, views[0], rules.columns, group, views[1], views[2])

    def refine(self, batch: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the `pieces` that segments do not hide, with their class under all masks."""
        for piece in pieces:
            tile = piece.tile if self.mask is None else piece.tile & Tile.PARTIAL
            if self.q_ids is not None and self.k_ids is not None:
                q_ids = self.q_ids[batch, piece.q_start : piece.q_stop]
                tile = tile & segment_tile(q_ids, self.k_ids[batch, piece.k_start : piece.k_stop])
            if tile is not Tile.EMPTY:
                yield piece._replace(tile=tile)

    def empty(self, unit: WorkUnit, piece: Piece) -> bool:
        """Return whether an array mask hides all of `piece` from the heads of `unit`."""
        return self.mask is not None and array_tile(self._array(unit, piece)) is Tile.EMPTY

    def apply(self, unit: WorkUnit, piece: Piece, scores: np.ndarray) -> tuple[np.ndarray, slice]:
        """Add an additive mask to `scores` ``[group * queries, keys]`` and set hidden scores to -inf, in place.

        Returns:
            The hidden pairs, bool ``[heads or 1, rows, keys]``, and the run of queries that are these rows. Nothing
            is hidden from the other queries.
        """
        rows, keys = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
        shaped = scores.reshape(-1, piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
        band, edge = self.hidden_by_band(piece.q_start, piece.q_stop, piece.k_start, piece.k_stop)
        if self.q_ids is None and self.mask is None:
            np.copyto(shaped[:, edge], np.float32(-np.inf), where=band)
            return band[None], edge
        hidden = np.zeros((1, *shaped.shape[1:]), bool)
        hidden[:, edge] = band
        if self.q_ids is not None and self.k_ids is not None:
            q_ids, k_ids = self.q_ids[unit.batch, None, rows, None], self.k_ids[unit.batch, None, None, keys]
            hidden = hidden | (q_ids != k_ids) | (q_ids < 0)
        if self.mask is not None:
            tile = self._array(unit, piece)
            if tile.dtype == bool:
                hidden = hidden | ~tile
            else:
                shaped += tile
                hidden = hidden | (tile == -np.inf)
        np.copyto(shaped, np.float32(-np.inf), where=hidden)
        return hidden, slice(0, shaped.shape[1])

    def _array(self, unit: WorkUnit, piece: Piece) -> np.ndarray:
        """Cut the tile ``[heads or 1, queries or 1, keys or 1]`` out of the array mask, bool or float32."""
        assert self.mask is not None
        batches, heads, rows, columns = self.mask.shape
        tile = self.mask[unit.batch if batches > 1 else 0]
        tile = tile[unit.first * self.group : unit.last * self.group] if heads > 1 else tile
        tile = tile[:, piece.q_start : piece.q_stop] if rows > 1 else tile
        keys = slice(piece.k_start, piece.k_stop)
        if columns > 1:
            tile = tile[..., keys] if self.columns is None else tile[..., self.columns[keys]]
        return tile if tile.dtype == bool else as_float32(tile)


def zero_hidden(x: np.ndarray, piece: Piece, hidden: np.ndarray, rows: slice) -> None:
    """Set the hidden pairs of `x` ``[group * queries, keys]`` to zero, in place. `TileMask.apply` returns the pairs."""
    shaped = x.reshape(-1, piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
    np.copyto(shaped[:, rows], np.float32(0), where=hidden)
