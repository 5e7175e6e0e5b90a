"""How the gradient's kernel cuts its work."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .tiling import FRAGMENT, MULTIPROCESSOR_BYTES, MULTIPROCESSORS, RESERVED, WARP, padded

REGISTERS = 65_536  # of a multiprocessor; a thread of this kernel has up to 256
QUERY_TILES = 2048  # of a call: a block has a byte for each


@dataclass(frozen=True)
class GradientTiling:
    """The tile of one thread block; names in capitals are those in the kernel.

    Attributes:
        warps: Warps of a block. One has 16 keys, or, with two `halves`, two have 16 keys and half of the dims each.
        halves: 1 or 2.
        QUERIES: Queries in a tile.
        fragments: Fragments of 16 queries in a warp's part of dq.
        stages: 2 where the next queries are loaded while these are computed, else 1.
        BD: head_dim, padded to whole fragments.
        BV: The values' head_dim, padded likewise.
        item: Bytes of a number.
    """

    warps: int
    halves: int
    QUERIES: int
    fragments: int
    stages: int
    BD: int
    BV: int
    item: int

    @classmethod
    def of(cls, dtype: mx.Dtype, head_dim: int, value_dim: int, shared_bytes: int) -> GradientTiling:
        """The largest tiling that fits into `shared_bytes` and, for the sums of dk and dv, into registers."""
        halves = 1 if max(head_dim, value_dim) <= 128 else 2
        BD, BV = padded((head_dim, value_dim), FRAGMENT * halves)
        size = next(i for i, most in enumerate((64, 128, 256)) if max(BD, BV) <= most)
        # (warps, queries, stages): half precision on GPUs with much shared memory, and on others; float32
        large = ((8, 128, 2), (8, 64, 2), (8, 64, 1))[size]
        small = ((4, 64, 2), (4, 64, 1), (4, 32, 1))[size]
        single = ((4, 32, 1), (2, 32, 1), (2, 16, 1))[size]
        for warps, queries, stages in (large, small) if dtype.size == 2 else (single,):
            tiling = cls(warps, halves, queries, min(2, queries // FRAGMENT), stages, BD, BV, dtype.size)
            if tiling.shared_memory <= shared_bytes:
                return tiling
        raise AssertionError(f"{tiling} needs {tiling.shared_memory} bytes of {shared_bytes}")

    @property
    def KEYS(self) -> int:  # noqa: N802
        """Keys in a tile."""
        return FRAGMENT * self.warps // self.halves

    @property
    def q_warps(self) -> int:
        """Warps along the queries of dq."""
        return self.QUERIES // FRAGMENT // self.fragments

    @property
    def d_warps(self) -> int:
        """Warps along the dims of dq."""
        return self.warps // self.q_warps

    @property
    def chunks(self) -> int:
        """Chunks of 16 dims of dq that a warp has."""
        return -(-self.BD // (FRAGMENT * self.d_warps))

    def dq_numbers(self, q_len: int) -> int:
        """Numbers of dq of one head, in whole tiles and with padded dims."""
        return -(-q_len // self.QUERIES) * self.QUERIES * FRAGMENT * self.d_warps * self.chunks

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def shared_memory(self) -> int:
        """Bytes of K, V, the stages of Q, dout, lse and delta, two ds, p if there are two halves, and notes."""
        rows = self.KEYS + self.stages * self.QUERIES
        tiles = rows * ((self.BD + self.BV) * self.item + 32)
        weights = (1 + self.halves) * self.KEYS * (self.QUERIES * self.item + 16)
        return tiles + weights + 4 * (self.stages * 2 * self.QUERIES + self.KEYS) + QUERY_TILES

    @property
    def blocks(self) -> int:
        """How many blocks run at a time on an H100."""
        return MULTIPROCESSORS * min(
            MULTIPROCESSOR_BYTES // (self.shared_memory + RESERVED), REGISTERS // (self.threads * 256)
        )
