"""The parts of a mask that are data (segments, arrays), for the host kernel: the tiles that they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..mask import Tile
from . import Rules
from .tiles import Piece, Unit
from .views import as_float32, view


@dataclass(frozen=True)
class Hidden:
    """The mask of one kernel call on NumPy views.

    Attributes:
        out_of_band: What the band hides of queries ``a:b`` x keys ``c:d``, bool, given a, b, c, d.
        mask: Boolean or additive ``[B, Hq, Lq, columns]``, broadcast without a copy, or ``None``.
        columns: Each key's column, or ``None`` for the same order.
        q_ids, k_ids: Segment ids ``[B, Lq]`` and ``[B, Lk]``, or ``None``.
    """

    out_of_band: Callable[[int, int, int, int], np.ndarray]
    mask: np.ndarray | None
    columns: np.ndarray | None
    q_ids: np.ndarray | None
    k_ids: np.ndarray | None

    @classmethod
    def of(cls, rules: Rules, q_pos: np.ndarray, k_pos: np.ndarray) -> Hidden:
        """Evaluate the arrays of `rules` and look at them."""
        q_ids, k_ids = rules.segments or (None, None)
        arrays = [x for x in (rules.mask, q_ids, k_ids) if x is not None]
        mx.eval(*arrays)
        views = [None if x is None else view(x) for x in (rules.mask, q_ids, k_ids)]

        @lru_cache(maxsize=16)  # heads come one after the other to the same piece
        def out_of_band(a: int, b: int, c: int, d: int) -> np.ndarray:
            return ~rules.band.visible(q_pos[a:b], k_pos[c:d])

        return cls(out_of_band, views[0], rules.columns, views[1], views[2])

    def refine(self, batch: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Those of `pieces` that segments leave, with what all masks leave of them."""
        for piece in pieces:
            tile = piece.tile if self.mask is None else piece.tile & Tile.PARTIAL
            if self.q_ids is not None and self.k_ids is not None:
                q_ids = self.q_ids[batch, piece.q_start : piece.q_stop]
                tile = tile & segment_tile(q_ids, self.k_ids[batch, piece.k_start : piece.k_stop])
            if tile is not Tile.EMPTY:
                yield piece._replace(tile=tile)

    def apply(self, unit: Unit, piece: Piece, scores: np.ndarray) -> np.ndarray:
        """Add an additive mask and set what is hidden to -inf, in `scores` ``[group * queries, keys]``.

        Returns:
            What is hidden, bool ``[group or 1, queries, keys]``.
        """
        rows, keys = slice(piece.q_start, piece.q_stop), slice(piece.k_start, piece.k_stop)
        shaped = scores.reshape(-1, piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
        hidden = self.out_of_band(piece.q_start, piece.q_stop, piece.k_start, piece.k_stop)[None]
        if self.q_ids is not None and self.k_ids is not None:
            q_ids, k_ids = self.q_ids[unit.batch, None, rows, None], self.k_ids[unit.batch, None, None, keys]
            hidden = hidden | (q_ids != k_ids) | (q_ids < 0)
        if self.mask is not None:
            tile = self._array_tile(unit, len(shaped), rows, keys)
            if tile.dtype == bool:
                hidden = hidden | ~tile
            else:
                tile = as_float32(tile, np.empty(tile.size, np.float32))
                shaped += tile
                hidden = hidden | (tile == -np.inf)
        np.copyto(shaped, np.float32(-np.inf), where=hidden)
        return hidden

    def _array_tile(self, unit: Unit, group: int, q: slice, k: slice) -> np.ndarray:
        """The tile of the array mask ``[group or 1, queries or 1, keys or 1]``."""
        assert self.mask is not None
        batches, heads, rows, columns = self.mask.shape
        tile = self.mask[unit.batch if batches > 1 else 0]
        tile = tile[unit.head * group : (unit.head + 1) * group] if heads > 1 else tile
        tile = tile[:, q] if rows > 1 else tile
        if columns == 1:
            return tile
        return tile[..., k] if self.columns is None else tile[..., self.columns[k]]


def segment_tile(q_ids: np.ndarray, k_ids: np.ndarray) -> Tile:
    """What segments leave of a tile; ids are equal and not negative for the pairs that attend."""
    low, high = max(q_ids.min(), k_ids.min(), 0), min(q_ids.max(), k_ids.max())
    if low > high:
        return Tile.EMPTY
    same = q_ids.min() == q_ids.max() == k_ids.min() == k_ids.max()
    return Tile.FULL if same else Tile.PARTIAL
