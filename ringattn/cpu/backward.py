"""The gradient of the fused kernel for CPUs; the formulas are in `ringattn.core.gradients`.

Scores and weights are made again, tile by tile, from the saved lse: five matrix products for each tile that the mask
leaves. Units of queries that share key/value heads add to the same dk and dv, so each chain of them is one thread's, in
order; where there are few heads, a head has several chains, with sums of their own that are added up in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from ..core.arrays import as_float32, view
from ..core.gradients import Gradients, Rows
from ..core.masks import Tile
from ..kernels.interface import KernelInputs
from ..kernels.products import finite, marked
from ..kernels.tiles import Piece, Unit
from . import softmax
from .tile_masks import clear
from .work_units import ROWS, Work, buffer, cap, spread, views_of

CHAINS = 8  # at least, if there is work for them


def rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    """Compute what the gradient needs of each query row; see `Kernel.rows`."""
    mx.eval(out, lse, dout, dlse)
    arrays = [view(x) for x in (out, lse, dout, dlse)]
    delta = np.empty(lse.shape, np.float32)
    for start in range(0, lse.shape[2], ROWS):  # a few rows at a time: no float32 copy of it all
        at = (slice(None), slice(None), slice(start, start + ROWS))
        some_out, some_lse, some_dout, some_dlse = (x[at] for x in arrays)
        products = np.einsum("bhld,bhld->bhl", as_float32(some_dout), as_float32(some_out))
        delta[at] = np.where(some_lse == -np.inf, 0, products - some_dlse)
    return Rows(dout, mx.where(lse == -mx.inf, mx.inf, lse), mx.array(delta))


def add_gradients(inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
    """Add to `sums`; see `Kernel.backward`."""
    mx.eval(*rows, [x for x in sums if x is not None])
    into = Gradients(*(None if x is None else view(x) for x in sums))
    work = _Backward(*views_of(inputs), Rows(*map(view, rows)), into)
    chains = work.chains()
    if work.shares_mask:
        spread(work.run_all, [chains])
    else:
        spread(work.run, sorted(chains, key=lambda chain: chain.cost, reverse=True))
    for chain in chains:
        chain.join(into)
    return sums


class Chain(NamedTuple):
    """Units of the same key/value heads, in order, and where their dk and dv add up: ``[heads, Lk, D or Dv]``."""

    units: list[Unit]
    dk: np.ndarray
    dv: np.ndarray
    own: bool  # whether those are its own, and not the call's

    @property
    def cost(self) -> int:
        return sum(unit.cost for unit in self.units)

    def join(self, sums: Gradients) -> None:
        """Add what is the chain's own to the sums of the call."""
        if self.own:
            unit = self.units[0]
            heads = unit.batch, slice(unit.first, unit.last)
            sums.k[heads] += self.dk
            sums.v[heads] += self.dv


