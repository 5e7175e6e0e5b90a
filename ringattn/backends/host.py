"""The fused kernel for CPUs: NumPy and its BLAS on the memory of the mx arrays, a few megabytes of scratch, no copies.

The work is cut into units of some query rows of one key/value head; threads take units as they come free, and a unit's
arithmetic depends on nothing else, so the bits do not depend on the number of threads. The query heads that share
a key/value head are stacked as rows of one matrix product. A unit goes over its keys tile by tile (Dao et al.,
arXiv 2205.14135), with no mask arithmetic in the tiles that its band shows to be full.

Where |q| |k| (Cauchy-Schwarz) proves that no score can leave +-BOUND, the exponentials need no running maximum: any
reference does that neither overflows nor underflows, and 0 saves two passes over every tile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..mask import Tile
from ..merge import State
from . import Rules, blas
from .hidden import Hidden
from .views import as_float32, view

ROWS = 256  # query rows of a unit, all the heads of its group together
SCORES = ROWS * 512  # scores of a tile: 512 KB, so that a tile stays in a core's second-level cache
DIFFERENTIABLE = False
BOUND = 40.0  # exp(40) is 2e17: times a million keys still far from the end of float32
WORTH = 64  # fewer queries than this do not pay for finding the largest key


class Unit(NamedTuple):
    """Queries ``start:stop`` of key/value head `head` of batch entry `batch`, and what they see."""

    batch: int
    head: int
    start: int
    stop: int
    tiles: tuple[tuple[int, int, Tile], ...]

    @property
    def cost(self) -> int:
        return (self.stop - self.start) * sum(stop - start for start, stop, _ in self.tiles)


def forward(
    q: mx.array, k: mx.array, v: mx.array, q_pos: np.ndarray, k_pos: np.ndarray, rules: Rules, state: State | None
) -> State:
    """Attend and return the state; see `ringattn.backends`."""
    batch, heads, q_len, _ = q.shape
    if state is None:
        state = State.empty(batch, heads, q_len, v.shape[-1])
    mx.eval(q, k, v, *state)
    arrays = view(q), view(k), view(v)
    with np.errstate(all="ignore"):
        largest = _largest_norms(arrays[1]) if q_len >= WORTH and _boundable(rules) else None
    acc, m, l = map(view, state)  # noqa: E741
    job = _Job(*arrays, Hidden.of(rules, q_pos, k_pos), rules, acc, m, l, largest)
    units = sorted(job.units(q_pos, k_pos), key=lambda unit: unit.cost, reverse=True)
    if units:
        with blas.single_threaded():
            _spread(job, units)
    return state


def _spread(job: _Job, units: list[Unit]) -> None:
    """Run all units, on as many threads as there are; each thread takes the next unit when it is done with one."""
    queue, lock = iter(units), threading.Lock()

    def work() -> None:
        with np.errstate(all="ignore"):
            while True:
                with lock:
                    unit = next(queue, None)
                if unit is None:
                    return
                job.run(unit)

    others = [_pool().submit(work) for _ in range(min(blas.threads(), len(units)) - 1)]
    work()
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, blas.threads() - 1), thread_name_prefix="ringattn-host")


_scratch = threading.local()


def _buffer(name: str, size: int) -> np.ndarray:
    """A flat float32 buffer of this thread, kept from call to call."""
    have = getattr(_scratch, name, None)
    if have is None or have.size < size:
        have = np.empty(size, np.float32)
        setattr(_scratch, name, have)
    return have[:size]


@dataclass(frozen=True)
class _Job:
    """One kernel call: NumPy views of its arrays."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    hidden: Hidden
    rules: Rules
    acc: np.ndarray  # the state's
    m: np.ndarray
    l: np.ndarray  # noqa: E741
    largest: np.ndarray | None  # [B, Hkv], the largest norm of a key, where it was worth finding

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def units(self, q_pos: np.ndarray, k_pos: np.ndarray) -> Iterator[Unit]:
        """The units that see any key."""
        step = max(1, ROWS // self.group)
        keys = max(128, SCORES // (self.group * min(step, max(1, len(q_pos)))))
        for start, stop in _pieces(q_pos, step):
            reach = self.rules.band.runs(int(q_pos[start]), int(q_pos[stop - 1]), k_pos)
            tiles = [tile for run in reach for tile in _cut(*run, keys)]
            for batch in range(self.q.shape[0]):
                seen = tuple(self.hidden.refine(batch, start, stop, tiles))
                for head in range(self.k.shape[1] if seen else 0):
                    yield Unit(batch, head, start, stop, seen)

    def run(self, unit: Unit) -> None:
        """Take the state of the unit's rows through all its tiles."""
        group, dim = self.group, self.v.shape[-1]
        rows = (unit.batch, slice(unit.head * group, (unit.head + 1) * group), slice(unit.start, unit.stop))
        queries = self._scaled(self.q[rows])
        acc = _buffer("acc", len(queries) * dim).reshape(len(queries), dim)
        for bounded in (True, False) if self._bounded(unit, queries, rows) else (False,):
            acc[:] = self.acc[rows].reshape(acc.shape)
            m, l = (x[rows].reshape(-1) for x in (self.m, self.l))  # noqa: E741
            if bounded:
                acc *= np.exp(m)[:, None]
                m, l = np.zeros_like(m), l * np.exp(m)  # noqa: E741
            for tile in unit.tiles:
                m, l = self._step(unit, queries, tile, acc, m, l, bounded)  # noqa: E741
            if not bounded or np.isfinite(acc).all():  # values near the end of float32 need the maximum after all
                break
        shape = self.m[rows].shape
        self.acc[rows] = acc.reshape(*shape, dim)
        self.m[rows] = np.where(l == 0, np.float32(-np.inf), m).reshape(shape)
        self.l[rows] = l.reshape(shape)

    def _scaled(self, q: np.ndarray) -> np.ndarray:
        """The query rows of all heads of a group, float32, times the scale: ``[group * queries, D]``."""
        out = _buffer("queries", q.size).reshape(q.shape)
        np.multiply(as_float32(q, out.reshape(-1)), np.float32(self.rules.scale), out=out)
        return out.reshape(-1, q.shape[-1])

    def _bounded(self, unit: Unit, queries: np.ndarray, rows: tuple) -> bool:
        """Whether neither the scores to come nor the state so far leave +-BOUND (also no for NaN)."""
        if self.largest is None:
            return False
        before = self.m[rows]
        least = float(np.sqrt(np.einsum("rd,rd->r", queries, queries).max())) * self.largest[unit.batch, unit.head]
        return bool(least <= BOUND) and bool(np.all((np.abs(before) <= BOUND) | (before == -np.inf)))

    def _step(self, unit, queries, tile, acc, m, l, bounded):  # noqa: E741
        """One tile: fold its keys into `acc`, in place, and return the new `m` and `l`."""
        start, stop, kind = tile
        k = self.k[unit.batch, unit.head, start:stop]
        v = self.v[unit.batch, unit.head, start:stop]
        k, v = as_float32(k, _buffer("k", k.size)), as_float32(v, _buffer("v", v.size))
        p = _buffer("scores", len(queries) * len(k)).reshape(len(queries), len(k))
        np.matmul(queries, k.T, out=p)
        if self.rules.softcap is not None:
            _cap(p, self.rules.softcap)
        visible = self.hidden.apply(unit, start, stop, p) if kind is Tile.PARTIAL else None
        if not bounded:
            top = np.maximum(m, p.max(axis=1))
            base = np.where(top == -np.inf, np.float32(0), top)  # a row that has seen nothing yet
            np.subtract(p, base[:, None], out=p)
            decay = np.exp(m - base)
            acc *= decay[:, None]
            m, l = top, l * decay  # noqa: E741
        np.exp(p, out=p)
        acc += _weighted_values(p, v, visible)
        return m, l + p @ _ones(len(k))


def _boundable(rules: Rules) -> bool:
    """Whether scores are bounded by norms at all: an additive mask may add anything."""
    return rules.mask is None or rules.mask.dtype == mx.bool_


def _largest_norms(k: np.ndarray) -> np.ndarray:
    """The largest Euclidean norm of a key, for each batch entry and head: float32 ``[B, Hkv]``, NaN if there is one."""
    largest = np.zeros(k.shape[:2], np.float32)
    for batch, head in np.ndindex(*k.shape[:2]):
        for start in range(0, k.shape[2], 4096):
            keys = k[batch, head, start : start + 4096]
            keys = as_float32(keys, _buffer("k", keys.size))
            longest = np.einsum("kd,kd->k", keys, keys).max()
            largest[batch, head] = np.maximum(largest[batch, head], np.sqrt(longest))
    return largest


def _cap(scores: np.ndarray, softcap: float) -> None:
    np.divide(scores, np.float32(softcap), out=scores)
    np.tanh(scores, out=scores)
    np.multiply(scores, np.float32(softcap), out=scores)


def _weighted_values(p: np.ndarray, v: np.ndarray, visible: np.ndarray | None) -> np.ndarray:
    """``p @ v``; a key that a row does not see must not reach it even as ``0 * NaN``."""
    out = np.matmul(p, v, out=_buffer("out", len(p) * v.shape[1]).reshape(len(p), v.shape[1]))
    if visible is None or np.isfinite(out).all():
        return out
    broken = ~np.isfinite(v).all(axis=1)
    np.matmul(p, np.where(broken[:, None], np.float32(0), v), out=out)
    for j in np.flatnonzero(broken):
        out += np.where(visible[:, j, None], p[:, j, None] * v[j], np.float32(0))
    return out


@lru_cache(maxsize=8)
def _ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


def _pieces(q_pos: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Cut queries into pieces of at most `step`, and where positions jump by more than that.

    Queries from both ends of the sequence in one piece would make all the keys between them partial.
    """
    jumps = np.flatnonzero(np.diff(q_pos) > step) + 1
    for first, last in zip([0, *jumps], [*jumps, len(q_pos)]):
        yield from ((start, min(start + step, last)) for start in range(int(first), int(last), step))


def _cut(start: int, stop: int, tile: Tile, keys: int) -> list[tuple[int, int, Tile]]:
    return [(a, min(a + keys, stop), tile) for a in range(start, stop, keys)]
