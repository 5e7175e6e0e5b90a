"""The fused forward pass for CPUs, on the memory of the mx arrays, with a few megabytes of scratch.

The compiled kernel (`flash`) runs it where there was a compiler. The rest of this module does the same in NumPy.

The query heads that share a key/value head are stacked as rows of one matrix product. A unit of work processes its keys
tile by tile (Dao et al., arXiv 2205.14135). Tiles that are full by position need no mask arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import mlx.core as mx
import numpy as np

from ..core.arrays import as_float32, view
from ..core.masks import Tile
from ..core.online_softmax import SMALL, State
from ..kernels.interface import KernelInputs, OutputSpec
from . import flash, softmax
from .tile_masks import Piece, WorkUnit
from .work_units import WorkUnits, buffer, cap, numpy_views, run_on_threads


def attend(inputs: KernelInputs, state: State | None) -> State:
    """Attend and return the state. See `Kernel.forward`."""
    batch, heads, q_len = inputs.rows
    if state is None:
        state = State.empty(batch, heads, q_len, inputs.v.shape[-1])
    mx.eval(*state)
    work = _Forward(*numpy_views(inputs), *map(view, state))
    run = work.run if flash.compiled() is None else flash.Compiled(work).forward(work.acc, work.m, work.l)
    run_on_threads(run, work.by_cost())
    return state


def finish(inputs: KernelInputs, output: OutputSpec) -> tuple[mx.array, mx.array]:
    """Attend and return ``(out, lse)``, by the compiled kernel. See `Kernel.finish`."""
    out = _zeros((*inputs.rows, inputs.v.shape[-1]), output.dtype)
    lse = np.full(inputs.rows, -np.inf, np.float32)
    sinks = None if output.sinks is None else np.array(output.sinks.astype(mx.float32))
    if sinks is not None:
        lse[:] = sinks[:, None]  # the lse of rows that see no key
    work = WorkUnits(*numpy_views(inputs))
    run_on_threads(flash.Compiled(work).finish(view(out), lse, sinks), work.by_cost())
    return out, mx.array(lse)


def _zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Make evaluated zeros. For a small array an evaluation by MLX would cost a thread switch."""
    if prod(shape) <= SMALL and dtype != mx.bfloat16:
        return mx.array(np.zeros(shape, np.float32 if dtype == mx.float32 else np.float16))
    out = mx.zeros(shape, dtype)
    mx.eval(out)
    return out


@dataclass(frozen=True)
class _Forward(WorkUnits):
    """One forward call, and the state that it updates."""

    acc: np.ndarray
    m: np.ndarray
    l: np.ndarray

    def run(self, unit: WorkUnit) -> None:
        """Update the state of the unit's rows with all its pieces.

        If the result is not finite, compute it again without products of hidden pairs.
        """
        rows = self.rows(unit)
        queries = self.scaled(self.q[rows], unit.last - unit.first)
        shape = queries.shape[:2]
        acc = buffer("acc", (*shape, self.v.shape[-1]))
        for exclude_hidden in (False, True):
            acc[:] = self.acc[rows].reshape(acc.shape)
            m, l = (x[rows].flatten().reshape(shape) for x in (self.m, self.l))
            for piece in unit.pieces:
                if not self.tile_mask.empty(unit, piece):
                    self._step(unit, piece, queries, acc, m, l, exclude_hidden)
            if np.isfinite(acc).all():
                break
        for x, new in ((self.acc, acc), (self.m, m), (self.l, l)):
            x[rows] = new.reshape(x[rows].shape)

    def _step(self, unit: WorkUnit, piece: Piece, queries, acc, m, l, exclude_hidden: bool) -> None:
        """Merge the keys of one piece into the state of the rows that see them, in place."""
        rows = self.rows_of(unit, piece)
        at = self.keys(unit, piece)
        queries, acc, m, l = (x[:, rows] for x in (queries, acc, m, l))
        k, v = as_float32(self.k[at], partial(buffer, "k")), as_float32(self.v[at], partial(buffer, "v"))
        p = buffer("scores", (*queries.shape[:2], k.shape[1]))
        np.matmul(queries, k.swapaxes(1, 2), out=p)
        if self.rules.softcap is not None:
            cap(p, self.rules.softcap)
        hidden = self.tile_mask.apply(unit, piece, p) if piece.tile is Tile.PARTIAL else None
        acc *= softmax.step(p, m, l)[..., None]
        if exclude_hidden and hidden is not None:
            acc += _visible_product(p, v, piece.q_stop - piece.q_start, *hidden)
        else:
            acc += np.matmul(p, v, out=buffer("out", acc.shape))


def _visible_product(p: np.ndarray, v: np.ndarray, queries: int, hidden: np.ndarray, rows: slice) -> np.ndarray:
    """Compute ``p @ v`` so that NaN and infinity do not reach rows that do not see them, as ``0 * NaN`` would."""
    visible = np.ones((p.shape[0] * p.shape[1] // queries, queries, p.shape[2]), bool)
    visible[:, rows] = ~hidden
    visible = visible.reshape(p.shape)
    nonfinite = ~np.isfinite(v).all(axis=-1)
    out = p @ np.where(nonfinite[..., None], np.float32(0), v)
    for j in np.flatnonzero(nonfinite.any(axis=0)):
        seen = visible[..., j] & nonfinite[:, j, None]
        out += np.where(seen[..., None], p[..., j, None] * v[:, None, j], np.float32(0))
    return out
