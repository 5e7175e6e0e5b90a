"""How a kernel cuts its work: the sizes of tiles and the threadgroup memory they take."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.masks import Band

THREADGROUP_BYTES = 32_768  # what Metal gives a threadgroup on every Apple GPU
MOST_DIMS = 256
SIMDGROUP = 32  # threads
ROWS = 8  # of a simdgroup matrix
TENSOR_ROWS = 16  # of a fragment of the M5's matrix units
TENSOR_DIMS = 128  # at most: out and the scores have to stay in registers
FULL = 4  # simdgroups along the query rows, where there are enough rows


@dataclass(frozen=True)
class Tiling:
    """The tile of one threadgroup; the names are those of the kernel's template arguments.

    Attributes:
        BK: Keys in a tile.
        BD: head_dim, padded to whole matrices.
        BV: The values' head_dim, padded likewise.
        WM: Simdgroups along the query rows, 8 rows each.
        WN: Simdgroups that split the head dims.
        item: Bytes of a number.
        tensor: Whether the products are left to the M5's matrix units.
    """

    BK: int
    BD: int
    BV: int
    WM: int
    WN: int
    item: int
    tensor: bool = False

    @classmethod
    def of(cls, dtype: mx.Dtype, head_dim: int, value_dim: int, rows: int, tensor_ops: bool = False) -> Tiling:
        """The tiling for `rows` query rows that share their keys, on a GPU that has the M5's matrix units or not.

        Those take whole tiles of half precision: few rows are bound by memory, and of a float32 they would drop bits.
        MLX's own choice where it has one: 32 keys below 128 dims and 16 above; from 256 dims on, or where a float32
        tile would not fit otherwise, two simdgroups split the dims and Q stays in registers.
        """
        widest = max(head_dim, value_dim)
        if tensor_ops and dtype.size == 2 and widest <= TENSOR_DIMS and rows >= TENSOR_ROWS * FULL:
            return cls(32, _whole(head_dim, 16), _whole(value_dim, 32), FULL, 1, dtype.size, tensor=True)
        WN = 2 if widest > (128 if dtype.size == 4 else 192) else 1
        BD, BV = (_whole(dim, ROWS * WN) for dim in (head_dim, value_dim))
        WM = next(WM for WM in (1, 2, FULL) if rows <= ROWS * WM or WM == FULL)
        small, large = (cls(BK, BD, BV, WM, WN, dtype.size) for BK in (16, 32))
        roomy = dtype.size == 2 if WN == 2 else max(BD, BV) < 128
        return large if roomy and large.threadgroup_bytes <= THREADGROUP_BYTES else small

    @property
    def BQ(self) -> int:  # noqa: N802
        """Query rows in a tile."""
        return (TENSOR_ROWS if self.tensor else ROWS) * self.WM

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMDGROUP * self.WM * self.WN

    @property
    def threadgroup_bytes(self) -> int:
        """Threadgroup memory: Q, K or V in turns, and a word for each simdgroup; rows are padded by 16 bytes."""
        if self.tensor:
            return 0
        pad = 16 // self.item
        queries = self.BQ * (self.BD + pad) if self.WN == 1 else 1
        keys = max(self.BD * (self.BK + pad), self.BK * (self.BV + pad))
        return (queries + keys) * self.item + 4 * self.WM * self.WN


def _whole(dims: int, part: int) -> int:
    return -(-dims // part) * part


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
