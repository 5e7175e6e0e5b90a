"""How the forward kernel for compute capability 9.0 cuts its work: the sizes of tiles, and the memory they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .tiling import FRAGMENT, MULTIPROCESSORS, padded

PANEL = 64  # columns of a panel of a tile
GROUP_ROWS = 64  # of a warpgroup
WARPGROUP = 128  # threads
BARRIER_BYTES, ALIGNMENT = 8, 1024
MANY_ROWS = 6144  # from there on larger tiles leave no multiprocessor idle for long
# Lanes of a warp that say that it is done with a tile, in this kernel and in the gradient's. One does it for all, which
# have met since they read it. For compute-sanitizer's racecheck, which does not follow that, it is 32.
ARRIVALS = 1
REGISTERS = {2: (40, 232), 3: (32, 160)}  # of a thread that loads and of one with rows, by `groups`


@dataclass(frozen=True)
class HopperTiling:
    """The tile of one thread block; upper-case names are those in the kernel.

    Attributes:
        groups: Warpgroups along the query rows.
        stages: Tiles of keys, and of values, in shared memory.
        BK: Keys in a tile.
        BD: head_dim, padded to whole fragments.
        BV: The values' head_dim, padded likewise.
        turns: Whether the warpgroups issue their products in turn.
    """

    kernel: ClassVar[str] = "forward_hopper"
    parts: ClassVar[tuple[str, ...]] = ("matrix", "hopper", "scores", "runs")
    name: ClassVar[str] = ", wgmma"

    groups: int
    stages: int
    BK: int
    BD: int
    BV: int
    turns: bool

    @classmethod
    def of(cls, head_dim: int, value_dim: int, rows: int) -> HopperTiling:
        """The tiling for `rows` query rows of float16 or bfloat16, the fastest of those that were tried on an H200.

        Up to 64 dims a tile of many rows has three warpgroups: the softmax takes longer than the products. Above 128
        dims the output's sums leave registers for the scores of 64 keys.
        """
        BD, BV = padded((head_dim, value_dim), FRAGMENT)
        widest = max(BD, BV)
        if widest > 128:
            return cls(2, 2, 64, BD, BV, turns=False)
        return cls(3 if widest <= 64 and rows >= MANY_ROWS else 2, 3, 128, BD, BV, turns=widest <= 64)

    @property
    def defines(self) -> dict[str, int | str]:
        """Constants of the kernel."""
        loader, row = REGISTERS[self.groups]
        sizes = {"BK": self.BK, "BD": self.BD, "BV": self.BV, "LOADER_REGISTERS": loader, "ROW_REGISTERS": row}
        counts = {"WARPS": 4 * self.groups, "FRAGMENTS": 1, "STAGES": self.stages, "ARRIVALS": ARRIVALS}
        return {**sizes, **counts, "TURNS": int(self.turns)}

    @property
    def BQ(self) -> int:  # noqa: N802
        """Query rows in a tile."""
        return GROUP_ROWS * self.groups

    @property
    def threads(self) -> int:
        """Threads of a block: of the warpgroups with rows, and of the one that loads."""
        return WARPGROUP * (self.groups + 1)

    @property
    def shared_memory(self) -> int:
        """Bytes of Q, K and V in panels, of their barriers, and what the alignment may cost."""
        keys, values = padded((self.BD, self.BV), PANEL)
        numbers = self.BQ * keys + self.stages * self.BK * (keys + values)
        return ALIGNMENT + 2 * numbers + 4 * self.stages * BARRIER_BYTES

    @property
    def blocks(self) -> int:
        """How many blocks fill the GPU."""
        return MULTIPROCESSORS
