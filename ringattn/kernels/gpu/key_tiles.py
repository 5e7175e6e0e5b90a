"""Key tiles of each query tile: which are empty, full or partial by the band."""

from __future__ import annotations

import numpy as np

from ...core.arrays import read_only
from ...core.intervals import ends
from ...core.kept import kept
from ...core.masks import Band, Tile


@kept(most=256)
def key_tile_ranges(band: Band, q_pos: np.ndarray, k_pos: np.ndarray, q_rows: int, group: int, BK: int) -> np.ndarray:
    """Compute the key tiles of each query tile, int32 ``[q tiles, 4]``: first, full first, full last, last.

    Key tiles before `first` and from `last` on are empty. Those from `full first` up to `full last` are full. The
    others are partial.

    Args:
        band: The positions each query sees.
        q_pos: Ascending positions ``[Lq]``.
        k_pos: Ascending positions ``[Lk]``.
        q_rows: The number of rows in a query tile.
        group: The number of rows of each query.
        BK: The number of keys in a tile.
    """
    rows = len(q_pos) * group
    if len(q_pos) and len(k_pos) and band.tile(*ends(q_pos), *ends(k_pos)) is Tile.FULL:
        n = len(k_pos)
        return read_only(np.full((-(-rows // q_rows), 4), (0, 0, n // BK, -(-n // BK)), np.int32))
    starts = np.arange(0, rows, q_rows)
    lowest, highest = q_pos[starts // group], q_pos[(np.minimum(starts + q_rows, rows) - 1) // group]
    first, last = band.index_ranges(lowest, highest, k_pos)
    full_first, full_last = band.index_ranges(highest, lowest, k_pos)
    first, last = first // BK, -(-last // BK)
    full_first = np.clip(-(-full_first // BK), first, last)
    full_last = np.clip(full_last // BK, full_first, last)
    return read_only(np.stack([first, full_first, full_last, np.maximum(first, last)], 1).astype(np.int32))
