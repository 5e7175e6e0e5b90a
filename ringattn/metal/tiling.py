"""How a kernel cuts its work: the sizes of tiles and the threadgroup memory they take."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

THREADGROUP_BYTES = 32_768  # what Metal gives a threadgroup on every Apple GPU
MOST_DIMS = 256
SIMDGROUP = 32  # threads
ROWS = 8  # of a simdgroup matrix


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
    """

    BK: int
    BD: int
    BV: int
    WM: int
    WN: int
    item: int

    @classmethod
    def of(cls, dtype: mx.Dtype, head_dim: int, value_dim: int, rows: int) -> Tiling:
        """The tiling for `rows` query rows that share their keys.

        MLX's own choice where it has one: 32 keys below 128 dims and 16 above; from 256 dims on, or where a float32
        tile would not fit otherwise, two simdgroups split the dims and Q stays in registers.
        """
        widest = max(head_dim, value_dim)
        WN = 2 if widest > (128 if dtype.size == 4 else 192) else 1
        BD, BV = (-(-dim // (ROWS * WN)) * ROWS * WN for dim in (head_dim, value_dim))
        WM = next(WM for WM in (1, 2, 4) if rows <= ROWS * WM or WM == 4)
        small, large = (cls(BK, BD, BV, WM, WN, dtype.size) for BK in (16, 32))
        roomy = dtype.size == 2 if WN == 2 else max(BD, BV) < 128
        return large if roomy and large.threadgroup_bytes <= THREADGROUP_BYTES else small

    @property
    def BQ(self) -> int:  # noqa: N802
        """Query rows in a tile."""
        return ROWS * self.WM

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMDGROUP * self.WM * self.WN

    @property
    def threadgroup_bytes(self) -> int:
        """Threadgroup memory: Q, K or V in turns, and a word for each simdgroup; rows are padded by 16 bytes."""
        pad = 16 // self.item
        queries = self.BQ * (self.BD + pad) if self.WN == 1 else 1
        keys = max(self.BD * (self.BK + pad), self.BK * (self.BV + pad))
        return (queries + keys) * self.item + 4 * self.WM * self.WN
