"""A long problem in pieces of bounded work, lest the GPU's watchdog end it.

queries
  |  1 | 2 | 3 |      Rows are cut first: they share nothing. Where the fewest rows that fill the GPU against all
  |  4 | 5 |          their keys are still too much, keys are cut too, and the state is carried from piece to piece.
  v
     keys ->
"""

from __future__ import annotations

import numpy as np


def pieces(
    tiles: np.ndarray, tile: tuple[int, int], lengths: tuple[int, int], pair_flops: int, budget: int, least_tiles: int
) -> list[tuple[slice, list[slice]]]:
    """Cut a problem so that no piece takes more than `budget`: runs of queries, each with its runs of keys in order.

    Args:
        tiles: What each tile of queries reaches, from `reach`.
        tile: Queries and keys in a tile.
        lengths: Queries and keys in all.
        pair_flops: Floating-point operations for one query with one key, all heads and batches together.
        budget: Operations that a piece may take. A piece of `least_tiles` by one tile is made even if that is more.
        least_tiles: Tiles of queries that fill the GPU.
    """
    (BQ, BK), (q_len, k_len) = tile, lengths
    tile_flops = BQ * BK * pair_flops
    cuts, start = [], 0
    while start < len(tiles):
        stop = _fit(tiles, start, tile_flops, budget, least_tiles)
        first, last = int(tiles[start:stop, 0].min()), int(tiles[start:stop, 3].max())
        if first >= last:  # nothing to see, but rows to write
            first, last = 0, 1
        fits = _work(tiles[start:stop]).sum() * tile_flops <= budget
        step = last - first if fits else max(1, budget // ((stop - start) * tile_flops))
        keys = [slice(k * BK, min(min(k + step, last) * BK, k_len)) for k in range(first, last, step)]
        cuts.append((slice(start * BQ, min(stop * BQ, q_len)), keys))
        start = stop
    return cuts


def _work(tiles: np.ndarray) -> np.ndarray:
    return (tiles[:, 3] - tiles[:, 0]).astype(np.int64)


def _fit(tiles: np.ndarray, start: int, tile_flops: int, budget: int, least: int) -> int:
    """Where a run of query tiles ends that `budget` allows with all its keys; at least `least` of them."""
    work = np.cumsum(_work(tiles[start:])) * tile_flops
    return min(start + max(int(np.searchsorted(work, budget, "right")), least, 1), len(tiles))