@dataclass(frozen=True)
class _Backward(Work):
    """One kernel call, and the sums that it adds to."""

    rows_in: Rows
    sums: Gradients

    tiles: ClassVar[int] = 2  # weights, and the gradient by scores

    @property
    def shares_mask(self) -> bool:
        """Whether units of different heads add to the same numbers of the mask's gradient."""
        mask = self.sums.mask
        return mask is not None and (mask.shape[:2] != self.q.shape[:2] or mask.shape[2] == 1)

    def chains(self) -> list[Chain]:
        """All units; how they are dealt out depends on shapes and masks alone."""
        by_heads: dict[tuple[int, int, int], list[Unit]] = {}
        for unit in self.units():
            by_heads.setdefault((unit.batch, unit.first, unit.last), []).append(unit)
        parts = -(-CHAINS // max(1, len(by_heads)))
        chains = []
        for (batch, first, last), units in by_heads.items():
            for part in range(min(parts, len(units))):
                at = batch, slice(first, last)
                dk, dv = (x[at] if part == 0 else np.zeros_like(x[at]) for x in (self.sums.k, self.sums.v))
                chains.append(Chain(_share(units, part, parts), dk, dv, part > 0))
        return chains

    def run_all(self, chains: list[Chain]) -> None:
        """All of them, one after the other."""
        for chain in chains:
            self.run(chain)

    def run(self, chain: Chain) -> None:
        """Add what the units of `chain` contribute."""
        for unit in chain.units:
            self._unit(unit, chain)

    def _unit(self, unit: Unit, chain: Chain) -> None:
        at, heads = self.rows(unit), unit.last - unit.first
        queries = self.scaled(self.q[at], heads)
        stacked = queries.shape[:2]
        dout = as_float32(self.rows_in.dout[at], partial(buffer, "dout")).reshape(*stacked, -1)
        lse, delta = (x[at].reshape(stacked) for x in self.rows_in[1:])
        dq = buffer("dq", queries.shape)
        dq[:] = 0
        for piece in unit.pieces:
            if not self.hidden.empty(unit, piece):
                rows = self.rows_of(unit, piece)
                parts = (x[:, rows] for x in (queries, dout, lse, delta, dq))
                self._step(unit, piece, chain, *parts)
        dq *= np.float32(self.rules.scale)
        self.sums.q[at] += dq.reshape(self.sums.q[at].shape)

    def _step(self, unit: Unit, piece: Piece, chain: Chain, queries, dout, lse, delta, dq) -> None:
        """Add what one piece contributes."""
        at, keys = self.keys(unit, piece), slice(piece.k_start, piece.k_stop)
        k, v = as_float32(self.k[at], partial(buffer, "k")), as_float32(self.v[at], partial(buffer, "v"))
        rows = Rows(dout, lse, delta)
        found = self._products(unit, piece, queries, k, v, rows)
        if piece.tile is Tile.PARTIAL and not all(np.isfinite(x.sum()) for x in found[:3]):
            found = self._products(unit, piece, queries, k, v, marked(rows, np), careful=True)
        dq += found.q
        chain.dk[:, keys] += found.k
        chain.dv[:, keys] += found.v
        if found.mask is not None:
            self._by_mask(unit, piece, found.mask)

    def _products(self, unit: Unit, piece: Piece, queries, k, v, rows: Rows, careful: bool = False) -> Gradients:
        """What one piece adds; `mask` comes as the whole tile. If `careful`, no NaN passes between hidden pairs."""
        shape = (*queries.shape[:2], k.shape[1])
        p = np.matmul(queries, k.swapaxes(1, 2), out=buffer("scores", shape))
        slope = None
        if self.rules.softcap is not None:
            cap(p, self.rules.softcap)
            slope = 1 - (p / np.float32(self.rules.softcap)) ** 2
        hidden = self.hidden.apply(unit, piece, p) if piece.tile is Tile.PARTIAL else None
        softmax.weights(p, rows.lse)
        ds = np.matmul(rows.dout, v.swapaxes(1, 2), out=buffer("by_scores", shape))
        softmax.by_scores(ds, p, rows.delta)
        if careful and hidden is not None:
            for x in (p, ds) if slope is None else (p, ds, slope):
                clear(x, piece, *hidden)
            queries, k = finite(queries, np), finite(k, np)
        by_mask = ds if self.sums.mask is None or slope is None else ds.copy()
        if slope is not None:
            ds *= slope
        return Gradients(
            np.matmul(ds, k, out=buffer("by_q", queries.shape)),
            np.matmul(ds.swapaxes(1, 2), queries, out=buffer("by_k", k.shape)),
            np.matmul(p.swapaxes(1, 2), rows.dout, out=buffer("by_v", v.shape)),
            None if self.sums.mask is None else by_mask,
        )

    def _by_mask(self, unit: Unit, piece: Piece, ds: np.ndarray) -> None:
        """Add to the gradient of the mask, summed along the axes it is broadcast over."""
        tile = ds.reshape(-1, piece.q_stop - piece.q_start, piece.k_stop - piece.k_start)
        batches, *shape = self.sums.mask.shape
        tile = tile.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
        keys = slice(piece.k_start, piece.k_stop)
        columns = keys if self.rules.columns is None else self.rules.columns[keys]
        heads = slice(unit.first * self.group, unit.last * self.group)
        at = [slice(None) if n == 1 else index for n, index in zip(shape, (heads, slice(*piece[:2]), columns))]
        self.sums.mask[unit.batch if batches > 1 else 0][tuple(at)] += tile


def _share(units: list[Unit], part: int, parts: int) -> list[Unit]:
    """Every `parts`-th unit: under a causal mask a run of neighbours would be heavier than another."""
    return units[part::parts]
