"""Units of work of the CPU kernels, and the threads that run them.

A unit is some query rows of one key/value head, or of several small ones. A free thread takes the next unit. Units are
independent, so the bits do not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar, TypeVar

import mlx.core as mx
import numpy as np

from ..core.arrays import as_float32, view
from ..core.intervals import cut
from ..core.masks import Tile
from ..core.rules import ScoreRules
from ..kernels.interface import KernelInputs
from ..native import blas
from .tile_masks import Piece, TileMask, WorkUnit

ROWS = 512  # query rows in a unit, all heads of a group together
SCORES = ROWS * 1024  # scores in a tile: 2 MB
SMALL = 1 << 18  # heads with fewer scores in all share a unit: a few tokens, a short cache
EDGE = 256  # keys in a piece along the edge of a band

T = TypeVar("T")


def run_on_threads(run: Callable[[T], None], tasks: Iterable[T]) -> None:
    """Run all tasks on all threads. Each thread takes the next task when it has finished one."""
    queue = deque(tasks)

    def work() -> None:
        with np.errstate(all="ignore"):
            while True:
                try:
                    task = queue.popleft()
                except IndexError:
                    return
                run(task)

    with blas.single_threaded():
        others = [_pool().submit(work) for _ in range(min(blas.threads(), len(queue)) - 1)]
        try:
            work()
        finally:
            queue.clear()  # empty already, unless this thread was interrupted
            for other in others:
                other.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, blas.threads() - 1), thread_name_prefix="ringattn-host")


_scratch = threading.local()


def buffer(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a float32 buffer of this thread. Its memory is reused from call to call."""
    size = prod(shape)
    memory = getattr(_scratch, name, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.float32)
        setattr(_scratch, name, memory)
    return memory[:size].reshape(shape)


@dataclass(frozen=True)
class WorkUnits:
    """Inputs of one kernel call as NumPy views, cut into units of work."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_pos: np.ndarray
    k_pos: np.ndarray
    rules: ScoreRules
    tile_mask: TileMask

    tiles: ClassVar[int] = 1  # tiles of scores in memory at a time

    @property
    def group(self) -> int:
        """Number of query heads for each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def queries(self) -> int:
        """Largest number of queries in a unit."""
        return max(1, ROWS // self.group)

    def units(self) -> Iterator[WorkUnit]:
        """Yield the units that see any key."""
        q_pos = self.q_pos
        k_pos = self.k_pos
        kv_heads = self.k.shape[1]
        step = self.queries
        rows = self.group * max(1, min(step, len(q_pos)))
        heads = min(kv_heads, max(1, SMALL // (rows * max(1, len(k_pos)))))
        keys = max(EDGE, SCORES // (self.tiles * heads * rows))
        for start, stop in cut(q_pos, step):
            reach = self.rules.band.runs(int(q_pos[start]), int(q_pos[stop - 1]), k_pos)
            pieces = [piece for run in reach for piece in self._cut_keys(start, stop, run, keys)]
            for batch in range(self.q.shape[0]):
                seen = tuple(self.tile_mask.refine(batch, pieces))
                for first in range(0, kv_heads if seen else 0, heads):
                    yield WorkUnit(batch, first, min(first + heads, kv_heads), start, stop, seen)

    def by_cost(self) -> list[WorkUnit]:
        """List the units, the heaviest first."""
        return sorted(self.units(), key=lambda unit: unit.cost, reverse=True)

    def _cut_keys(self, start: int, stop: int, run: tuple[int, int, Tile], keys: int) -> Iterator[Piece]:
        """Yield pieces of at most `keys` keys.

        Pieces along the edge of a band are narrower, and have only the rows that see any of their keys.
        """
        first, last, tile = run
        trim = tile is Tile.PARTIAL and self.group == 1
        q_pos, k_pos = self.q_pos[start:stop], self.k_pos
        step = min(keys, EDGE) if trim else keys
        for a in range(first, last, step):
            b = min(a + step, last)
            top, bottom = self.rules.band.rows(q_pos, int(k_pos[a]), int(k_pos[b - 1])) if trim else (0, stop - start)
            if top < bottom:  # no query may see keys that lie between two queries
                yield Piece(start + top, start + bottom, a, b, tile)

    def scaled(self, q: np.ndarray, heads: int) -> np.ndarray:
        """Scale the queries and stack the heads of each group: float32 ``[kv heads, group * queries, D]``."""
        out = buffer("queries", q.shape)
        np.multiply(as_float32(q, lambda shape: out), np.float32(self.rules.scale), out=out)
        return out.reshape(heads, -1, q.shape[-1])

    def rows(self, unit: WorkUnit) -> tuple:
        """Return the index of the rows of `unit` in an array ``[B, Hq, Lq, ...]``."""
        return (unit.batch, slice(unit.first * self.group, unit.last * self.group), slice(unit.start, unit.stop))

    def keys(self, unit: WorkUnit, piece: Piece) -> tuple:
        """Return the index of the keys of `piece` in an array ``[B, Hkv, Lk, ...]``."""
        return (unit.batch, slice(unit.first, unit.last), slice(piece.k_start, piece.k_stop))

    def rows_of(self, unit: WorkUnit, piece: Piece) -> slice:
        """Return the rows of `piece` among the stacked rows of `unit`: all, where several heads are stacked."""
        return slice(piece.q_start - unit.start, piece.q_stop - unit.start) if self.group == 1 else slice(None)


def numpy_views(
    inputs: KernelInputs,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, ScoreRules, TileMask]:
    """Evaluate the arrays of `inputs` and return the fields of `WorkUnits`."""
    q, k, v, rules = inputs.q, inputs.k, inputs.v, inputs.rules
    mx.eval(q, k, v)
    tile_mask = TileMask.of(rules, inputs.group, inputs.q_pos, inputs.k_pos)
    return view(q), view(k), view(v), inputs.q_pos, inputs.k_pos, rules, tile_mask


def cap(scores: np.ndarray, softcap: float) -> None:
    """Replace `scores` by ``softcap * tanh(scores / softcap)``, in place."""
    np.divide(scores, np.float32(softcap), out=scores)
    np.tanh(scores, out=scores)
    np.multiply(scores, np.float32(softcap), out=scores)
