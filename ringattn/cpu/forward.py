"""The fused kernel for CPUs: NumPy and its BLAS on the memory of the mx arrays, a few megabytes of scratch, no copies.

The query heads that share a key/value head are stacked as rows of one matrix product. A unit of work goes over its keys
tile by tile (Dao et al., arXiv 2205.14135), with no mask arithmetic in the tiles that its band shows to be full.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from ..core.arrays import as_float32, view
from ..core.masks import Tile
from ..core.online_softmax import State
from ..kernels.interface import KernelInputs
from ..kernels.tiles import Piece, Unit
from . import softmax
from .work_units import Work, buffer, cap, spread, views_of


def attend(inputs: KernelInputs, state: State | None) -> State:
    """Attend and return the state; see `Kernel.forward`."""
    batch, heads, q_len = inputs.rows
    if state is None:
        state = State.empty(batch, heads, q_len, inputs.v.shape[-1])
    mx.eval(*state)
    work = _Forward(*views_of(inputs), *map(view, state))
    spread(work.run, sorted(work.units(), key=lambda unit: unit.cost, reverse=True))  # the heaviest first
    return state


@dataclass(frozen=True)
class _Forward(Work):
    """One kernel call, and the state that it updates."""

    acc: np.ndarray
    m: np.ndarray
    l: np.ndarray

    def run(self, unit: Unit) -> None:
        """Take the state of the unit's rows through all its pieces."""
        rows = self.rows(unit)
        queries = self.scaled(self.q[rows], unit.last - unit.first)
        shape = queries.shape[:2]
        acc = buffer("acc", (*shape, self.v.shape[-1]))
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

    def _step(self, unit: Unit, piece: Piece, queries, acc, m, l, careful: bool) -> None:
        """Fold the keys of one piece into the state of the rows that see them, in place."""
        rows, at = self.rows_of(unit, piece), self.keys(unit, piece)
        queries, acc, m, l = (x[:, rows] for x in (queries, acc, m, l))
        k, v = as_float32(self.k[at], partial(buffer, "k")), as_float32(self.v[at], partial(buffer, "v"))
        p = buffer("scores", (*queries.shape[:2], k.shape[1]))
        np.matmul(queries, k.swapaxes(1, 2), out=p)
        if self.rules.softcap is not None:
            cap(p, self.rules.softcap)
        hidden = self.hidden.apply(unit, piece, p) if piece.tile is Tile.PARTIAL else None
        acc *= softmax.step(p, m, l)[..., None]
        if careful and hidden is not None:
            acc += _values_seen(p, v, piece.q_stop - piece.q_start, *hidden)
        else:
            acc += np.matmul(p, v, out=buffer("out", acc.shape))


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
