"""The last wave of the forward kernel's blocks.

Tiles with about equal work are done in waves of one tile for each multiprocessor. Where their number is no multiple
of that, the last wave leaves multiprocessors without work. So each of its tiles is cut in runs of its keys, with a
block for each, after Stream-K (Osama et al., arXiv 2301.03598). The warpgroup that ends last merges them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from .calls import kernel_call, on_gpu
from .device import multiprocessors
from .hopper_tiling import WARPGROUP, HopperTiling
from .launch import KernelCall

LEAST_TILES = 4  # of keys in a run, on average
MOST_RUNS = 32
EVEN = 0.8  # the least work of a tile, as a part of the most
LEAST_GAIN = 0.03  # of the kernel's time: with less to gain, no H200 was faster
BLOCK_COST = 2.0  # what a block costs at its start and end, in the time of a tile of keys
RUN_COST = 0.5  # what it costs to merge a run


@dataclass(frozen=True)
class Tail:
    """How the tiles of the last wave are cut.

    Attributes:
        tiling: That of the kernel.
        tiles: How many tiles of query rows there are in all heads.
        whole: How many of these have one block.
        runs: In how many runs the keys of each of the others are cut.
    """

    tiling: HopperTiling
    tiles: int
    whole: int
    runs: int

    @classmethod
    def of(cls, tiling: HopperTiling, reach: np.ndarray, heads: int) -> Tail | None:
        """The best way to cut, or ``None`` where that gains nothing, or some tiles have much more work than others.

        Args:
            tiling: That of the kernel.
            reach: The tiles of keys that each tile of query rows sees, as `key_tile_ranges` returns them.
            heads: The number of heads in all batches.
        """
        keys = reach[:, 3] - reach[:, 0]
        if keys.min() < EVEN * keys.max():
            return None  # the longest come first, so that short ones fill the last wave
        tiles, each = len(reach) * heads, int(keys.mean())
        wave = multiprocessors()
        whole = tiles // wave * wave

        def cost(runs: int) -> float:
            waves = -(-(tiles - whole) * runs // wave)
            return waves * (_share(each, runs) + BLOCK_COST) + (RUN_COST * runs if runs > 1 else 0.0)

        most = max(1, min(MOST_RUNS, each // LEAST_TILES))
        runs = min((runs for runs in range(1, most + 1) if _share(each, runs) * (runs - 1) < each), key=cost)
        total = whole // wave * (each + BLOCK_COST) + cost(1)
        return cls(tiling, tiles, whole, runs) if cost(1) - cost(runs) > LEAST_GAIN * total else None

    def of_trial(self, heads: int) -> Tail:
        """Cut in two every tile of a trial, which has one tile for each head."""
        return replace(self, tiles=heads, whole=0, runs=2)

    @property
    def blocks(self) -> int:
        """Blocks of the kernel."""
        return self.whole + (self.tiles - self.whole) * self.runs

    @property
    def buffers(self) -> dict[str, mx.array]:
        """The kernel's buffers for it; each call puts what `counts` makes in the place of `arrived`."""
        return {"tail": on_gpu(np.array([self.whole, self.runs] * 4, np.int32)), "arrived": mx.zeros(0, mx.int32)}

    @property
    def sums(self) -> tuple[int, ...]:
        """The shape of the sums, float32, that runs leave."""
        return (self.tiles - self.whole, self.tiling.groups, self.runs, self.tiling.BV // 2 + 4, WARPGROUP)

    @cached_property
    def counts(self) -> KernelCall:
        """The call that makes the counts of runs that have ended.

        Each call of the kernel has an array of its own, which it changes. MLX runs kernels side by side, and
        `mx.compile` makes one array of two that are made by equal operations.
        """
        blocks = -(-(self.tiles - self.whole) * self.tiling.groups // WARPGROUP)
        return kernel_call(
            "zeros",
            (),
            {},
            {"unused": on_gpu(np.zeros(8, np.int32))},  # every kernel here has an input
            blocks=(blocks, 1, 1),
            threads=WARPGROUP,
            output_names=["counts"],
            output_shapes=[(blocks * WARPGROUP,)],
            output_dtypes=[mx.int32],
        )


def _share(keys: int, runs: int) -> int:
    """The tiles of keys of each run but the last."""
    return -(-keys // runs)
