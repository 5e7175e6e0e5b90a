"""Tiling of a kernel's work: sizes of tiles, and dispatches of bounded work."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

THREADGROUP_BYTES = 32_768  # of threadgroup memory, on every Apple GPU
MAX_HEAD_DIM = 256
SIMDGROUP = 32  # threads
ROWS = 8  # of a simdgroup matrix
TENSOR_ROWS = 16  # of a fragment of the M5's matrix units
TENSOR_DIMS = 128  # the most head dims: out and the scores must stay in registers
FULL = 4  # the most simdgroups along the query rows


@dataclass(frozen=True)
class Tiling:
    """The tile of one threadgroup. The names are those of the kernel's template arguments.

    Attributes:
        BK: Keys in a tile.
        BD: The head_dim, padded to whole matrices.
        BV: The value head_dim, padded likewise.
        WM: Simdgroups along the query rows, 8 rows each.
        WN: Simdgroups that split the head dims.
        item: Bytes of a number.
        tensor: Whether the M5's matrix units compute the products.
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
        """Choose the tiling for `rows` query rows that share their keys, with or without the M5's matrix units.

        Matrix units take whole tiles of half precision only: few rows are bound by memory, and float32 would lose bits.
        Otherwise tiles have the sizes of MLX's kernels: 32 keys below 128 dims, else 16. From 256 dims on, or where a
        float32 tile would not fit, two simdgroups split the dims and Q stays in registers.
        """
        widest = max(head_dim, value_dim)
        if tensor_ops and dtype.size == 2 and widest <= TENSOR_DIMS and rows >= TENSOR_ROWS * FULL:
            return cls(32, _round_up(head_dim, 16), _round_up(value_dim, 32), FULL, 1, dtype.size, tensor=True)
        WN = 2 if widest > (128 if dtype.size == 4 else 192) else 1
        BD, BV = (_round_up(dim, ROWS * WN) for dim in (head_dim, value_dim))
        WM = next(WM for WM in (1, 2, FULL) if rows <= ROWS * WM or WM == FULL)
        small, large = (cls(BK, BD, BV, WM, WN, dtype.size) for BK in (16, 32))
        roomy = dtype.size == 2 if WN == 2 else max(BD, BV) < 128
        return large if roomy and large.threadgroup_bytes <= THREADGROUP_BYTES else small

    @property
    def BQ(self) -> int:  # noqa: N802
        """Number of query rows in a tile."""
        return (TENSOR_ROWS if self.tensor else ROWS) * self.WM

    @property
    def threads(self) -> int:
        """Number of threads of a threadgroup."""
        return SIMDGROUP * self.WM * self.WN

    @property
    def threadgroup_bytes(self) -> int:
        """Bytes of threadgroup memory: Q, then K and V in turn, and a word for each simdgroup.

        Rows are padded by 16 bytes.
        """
        if self.tensor:
            return 0
        pad = 16 // self.item
        queries = self.BQ * (self.BD + pad) if self.WN == 1 else 1
        keys = max(self.BD * (self.BK + pad), self.BK * (self.BV + pad))
        return (queries + keys) * self.item + 4 * self.WM * self.WN


def _round_up(dims: int, part: int) -> int:
    return -(-dims // part) * part


def split_dispatches(
    tiles: np.ndarray, tile: tuple[int, int], lengths: tuple[int, int], pair_flops: int, budget: int, least_tiles: int
) -> list[tuple[slice, list[slice]]]:
    """Split the inputs into dispatches of bounded work: runs of queries, each with its runs of keys in order.

    Args:
        tiles: The key tiles of each query tile, from `key_tile_ranges`.
        tile: The numbers of queries and of keys in a tile.
        lengths: The numbers of all queries and of all keys.
        pair_flops: Floating-point operations for one query with one key, all heads and batch entries together.
        budget: Operations allowed in a dispatch. `least_tiles` query tiles by one key tile may exceed it.
        least_tiles: The number of query tiles that fill the GPU.
    """
    BQ, BK = tile
    q_len, k_len = lengths
    tile_flops = BQ * BK * pair_flops
    cuts = []
    start = 0
    while start < len(tiles):
        stop = _run_end(tiles, start, tile_flops, budget, least_tiles)
        first, last = int(tiles[start:stop, 0].min()), int(tiles[start:stop, 3].max())
        if first >= last:  # no visible key, but rows to write
            first, last = 0, 1
        fits = _tiles_seen(tiles[start:stop]).sum() * tile_flops <= budget
        step = last - first if fits else max(1, budget // ((stop - start) * tile_flops))
        keys = [slice(k * BK, min(min(k + step, last) * BK, k_len)) for k in range(first, last, step)]
        cuts.append((slice(start * BQ, min(stop * BQ, q_len)), keys))
        start = stop
    return cuts


def _tiles_seen(tiles: np.ndarray) -> np.ndarray:
    return (tiles[:, 3] - tiles[:, 0]).astype(np.int64)


def _run_end(tiles: np.ndarray, start: int, tile_flops: int, budget: int, least: int) -> int:
    """Find the end of a run of query tiles that fits `budget` with all its keys, with at least `least` tiles."""
    work = np.cumsum(_tiles_seen(tiles[start:])) * tile_flops
    return min(start + max(int(np.searchsorted(work, budget, "right")), least, 1), len(tiles))
