"""The parts of a mask that are data (segments, arrays), for the host kernel: the tiles they leave, and applying them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..mask import Band, Tile
from . import Rules
from .views import as_float32, view


@dataclass(frozen=True)
class Hidden:
    """The mask of one kernel call on NumPy views.

    Attributes:
        band, q_pos, k_pos: The positional part.
        mask: Boolean or additive ``[B, Hq, Lq, columns]``, broadcast without a copy, or ``None``.
        columns: Each key's column, or ``None`` for the same order.
        q_ids, k_ids: Segment ids ``[B, Lq]`` and ``[B, Lk]``, or ``None``.
    """

    band: Band
    q_pos: np.ndarray
    k_pos: np.ndarray
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
        return cls(rules.band, q_pos, k_pos, views[0], rules.columns, views[1], views[2])

    def refine(self, batch: int, start: int, stop: int, tiles: list[tuple[int, int, Tile]]) -> Iterator:
        """Those of `tiles`, for queries ``start:stop``, that segments leave, with what all masks leave of them."""
        for k_start, k_stop, tile in tiles:
            if self.mask is not None:
                tile = tile & Tile.PARTIAL
            if self.q_ids is not None and self.k_ids is not None:
                tile = tile & segment_tile(self.q_ids[batch, start:stop], self.k_ids[batch, k_start:k_stop])
            if tile is not Tile.EMPTY:
                yield k_start, k_stop, tile

    def apply(self, unit, start: int, stop: int, scores: np.ndarray) -> np.ndarray:
        """Add an additive mask and set what is hidden to -inf, in `scores` ``[group * queries, keys]``.

        Returns:
            What is visible, bool, of the shape of `scores`.
        """
        rows, keys = slice(unit.start, unit.stop), slice(start, stop)
        group = len(scores) // (unit.stop - unit.start)
        shaped = scores.reshape(group, unit.stop - unit.start, stop - start)
        visible = self.band.visible(self.q_pos[rows], self.k_pos[keys])
        if self.q_ids is not None and self.k_ids is not None:
            q_ids, k_ids = self.q_ids[unit.batch, rows, None], self.k_ids[unit.batch, None, keys]
            visible &= (q_ids == k_ids) & (q_ids >= 0)
        visible = np.broadcast_to(visible, shaped.shape)
        if self.mask is not None:
            tile = self._array_tile(unit, group, start, stop)
            if tile.dtype == bool:
                visible = visible & tile
            else:
                tile = as_float32(tile, np.empty(tile.size, np.float32))
                shaped += tile
                visible = visible & (tile != -np.inf)
        np.copyto(shaped, np.float32(-np.inf), where=~visible)
        return visible.reshape(scores.shape)

    def _array_tile(self, unit, group: int, start: int, stop: int) -> np.ndarray:
        """The tile of the array mask ``[group or 1, queries or 1, keys or 1]``."""
        assert self.mask is not None
        batches, heads, rows, columns = self.mask.shape
        tile = self.mask[unit.batch if batches > 1 else 0]
        tile = tile[unit.head * group : (unit.head + 1) * group] if heads > 1 else tile
        tile = tile[:, unit.start : unit.stop] if rows > 1 else tile
        if columns == 1:
            return tile
        return tile[..., start:stop] if self.columns is None else tile[..., self.columns[start:stop]]


def segment_tile(q_ids: np.ndarray, k_ids: np.ndarray) -> Tile:
    """What segments leave of a tile; ids are equal and not negative for the pairs that attend."""
    low, high = max(q_ids.min(), k_ids.min(), 0), min(q_ids.max(), k_ids.max())
    if low > high:
        return Tile.EMPTY
    same = q_ids.min() == q_ids.max() == k_ids.min() == k_ids.max()
    return Tile.FULL if same else Tile.PARTIAL
