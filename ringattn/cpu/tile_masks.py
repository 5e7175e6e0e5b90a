"""The parts of a mask that are data (segments, arrays), for the host kernel: the tiles that they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..core.arrays import as_float32, view
from ..core.masks import Tile, array_tile, segment_tile
from ..core.rules import Rules
from ..kernels.tiles import Piece, Unit


@dataclass(frozen=True)
class Hidden:
    """The mask of one kernel call on NumPy views.

    Attributes:
        out_of_band: Given a, b, c, d, what the band hides of a run of the queries ``a:b`` x keys ``c:d``, bool, and
            that run, outside of which it hides nothing.
        mask: Boolean or additive ``[B, Hq, Lq, columns]``, broadcast without a copy, or ``None``.
        columns: Each key's column, or ``None`` for the same order.
        group: The query heads of a key/value head.
        q_ids, k_ids: Segment ids ``[B, Lq]`` and ``[B, Lk]``, or ``None``.
    """

    out_of_band: Callable[[int, int, int, int], tuple[np.ndarray, slice]]
    mask: np.ndarray | None
    columns: np.ndarray | None
    group: int
    q_ids: np.ndarray | None
    k_ids: np.ndarray | None

    @classmethod
    def of(cls, rules: Rules, group: int, q_pos: np.ndarray, k_pos: np.ndarray) -> Hidden:
        """Evaluate the arrays of `rules` and look at them."""
        q_ids, k_ids = rules.segments or (None, None)
        arrays = [x for x in (rules.mask, q_ids, k_ids) if x is not None]
        mx.eval(*arrays)
        views = [None if x is None else view(x) for x in (rules.mask, q_ids, k_ids)]

        @lru_cache(maxsize=16)  # heads come one after the other to the same piece
        def out_of_band(a: int, b: int, c: int, d: int) -> tuple[np.ndarray, slice]:
            edge = rules.band.edge(q_pos[a:b], int(k_pos[c]), int(k_pos[d - 1]))
            return ~rules.band.visible(q_pos[a:b][edge], k_pos[c:d]), edge

        return cls(out_of_band, views[0], rules.columns, group, views[1], views[2])

    def refine(self, batch: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Those of `pieces` that segments leave, with what all masks leave of them."""
        for piece in pieces:
            tile = piece.tile if self.mask is None else piece.tile & Tile.PARTIAL
            if self.q_ids is not None and self.k_ids is not None:
                q_ids = self.q_ids[batch, piece.q_start : piece.q_stop]
                tile = tile & segment_tile(q_ids, self.k_ids[batch, piece.k_start : piece.k_stop])
            if tile is not Tile.EMPTY:
                yield piece._replace(tile=tile)

    def empty(self, unit: Unit, piece: Piece) -> bool:
        """Whether an array mask leaves nothing of `piece` for the heads of `unit`."""
        return self.mask is not None and array_tile(self._array(unit, piece)) is Tile.EMPTY

    def apply(self, unit: Unit, piece: Piece, scores: np.ndarray) -> tuple[np.ndarray, slice]:
        """Add an additive mask and set what is hidden to -inf, in `scores` ``[group * queries, keys]``.

        Returns:
            What is hidden, bool ``[heads or 1, rows, keys]``, and the run of queries that these rows are; of the
            others nothing is.
        """
        rows, keys = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
        shaped = scores.reshape(-1, piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
        band, edge = self.out_of_band(piece.q_start, piece.q_stop, piece.k_start, piece.k_stop)
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

    def _array(self, unit: Unit, piece: Piece) -> np.ndarray:
        """The tile of the array mask ``[heads or 1, queries or 1, keys or 1]``, bool or float32."""
        assert self.mask is not None
        batches, heads, rows, columns = self.mask.shape
        tile = self.mask[unit.batch if batches > 1 else 0]
        tile = tile[unit.first * self.group : unit.last * self.group] if heads > 1 else tile
        tile = tile[:, piece.q_start : piece.q_stop] if rows > 1 else tile
        keys = slice(piece.k_start, piece.k_stop)
        if columns > 1:
            tile = tile[..., keys] if self.columns is None else tile[..., self.columns[keys]]
        return tile if tile.dtype == bool else as_float32(tile)


def clear(x: np.ndarray, piece: Piece, hidden: np.ndarray, rows: slice) -> None:
    """Set `x` ``[group * queries, keys]`` to zero where `Hidden.apply` says that `piece` is hidden, in place."""
    shaped = x.reshape(-1, piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
    np.copyto(shaped[:, rows], np.float32(0), where=hidden)
