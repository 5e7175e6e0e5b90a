"""The fused kernel for CPUs: NumPy and its BLAS on the memory of the mx arrays, a few megabytes of scratch, no copies.

The work is cut into units of some query rows of one key/value head (of several, where they are small); threads take
units as they come free, and a unit's arithmetic depends on nothing else, so the bits do not depend on their number. The
query heads that share a key/value head are stacked as rows of one matrix product. A unit goes over its keys tile by
tile (Dao et al., arXiv 2205.14135), with no mask arithmetic in the tiles that its band shows to be full.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod

import mlx.core as mx
import numpy as np

from ..mask import Tile
from ..merge import State
from . import Rules, blas, ending, softmax
from .hidden import Hidden
from .tiles import Piece, Unit
from .views import as_float32, view

ROWS = 512  # query rows of a unit, all the heads of its group together
SCORES = ROWS * 1024  # scores of a tile: 2 MB
DIFFERENTIABLE = False
SMALL = 1 << 18  # scores up to which the heads of a batch entry go together: a few tokens, a short cache
EDGE = 256  # keys of a piece along the edge of a band


def forward(
    q: mx.array, k: mx.array, v: mx.array, q_pos: np.ndarray, k_pos: np.ndarray, rules: Rules, state: State | None
) -> State:
    """Attend and return the state; see `ringattn.backends`."""
    batch, heads, q_len, _ = q.shape
    if state is None:
        state = State.empty(batch, heads, q_len, v.shape[-1])
    mx.eval(q, k, v, *state)
    arrays = view(q), view(k), view(v)
    acc, m, l = map(view, state)
    hidden = Hidden.of(rules, heads // k.shape[1], q_pos, k_pos)
    job = _Job(*arrays, q_pos, k_pos, rules, hidden, acc, m, l)
    units = sorted(job.units(), key=lambda unit: unit.cost, reverse=True)  # the heaviest first
    if units:
        with blas.single_threaded():
            _spread(job, units)
    return state


finished = ending(forward)


def _spread(job: _Job, units: list[Unit]) -> None:
    """Run all units, on as many threads as there are; each thread takes the next unit when it is done with one."""
    queue = deque(units)

    def work() -> None:
        with np.errstate(all="ignore"):
            while True:
                try:
                    unit = queue.popleft()
                except IndexError:
                    return
                job.run(unit)

    others = [_pool().submit(work) for _ in range(min(blas.threads(), len(units)) - 1)]
    try:
        work()
    finally:
        queue.clear()  # nothing is left in it, unless this thread was interrupted
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, blas.threads() - 1), thread_name_prefix="ringattn-host")


_scratch = threading.local()


def _buffer(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 buffer of this thread, kept from call to call."""
    size = prod(shape)
    have = getattr(_scratch, name, None)
    if have is None or have.size < size:
        have = np.empty(size, np.float32)
        setattr(_scratch, name, have)
    return have[:size].reshape(shape)


