"""Which tiles of keys a tile of queries reaches, by position."""

from __future__ import annotations

import numpy as np

from ..mask import Band


def reach(band: Band, q_pos: np.ndarray, k_pos: np.ndarray, q_rows: int, group: int, BK: int) -> np.ndarray:
    """For each tile of queries the tiles of keys, int32 ``[q tiles, 4]``: first, full first, full last, last.

    Tiles before `first` and from `last` on are empty, from `full first` up to `full last` they are full, the others
    are partial.

    Args:
        band: The positions each query sees.
        q_pos: Ascending positions ``[Lq]``.
        k_pos: Ascending positions ``[Lk]``.
        q_rows: Rows in a tile of queries.
        group: Rows that each query has.
        BK: Keys in a tile.
    """
    rows = len(q_pos) * group
    starts = np.arange(0, rows, q_rows)
    lowest, highest = q_pos[starts // group], q_pos[(np.minimum(starts + q_rows, rows) - 1) // group]
    first, last = band.reach(lowest, highest, k_pos)
    full_first, full_last = band.reach(highest, lowest, k_pos)
    first, last = first // BK, -(-last // BK)
    full_first = np.clip(-(-full_first // BK), first, last)
    full_last = np.clip(full_last // BK, full_first, last)
    return np.stack([first, full_first, full_last, np.maximum(first, last)], 1).astype(np.int32)
