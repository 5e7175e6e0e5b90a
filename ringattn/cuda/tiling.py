"""How a kernel cuts its work: the sizes of tiles, and the shared memory and registers that they take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx

MOST_DIMS = 256
MOST_BLOCKS = 65_535  # of a grid in y and in z
MULTIPROCESSOR_BYTES = 232_448  # of shared memory, on a GPU whose blocks can have as much
RESERVED = 1024  # bytes of shared memory that each block costs beside its own
WARP = 32  # threads
FRAGMENT = 16  # rows of a product of the matrix units
MULTIPROCESSORS = 132  # of an H100; on a smaller GPU a few more blocks wait
SMALL_BLOCKS, LARGE_BLOCKS = 5, 2  # that fit on a multiprocessor, of one warp and of four


def padded(dims: tuple[int, int], unit: int) -> tuple[int, int]:
    """The dims of keys and of values, padded to multiples of `unit`."""
    keys, values = (-(-dim // unit) * unit for dim in dims)
    return keys, values


@dataclass(frozen=True)
class Tiling:
    """The tile of one thread block; upper-case names are those in the kernel.

    Attributes:
        warps: Warps along the query rows.
        fragments: Fragments of 16 rows for each warp.
        stages: 2 where the next keys and values are loaded while these are used, else 1.
        BK: Keys in a tile.
        BD: head_dim, padded to whole fragments.
        BV: The values' head_dim, padded likewise.
        item: Bytes of a number.
    """

    kernel: ClassVar[str] = "forward"
    name: ClassVar[str] = ""

    warps: int
    fragments: int
    stages: int
    BK: int
    BD: int
    BV: int
    item: int

    @classmethod
    def of(cls, dtype: mx.Dtype, head_dim: int, value_dim: int, rows: int, shared_bytes: int) -> Tiling:
        """The tiling for `rows` query rows that share their keys.

        Half precision: 128 x 64 while the output's sums fit in the registers of four warps, beside the scores; above
        128 dims a warp has 16 rows and 32 keys. float32 has no matrix units: smaller tiles. Two stages where two blocks
        still share a multiprocessor.

        Args:
            dtype: The dtype of queries, keys and values.
            head_dim: The number of dims of queries and keys.
            value_dim: The number of dims of values.
            rows: The number of rows.
            shared_bytes: The shared memory that a block can have on this GPU.
        """
        BD, BV = padded((head_dim, value_dim), FRAGMENT)
        wide, half = max(BD, BV) > 128, dtype.size == 2
        most = 4 if half or not wide else 2
        warps = next(n for n in (1, 2, 4) if rows <= FRAGMENT * n or n == most)
        fragments = 2 if half and not wide and rows > FRAGMENT * most else 1
        tiling = cls(warps, fragments, 1, (64 if half else 32) // (2 if wide else 1), BD, BV, dtype.size)
        deep = replace(tiling, stages=2)
        fits = 2 * (deep.shared_memory + RESERVED) <= shared_bytes
        return deep if fits and fragments == 2 and shared_bytes == MULTIPROCESSOR_BYTES else tiling

    @property
    def parts(self) -> tuple[str, ...]:
        """Files of functions that only some kernels need."""
        return "matrix" if self.item == 2 else "scalar", "scores"

    @property
    def defines(self) -> dict[str, int | str]:
        """Constants of the kernel."""
        sizes = {"BK": self.BK, "BD": self.BD, "BV": self.BV}
        return {**sizes, "WARPS": self.warps, "FRAGMENTS": self.fragments, "STAGES": self.stages}

    @property
    def BQ(self) -> int:  # noqa: N802
        """Query rows in a tile."""
        return FRAGMENT * self.warps * self.fragments

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def shared_memory(self) -> int:
        """Bytes of Q, K and V; rows are padded by 16 bytes."""
        keys = self.stages * self.BK
        return (self.BQ + keys) * (self.BD * self.item + 16) + keys * (self.BV * self.item + 16)

    @property
    def blocks(self) -> int:
        """How many blocks fill the GPU."""
        return MULTIPROCESSORS * (LARGE_BLOCKS if self.warps > 1 else SMALL_BLOCKS)