@dataclass(frozen=True)
class _Job:
    """One kernel call: NumPy views of its arrays."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_pos: np.ndarray
    k_pos: np.ndarray
    rules: Rules
    hidden: Hidden
    acc: np.ndarray  # the state's
    m: np.ndarray
    l: np.ndarray

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def units(self) -> Iterator[Unit]:
        """The units that see any key."""
        q_pos, k_pos, kv_heads = self.q_pos, self.k_pos, self.k.shape[1]
        step = max(1, ROWS // self.group)
        rows = self.group * max(1, min(step, len(q_pos)))
        heads = min(kv_heads, max(1, SMALL // (rows * max(1, len(k_pos)))))
        keys = max(EDGE, SCORES // (heads * rows))
        for start, stop in _cut_queries(q_pos, step):
            reach = self.rules.band.runs(int(q_pos[start]), int(q_pos[stop - 1]), k_pos)
            pieces = [piece for run in reach for piece in self._cut_keys(start, stop, run, keys)]
            for batch in range(self.q.shape[0]):
                seen = tuple(self.hidden.refine(batch, pieces))
                for first in range(0, kv_heads if seen else 0, heads):
                    yield Unit(batch, first, min(first + heads, kv_heads), start, stop, seen)

    def _cut_keys(self, start: int, stop: int, run: tuple[int, int, Tile], keys: int) -> Iterator[Piece]:
        """Pieces of at most `keys` keys; along a band's edge narrower ones, of only the rows that see any of them."""
        first, last, tile = run
        trim = tile is Tile.PARTIAL and self.group == 1
        q_pos, k_pos = self.q_pos[start:stop], self.k_pos
        step = min(keys, EDGE) if trim else keys
        for a in range(first, last, step):
            b = min(a + step, last)
            top, bottom = self.rules.band.rows(q_pos, int(k_pos[a]), int(k_pos[b - 1])) if trim else (0, stop - start)
            if top < bottom:  # there may be keys between two queries that neither sees
                yield Piece(start + top, start + bottom, a, b, tile)

    def run(self, unit: Unit) -> None:
        """Take the state of the unit's rows through all its pieces."""
        rows = (unit.batch, slice(unit.first * self.group, unit.last * self.group), slice(unit.start, unit.stop))
        queries = self._scaled(self.q[rows], unit.last - unit.first)
        shape = queries.shape[:2]
        acc = _buffer("acc", (*shape, self.v.shape[-1]))
        for careful in (False, True):
            acc[:] = self.acc[rows].reshape(acc.shape)
            m, l = (x[rows].flatten().reshape(shape) for x in (self.m, self.l))
            for piece in unit.pieces:
                if not self.hidden.empty(unit, piece):
                    self._step(unit, piece, queries, acc, m, l, careful)
            if np.isfinite(acc).all():
                break
        for x, new in ((self.acc, acc), (self.m, m), (self.l, l)):
            x[rows] = new.reshape(x[rows].shape)

    def _scaled(self, q: np.ndarray, heads: int) -> np.ndarray:
        """The query rows of all heads of each group, float32, times the scale: ``[kv heads, group * queries, D]``."""
        out = _buffer("queries", q.shape)
        np.multiply(as_float32(q, lambda shape: out), np.float32(self.rules.scale), out=out)
        return out.reshape(heads, -1, q.shape[-1])

    def _step(self, unit: Unit, piece: Piece, queries, acc, m, l, careful: bool) -> None:
        """Fold the keys of one piece into the state of the rows that see them, in place."""
        if self.group == 1:  # else the rows of all heads of the group, and no piece leaves out any
            rows = slice(piece.q_start - unit.start, piece.q_stop - unit.start)
            queries, acc, m, l = (x[:, rows] for x in (queries, acc, m, l))
        at = (unit.batch, slice(unit.first, unit.last), slice(piece.k_start, piece.k_stop))
        k, v = as_float32(self.k[at], partial(_buffer, "k")), as_float32(self.v[at], partial(_buffer, "v"))
        p = _buffer("scores", (*queries.shape[:2], k.shape[1]))
        np.matmul(queries, k.swapaxes(1, 2), out=p)
        if self.rules.softcap is not None:
            _cap(p, self.rules.softcap)
        hidden = self.hidden.apply(unit, piece, p) if piece.tile is Tile.PARTIAL else None
        acc *= softmax.step(p, m, l)[..., None]
        if careful and hidden is not None:
            acc += _values_seen(p, v, piece.q_stop - piece.q_start, *hidden)
        else:
            acc += np.matmul(p, v, out=_buffer("out", acc.shape))


def _cap(scores: np.ndarray, softcap: float) -> None:
    np.divide(scores, np.float32(softcap), out=scores)
    np.tanh(scores, out=scores)
    np.multiply(scores, np.float32(softcap), out=scores)


def _values_seen(p: np.ndarray, v: np.ndarray, queries: int, hidden: np.ndarray, rows: slice) -> np.ndarray:
    """``p @ v`` where values that are not finite do not reach rows that do not see them, as ``0 * NaN`` would."""
    visible = np.ones((p.shape[0] * p.shape[1] // queries, queries, p.shape[2]), bool)
    visible[:, rows] = ~hidden
    visible = visible.reshape(p.shape)
    broken = ~np.isfinite(v).all(axis=-1)
    out = p @ np.where(broken[..., None], np.float32(0), v)
    for j in np.flatnonzero(broken.any(axis=0)):
        seen = visible[..., j] & broken[:, j, None]
        out += np.where(seen[..., None], p[..., j, None] * v[:, None, j], np.float32(0))
    return out


def _cut_queries(q_pos: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Cut queries into runs of at most `step`, and where positions jump by more than that.

    Queries from both ends of the sequence in one run would make all the keys between them partial.
    """
    if len(q_pos) <= 1:
        yield from [(0, 1)] * len(q_pos)
        return
    jumps = np.flatnonzero(np.diff(q_pos) > step) + 1
    for first, last in zip([0, *jumps], [*jumps, len(q_pos)]):
        yield from ((start, min(start + step, last)) for start in range(int(first), int(last), step))
