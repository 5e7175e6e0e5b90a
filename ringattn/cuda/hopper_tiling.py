"""How the forward kernel for compute capability 9.0 cuts its work."""

from __future__ import annotations

from dataclasses import dataclass

from .tiling import MULTIPROCESSORS

PANEL = 64  # columns of a panel of a tile
GROUP_ROWS = 64  # of a warpgroup
WARPGROUP = 128  # threads
BARRIER_BYTES, ALIGNMENT = 8, 1024


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

    groups: int
    stages: int
    BK: int
    BD: int
    BV: int
    turns: bool = True

    kernel = "forward_hopper"
    parts = ("hopper",)
    bounded = True

    @property
    def defines(self) -> dict[str, int | str]:
        """Constants of the kernel."""
        loader, row = self.registers
        sizes = {"BK": self.BK, "BD": self.BD, "BV": self.BV, "LOADER_REGISTERS": loader, "ROW_REGISTERS": row}
        return {**sizes, "WARPS": self.warps, "FRAGMENTS": 1, "STAGES": self.stages, "TURNS": int(self.turns)}

    @property
    def BQ(self) -> int:  # noqa: N802
        """Query rows in a tile."""
        return GROUP_ROWS * self.groups

    @property
    def warps(self) -> int:
        """Warps along the query rows."""
        return 4 * self.groups

    @property
    def threads(self) -> int:
        """Threads of a block: of the warpgroups with rows, and of the one that loads."""
        return WARPGROUP * (self.groups + 1)

    @property
    def shared_memory(self) -> int:
        """Bytes of Q, K and V in panels, of their barriers, and what the alignment may cost."""
        keys = self.stages * self.BK
        numbers = self.BQ * _panels(self.BD) + keys * (_panels(self.BD) + _panels(self.BV))
        return ALIGNMENT + 2 * numbers + 4 * self.stages * BARRIER_BYTES

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that loads, and of one with rows."""
        return {1: (56, 256), 2: (40, 232), 3: (32, 160)}[self.groups]

    @property
    def blocks(self) -> int:
        """How many blocks fill the GPU."""
        return MULTIPROCESSORS


def _panels(dims: int) -> int:
    return -(-dims // PANEL) * PANEL
