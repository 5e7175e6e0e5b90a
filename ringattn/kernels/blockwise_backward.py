"""The gradient by blocks of queries x keys: five matrix products of MLX for each block, with elementwise work between.

It is for GPUs, where MLX's products are faster than a fused backward kernel (ml-explore/mlx PR 3241: the kernel has
0.36-0.76 of their speed on an M3 Max). All products are in float32, so that nothing is rounded between them. A block
holds at most four arrays of `SCORES` numbers, and two blocks run at a time, so that no dispatch is long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..autograd.evaluation import InFlight
from ..core.gradients import Gradients, Rows
from ..core.intervals import cut
from ..core.masks import Tile, segment_tile
from ..core.rules import ScoreRules
from .interface import KernelInputs
from .products import mark_nonfinite_rows, zero_nonfinite

SCORES = 1 << 24  # in a block, all heads and batch entries together: 64 MB
KEYS = 1024  # in a block
MIN_QUERIES = 64  # in a block, for any number of heads

Span = tuple[int, int]


@dataclass(frozen=True)
class ScoreBlock:
    """Inputs of the elementwise work on one block.

    Attributes:
        scores: ``q k^T`` ``[B, Hq, queries, keys]``, float32, not yet scaled.
        dweights: ``dout v^T``, in the same shape.
        rows: The block's part of the rows.
        q_pos, k_pos: The positions of the block's tokens.
        rules: The rules, with the block's part of the mask (columns in the order of the keys) and of the segments.
        partial: Whether any pair may be hidden.
    """

    scores: mx.array
    dweights: mx.array
    rows: Rows
    q_pos: np.ndarray
    k_pos: np.ndarray
    rules: ScoreRules
    partial: bool

    def part(self, most: int) -> ScoreBlock:
        """Cut out the first `most` rows and keys of the first head."""
        rules = self.rules
        mask = self.rules.mask
        segments = self.rules.segments
        if mask is not None:
            mask = mask[:1, :1, :most, :most]
        if segments is not None:
            segments = segments[0][:1, :most], segments[1][:1, :most]
        return ScoreBlock(
            self.scores[:1, :1, :most, :most],
            self.dweights[:1, :1, :most, :most],
            Rows(*(x[:1, :1, :most] for x in self.rows)),
            self.q_pos[:most],
            self.k_pos[:most],
            replace(rules, mask=mask, segments=segments),
            self.partial,
        )


class Weights(NamedTuple):
    """Results of the elementwise work: the weights, and the gradients with respect to ``q k^T`` and the mask."""

    weights: mx.array
    dproducts: mx.array
    dmask: mx.array | None


Elementwise = Callable[[ScoreBlock], Weights]


def gradient(inputs: KernelInputs, rows: Rows, sums: Gradients, elementwise: Elementwise) -> Gradients:
    """Add the gradients to `sums`, block by block. See `Kernel.backward`."""
    blocks = _Blocks(inputs, rows, elementwise)
    queries, keys = list(cut(inputs.q_pos, blocks.queries)), list(cut(inputs.k_pos, KEYS))
    dq = [sums.q[:, :, slice(*a)] for a in queries]
    dk = list[mx.array]()
    dv = list[mx.array]()
    dmask = sums.mask
    in_flight = InFlight()
    for b in keys:
        block_dk, block_dv = sums.k[:, :, slice(*b)], sums.v[:, :, slice(*b)]
        for i, a in enumerate(queries):
            tile = blocks.tile(a, b)
            if tile is Tile.EMPTY:
                continue
            added = blocks.block(a, b, tile is Tile.PARTIAL)
            dq[i] = dq[i] + added.q
            block_dk = block_dk + added.k
            block_dv = block_dv + added.v
            if dmask is not None:
                dmask = blocks.add_to_mask(dmask, a, b, added.mask)
            dq[i], block_dk, block_dv, *mask = in_flight.add(
                [dq[i], block_dk, block_dv, *([] if dmask is None else [dmask])]
            )
            dmask = mask[0] if mask else None
        dk.append(block_dk)
        dv.append(block_dv)
    return Gradients(_joined(dq, sums.q), _joined(dk, sums.k), _joined(dv, sums.v), dmask)


def _joined(parts: list[mx.array], otherwise: mx.array) -> mx.array:
    return mx.concatenate(parts, 2) if parts else otherwise


@dataclass(frozen=True)
class _Blocks:
    """Inputs of a gradient, and their blocks."""

    inputs: KernelInputs
    rows: Rows
    elementwise: Elementwise

    @property
    def queries(self) -> int:
        """Number of queries in a block."""
        batch, heads, q_len, _ = self.inputs.q.shape
        keys = max(1, min(KEYS, self.inputs.k.shape[2]))
        return max(MIN_QUERIES, SCORES // max(1, batch * heads * keys))

    def tile(self, a: Span, b: Span) -> Tile:
        """Classify queries `a` x keys `b` under all rules."""
        (first, stop), (k_first, k_stop) = a, b
        ends = [int(x) for x in (*self.inputs.q_pos[[first, stop - 1]], *self.inputs.k_pos[[k_first, k_stop - 1]])]
        tile = self.inputs.rules.band.tile(*ends)
        if self.inputs.rules.mask is not None:
            tile = tile & Tile.PARTIAL
        if tile is not Tile.EMPTY and self.inputs.rules.segments is not None and self.inputs.q.shape[0]:
            q_ids, k_ids = (np.array(ids[:, slice(*x)]) for ids, x in zip(self.inputs.rules.segments, (a, b)))
            tiles = {segment_tile(*ids) for ids in zip(q_ids, k_ids)}
            tile = tile & (tiles.pop() if len(tiles) == 1 else Tile.PARTIAL)
        return tile

    def block(self, a: Span, b: Span, partial: bool) -> Gradients:
        """Compute the gradients of queries `a` x keys `b`, with `mask` as ``[B, Hq, queries, keys]``."""
        rows, keys = slice(*a), slice(*b)
        per_query = Rows(*(x[:, :, rows] for x in self.rows))
        if partial:
            per_query = mark_nonfinite_rows(per_query)
        q, dout = self._stack_heads(self.inputs.q[:, :, rows]), self._stack_heads(per_query.dout)
        k, v = (x[:, :, keys].astype(mx.float32) for x in (self.inputs.k, self.inputs.v))
        heads = (q.shape[0], self.inputs.q.shape[1], a[1] - a[0])
        scores, dweights = ((x @ y.swapaxes(-1, -2)).reshape(*heads, -1) for x, y in ((q, k), (dout, v)))
        found = self.elementwise(
            ScoreBlock(
                scores,
                dweights,
                per_query,
                self.inputs.q_pos[rows],
                self.inputs.k_pos[keys],
                self._rules(a, b),
                partial,
            )
        )
        weights, dproducts = (x.reshape(*q.shape[:3], -1) for x in (found.weights, found.dproducts))
        if partial:
            q, k = zero_nonfinite(q), zero_nonfinite(k)
        return Gradients(
            (dproducts @ k).reshape(*heads, -1),
            dproducts.swapaxes(-1, -2) @ q,
            weights.swapaxes(-1, -2) @ dout,
            found.dmask,
        )

    def _stack_heads(self, x: mx.array) -> mx.array:
        """Stack the rows of the heads of each group into one matrix: float32 ``[B, Hkv, group * queries, D]``."""
        return x.astype(mx.float32).reshape(x.shape[0], self.inputs.k.shape[1], -1, x.shape[3])

    def _rules(self, a: Span, b: Span) -> ScoreRules:
        mask, segments = self.inputs.rules.mask, self.inputs.rules.segments
        if mask is not None:
            mask = mask if mask.shape[2] == 1 else mask[:, :, slice(*a)]
            mask = mask if mask.shape[3] == 1 else mask[..., self._columns(b)]
        if segments is not None:
            segments = segments[0][:, slice(*a)], segments[1][:, slice(*b)]
        return replace(self.inputs.rules, mask=mask, columns=None, segments=segments)

    def _columns(self, b: Span) -> slice | mx.array:
        return slice(*b) if self.inputs.rules.columns is None else mx.array(self.inputs.rules.columns[slice(*b)])

    def add_to_mask(self, dmask: mx.array, a: Span, b: Span, added: mx.array | None) -> mx.array:
        """Add a block's part to `dmask`, summed along the axes that the mask is broadcast over."""
        assert added is not None
        added = added.sum(axis=[i for i in range(4) if dmask.shape[i] == 1], keepdims=True)
        rows = slice(None) if dmask.shape[2] == 1 else slice(*a)
        columns = slice(None) if dmask.shape[3] == 1 else self._columns(b)
        return dmask.at[:, :, rows, columns].add(added)
