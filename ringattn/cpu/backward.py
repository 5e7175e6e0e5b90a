"""The gradient of the fused kernel for CPUs; the formulas are in `ringattn.core.gradients`.

The compiled kernel (`flash`) runs it where there was a compiler, unless an additive mask needs a gradient. The rest of
this module does the same in NumPy.

Scores and weights are recomputed tile by tile from the saved lse: five matrix products for each tile that is not empty.
Units of queries that share key/value heads add to the same dk and dv. They form a chain, which one thread runs in
order. Where there are few heads, a head has several chains with separate sums, which are added at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from ..autograd.evaluation import evaluate
from ..core.arrays import as_float32, view
from ..core.gradients import Gradients, Rows
from ..core.masks import Tile
from ..kernels.interface import KernelInputs
from ..kernels.products import mark_nonfinite_rows, zero_nonfinite
from . import flash, softmax
from .tile_masks import Piece, WorkUnit, zero_hidden
from .work_units import ROWS, WorkUnits, buffer, cap, numpy_views, run_on_threads

CHAINS = 8  # at least, where there is enough work


def rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    """Compute the values of each query row that the gradient needs. See `Kernel.rows`."""
    evaluate(out, lse, dout, dlse)
    arrays = [view(x) for x in (out, lse, dout, dlse)]
    delta = np.empty(lse.shape, np.float32)
    for start in range(0, lse.shape[2], ROWS):  # a few rows at a time, to avoid a float32 copy of all
        at = (slice(None), slice(None), slice(start, start + ROWS))
        some_out, some_lse, some_dout, some_dlse = (x[at] for x in arrays)
        products = np.einsum("bhld,bhld->bhl", as_float32(some_dout), as_float32(some_out))
        delta[at] = np.where(some_lse == -np.inf, 0, products - some_dlse)
    return Rows(dout, mx.where(lse == -mx.inf, mx.inf, lse), mx.array(delta))


def add_gradients(inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
    """Add the gradients to `sums`. See `Kernel.backward`."""
    mx.eval(*rows, [x for x in sums if x is not None])
    into = Gradients(*(None if x is None else view(x) for x in sums))
    work = _Backward(*numpy_views(inputs), Rows(*map(view, rows)), into)
    chains = work.chains()
    if work.shares_mask:
        run_on_threads(work.run_all, [chains])
    else:
        run = work.run if flash.compiled() is None or into.mask is not None else work.compiled()
        run_on_threads(run, sorted(chains, key=lambda chain: chain.cost, reverse=True))
    for chain in chains:
        chain.add_to(into)
    return sums


class UnitChain(NamedTuple):
    """Units of the same key/value heads, in order, and their sums dk and dv ``[heads, Lk, D or Dv]``."""

    units: list[WorkUnit]
    dk: np.ndarray
    dv: np.ndarray
    has_own_sums: bool  # whether dk and dv are separate from the sums of the call

    @property
    def cost(self) -> int:
        return sum(unit.cost for unit in self.units)

    def add_to(self, sums: Gradients) -> None:
        """Add separate sums to the sums of the call."""
        if self.has_own_sums:
            unit = self.units[0]
            heads = unit.batch, slice(unit.first, unit.last)
            sums.k[heads] += self.dk
            sums.v[heads] += self.dv


@dataclass(frozen=True)
class _Backward(WorkUnits):
    """One backward call, and the sums that it adds to."""

    rows_in: Rows
    sums: Gradients

    tiles: ClassVar[int] = 2  # weights, and the gradient with respect to the scores

    @property
    def shares_mask(self) -> bool:
        """Whether units of different heads add to the same elements of the mask's gradient."""
        mask = self.sums.mask
        return mask is not None and (mask.shape[:2] != self.q.shape[:2] or mask.shape[2] == 1)

    def chains(self) -> list[UnitChain]:
        """Assign all units to chains. The assignment depends on shapes and masks alone."""
        by_heads: dict[tuple[int, int, int], list[WorkUnit]] = {}
        for unit in self.units():
            by_heads.setdefault((unit.batch, unit.first, unit.last), []).append(unit)
        parts = -(-CHAINS // max(1, len(by_heads)))
        chains = []
        for (batch, first, last), units in by_heads.items():
            for part in range(min(parts, len(units))):
                at = batch, slice(first, last)
                dk, dv = (x[at] if part == 0 else np.zeros_like(x[at]) for x in (self.sums.k, self.sums.v))
                chains.append(UnitChain(_share(units, part, parts), dk, dv, part > 0))
        return chains

    def run_all(self, chains: list[UnitChain]) -> None:
        """Run all chains, one after the other."""
        for chain in chains:
            self.run(chain)

    def run(self, chain: UnitChain) -> None:
        """Add the gradients of the units of `chain`."""
        for unit in chain.units:
            self._unit(unit, chain)

    def compiled(self) -> Callable[[UnitChain], None]:
        """Make a function that adds the gradients of a chain by the compiled kernel."""
        backward = flash.Compiled(self).backward(self.rows_in, self.sums.q)

        def run(chain: UnitChain) -> None:
            for unit in chain.units:
                backward(unit, chain.dk, chain.dv)

        return run

    def _unit(self, unit: WorkUnit, chain: UnitChain) -> None:
        at = self.rows(unit)
        heads = unit.last - unit.first
        queries = self.scaled(self.q[at], heads)
        stacked = queries.shape[:2]
        dout = as_float32(self.rows_in.dout[at], partial(buffer, "dout")).reshape(*stacked, -1)
        lse, delta = (x[at].reshape(stacked) for x in self.rows_in[1:])
        dq = buffer("dq", queries.shape)
        dq[:] = 0
        for piece in unit.pieces:
            if not self.tile_mask.empty(unit, piece):
                rows = self.rows_of(unit, piece)
                parts = (x[:, rows] for x in (queries, dout, lse, delta, dq))
                self._step(unit, piece, chain, *parts)
        dq *= np.float32(self.rules.scale)
        self.sums.q[at] += dq.reshape(self.sums.q[at].shape)

    def _step(self, unit: WorkUnit, piece: Piece, chain: UnitChain, queries, dout, lse, delta, dq) -> None:
        """Add the gradients of one piece."""
        at = self.keys(unit, piece)
        keys = slice(piece.k_start, piece.k_stop)
        k, v = as_float32(self.k[at], partial(buffer, "k")), as_float32(self.v[at], partial(buffer, "v"))
        rows = Rows(dout, lse, delta)
        found = self._products(unit, piece, queries, k, v, rows)
        if piece.tile is Tile.PARTIAL and not all(np.isfinite(x.sum()) for x in found[:3]):
            found = self._products(unit, piece, queries, k, v, mark_nonfinite_rows(rows, np), exclude_hidden=True)
        dq += found.q
        chain.dk[:, keys] += found.k
        chain.dv[:, keys] += found.v
        if found.mask is not None:
            self._add_to_dmask(unit, piece, found.mask)

    def _products(
        self, unit: WorkUnit, piece: Piece, queries, k, v, rows: Rows, exclude_hidden: bool = False
    ) -> Gradients:
        """Compute the gradients of one piece, with `mask` as the whole tile.

        `exclude_hidden` keeps NaN from passing between hidden pairs.
        """
        shape = (*queries.shape[:2], k.shape[1])
        p = np.matmul(queries, k.swapaxes(1, 2), out=buffer("scores", shape))
        slope = None
        if self.rules.softcap is not None:
            cap(p, self.rules.softcap)
            slope = 1 - (p / np.float32(self.rules.softcap)) ** 2
        hidden = self.tile_mask.apply(unit, piece, p) if piece.tile is Tile.PARTIAL else None
        softmax.weights(p, rows.lse)
        ds = np.matmul(rows.dout, v.swapaxes(1, 2), out=buffer("dscores", shape))
        softmax.score_gradient(ds, p, rows.delta)
        if exclude_hidden and hidden is not None:
            for x in (p, ds) if slope is None else (p, ds, slope):
                zero_hidden(x, piece, *hidden)
            queries, k = zero_nonfinite(queries, np), zero_nonfinite(k, np)
        dmask = ds if self.sums.mask is None or slope is None else ds.copy()
        if slope is not None:
            ds *= slope
        return Gradients(
            np.matmul(ds, k, out=buffer("piece_dq", queries.shape)),
            np.matmul(ds.swapaxes(1, 2), queries, out=buffer("piece_dk", k.shape)),
            np.matmul(p.swapaxes(1, 2), rows.dout, out=buffer("piece_dv", v.shape)),
            None if self.sums.mask is None else dmask,
        )

    def _add_to_dmask(self, unit: WorkUnit, piece: Piece, ds: np.ndarray) -> None:
        """Add a tile to the gradient of the mask, summed along the axes that the mask is broadcast over."""
        tile = ds.reshape(-1, piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
        batches, *shape = self.sums.mask.shape
        tile = tile.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
        keys = slice(piece.k_start, piece.k_stop)
        columns = keys if self.rules.columns is None else self.rules.columns[keys]
        heads = slice(unit.first * self.group, unit.last * self.group)
        at = [slice(None) if n == 1 else index for n, index in zip(shape, (heads, slice(*piece[:2]), columns))]
        self.sums.mask[unit.batch if batches > 1 else 0][tuple(at)] += tile


def _share(units: list[WorkUnit], part: int, parts: int) -> list[WorkUnit]:
    """Take every `parts`-th unit. Under a causal mask, runs of adjacent units would have unequal work."""
    return units[part::parts]
