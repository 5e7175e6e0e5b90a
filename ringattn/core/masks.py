"""Masks by position, and the tiles that a mask leaves empty, full or partial.

Causal masks and windows are both bands: query i sees key j when ``low <= j - i <= high``.

    causal, high = 0      window=2, low = -1, high = 0      window=(1, 1)
      j 0 1 2 3             j 0 1 2 3                         j 0 1 2 3
    i 0 x . . .           i 0 x . . .                       i 0 x x . .
      1 x x . .             1 x x . .                         1 x x x .
      2 x x x .             2 . x x .                         2 . x x x
      3 x x x x             3 . . x x                         3 . . x x

Segments and array masks are data, not positions. A kernel applies them within the tiles that the band leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from .intervals import Span, Spans, intersection, union


class Tile(Enum):
    """Class of a rectangle of queries x keys under a mask."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2

    def __and__(self, other: Tile) -> Tile:
        """Class under two masks that are combined by AND."""
        return Tile(min(self.value, other.value))


@dataclass(frozen=True)
class Band:
    """The pairs with ``low <= key position - query position <= high``. ``None`` means no bound."""

    low: int | None = None
    high: int | None = None

    @classmethod
    def of(cls, causal: bool, window: int | tuple[int, int] | None) -> Band:
        """Make the band of a causal mask and a window. An int ``w`` is ``(w - 1, 0)``, a pair is ``(left, right)``."""
        left, right = (window - 1, 0) if isinstance(window, int) else window or (None, None)
        return cls(None if left is None else -left, 0 if causal else right)

    @property
    def transposed(self) -> Band:
        """The same pairs with queries and keys exchanged."""
        return Band(None if self.high is None else -self.high, None if self.low is None else -self.low)

    def tile(self, q_min: int, q_max: int, k_min: int, k_max: int) -> Tile:
        """Classify the queries in ``[q_min, q_max]`` x the keys in ``[k_min, k_max]``."""
        least = k_min - q_max
        most = k_max - q_min
        low = least if self.low is None else self.low
        high = most if self.high is None else self.high
        if most < low or least > high:
            return Tile.EMPTY
        return Tile.FULL if low <= least and most <= high else Tile.PARTIAL

    def runs(self, q_min: int, q_max: int, k_pos: np.ndarray) -> Iterator[tuple[int, int, Tile]]:
        """Cut ascending key positions ``[keys]`` into ``(start, stop, tile)`` for queries in ``[q_min, q_max]``.

        There are at most three runs, in order: partial, full, partial. Keys outside them are empty.
        """
        if len(k_pos) and self.tile(q_min, q_max, int(k_pos[0]), int(k_pos[-1])) is Tile.FULL:
            yield 0, len(k_pos), Tile.FULL
            return
        first, last = self._index_range(q_min, q_max, k_pos)
        full_first, full_last = self._index_range(q_max, q_min, k_pos)
        if full_first >= full_last:
            cuts = [(first, last, Tile.PARTIAL)]
        else:
            cuts = [
                (first, full_first, Tile.PARTIAL),
                (full_first, full_last, Tile.FULL),
                (full_last, last, Tile.PARTIAL),
            ]
        yield from (cut for cut in cuts if cut[0] < cut[1])

    def rows(self, q_pos: np.ndarray, k_min: int, k_max: int) -> tuple[int, int]:
        """Find the run of ascending query positions ``[queries]`` that see any key in ``[k_min, k_max]``."""
        return self.transposed._index_range(k_min, k_max, q_pos)

    def partial_rows(self, q_pos: np.ndarray, k_min: int, k_max: int) -> slice:
        """Find a run of ascending query positions. All queries outside it see every key in ``[k_min, k_max]``."""
        first, last = self.transposed._index_range(k_max, k_min, q_pos)  # the queries that see every key
        if first >= last:
            return slice(0, len(q_pos))
        return slice(last if first == 0 else 0, first if last == len(q_pos) else len(q_pos))

    def index_ranges(self, q_low: np.ndarray, q_high: np.ndarray, k_pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find where ascending `k_pos` passes the low bound of `q_low` and the high bound of `q_high`.

        With `q_low` the lowest and `q_high` the highest of some queries, these limit the keys that any of them sees.
        With the two exchanged, they limit the keys that all of them see. Positions and results have one shape.
        """
        first = np.zeros(np.shape(q_low), int)
        last = np.full(np.shape(q_high), len(k_pos))
        if self.low is not None:
            first = np.searchsorted(k_pos, _shifted(q_low, self.low), "left")
        if self.high is not None:
            last = np.searchsorted(k_pos, _shifted(q_high, self.high), "right")
        return first, last

    def _index_range(self, q_for_low: int, q_for_high: int, k_pos: np.ndarray) -> tuple[int, int]:
        first, last = self.index_ranges(np.int64(q_for_low), np.int64(q_for_high), k_pos)
        return int(first), int(last)

    def visible(self, q_pos: np.ndarray, k_pos: np.ndarray) -> np.ndarray:
        """Make the boolean mask ``[queries, keys]``, True where a query sees a key."""
        seen = (
            np.ones((len(q_pos), len(k_pos)), bool)
            if self.high is None
            else k_pos <= _shifted(q_pos, self.high)[:, None]
        )
        if self.low is not None:
            seen &= k_pos >= _shifted(q_pos, self.low)[:, None]
        return seen

    def seen_by(self, queries: Spans, keys: Spans) -> Spans:
        """Select the `keys` that at least one of `queries` sees."""
        return intersection(keys, union(self._visible_range(span, keys) for span in queries)) if keys else ()

    def _visible_range(self, queries: Span, keys: Spans) -> Span:
        start = keys[0][0] if self.low is None else queries[0] + self.low
        stop = keys[-1][1] if self.high is None else queries[1] + self.high
        return start, stop


def segment_tile(q_ids: np.ndarray, k_ids: np.ndarray) -> Tile:
    """Classify a tile under segments. Pairs attend where their ids are equal and not negative."""
    low = max(q_ids.min(), k_ids.min(), 0)
    high = min(q_ids.max(), k_ids.max())
    if low > high:
        return Tile.EMPTY
    same = q_ids.min() == q_ids.max() == k_ids.min() == k_ids.max()
    return Tile.FULL if same else Tile.PARTIAL


def array_tile(mask: np.ndarray) -> Tile:
    """Classify a tile under an array mask, boolean or additive."""
    if mask.dtype == bool:
        return Tile.EMPTY if not mask.any() else Tile.FULL if mask.all() else Tile.PARTIAL
    return Tile.EMPTY if np.all(mask == -np.inf) else Tile.PARTIAL


def _shifted(q_pos: np.ndarray, by: int) -> np.ndarray:
    """Add `by` to `q_pos`, clamped to int32 like the positions that it is compared with."""
    limits = np.iinfo(np.int32)
    return np.clip(q_pos.astype(np.int64) + by, limits.min, limits.max).astype(np.int32)
