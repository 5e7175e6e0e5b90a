"""The gradient by the CUDA kernels: how a problem is cut into calls, so that the memory they need has a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from ..core.gradients import Gradients, Rows
from ..core.intervals import cut
from ..kernels.gpu.self_test import trial_error
from ..kernels.interface import KernelInputs
from . import launch
from .backward import backward_call, collect_call, collect_queries_call, rows_call
from .device import shared_bytes
from .gradient_tiling import QUERY_TILES, GradientTiling

WORKSPACE = 1 << 30  # bytes of dq, or of dk and dv, that one call leaves to be added up
SCORES = 1 << 26  # of a call with an additive mask, whose gradient it leaves for each score
MOST_SPLITS = 32
TRIAL = 40  # rows of a self-test
ENOUGH = 0.97  # of the best use of the GPU: fewer splits need less memory

Span = tuple[int, int]


def rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    """Compute the rows for `gradient`, with plain operations where the kernel does not work. See `Kernel.rows`."""
    arrays = [mx.contiguous(x) for x in (out, lse, dout, dlse)]
    if launch.default():
        few = [_few(x) for x in arrays]
        name = f"rows of the gradient, {out.dtype} and {dout.dtype}, head_dim {out.shape[3]}"
        if not launch.self_test.works(name, lambda: trial_error(lambda: _rows(*few), Rows.of(*few))):
            return Rows.of(*arrays)
    return _rows(*arrays)


def _few(x: mx.array) -> mx.array:
    """Some numbers in the dtype and the number of dims of `x`: its own may not be evaluated in mx.compile."""
    shape = (1, 1, TRIAL, *x.shape[3:])
    return mx.sin(mx.arange(prod(shape))).reshape(shape).astype(x.dtype)


def _rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    return Rows(dout, *launch.run(rows_call(out, lse, dout, dlse)))


def gradient(inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
    """Add the gradients to `sums`. Results stay lazy. See `Kernel.backward`.

    Raises:
        UnusableError: If the kernels do not work here.
    """
    if launch.default():
        launch.self_test.ensure_gradient(_run, inputs)
    return _run(inputs, rows, sums)


def _run(inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
    inputs = inputs.whole()
    rows = Rows(rows.dout.astype(inputs.q.dtype), mx.contiguous(rows.lse), mx.contiguous(rows.delta))
    plan = Plan.of(inputs)
    dq = []
    for queries in cut(inputs.q_pos, plan.queries):
        part = rows_of(rows, queries)
        found = sums._replace(q=sums.q[:, :, slice(*queries)])
        for keys in plan.keys_of(inputs, queries):
            found = plan.call(inputs, part, found, queries, keys)
            rows = Rows(*mx.depends(list(rows), [found.q, found.k, found.v]))  # calls wait for each other: memory
            part = rows_of(rows, queries)
        dq.append(found.q)
        sums = found._replace(q=sums.q)
    return sums._replace(q=mx.concatenate(dq, 2) if len(dq) > 1 else dq[0])


def rows_of(rows: Rows, queries: Span) -> Rows:
    """The part of `rows` for some queries; lse and delta contiguous."""
    dout, lse, delta = (x[:, :, slice(*queries)] for x in rows)
    return Rows(dout, mx.contiguous(lse), mx.contiguous(delta))


@dataclass(frozen=True)
class Plan:
    """Layout of a gradient on a GPU.

    Attributes:
        tiling: The tile of one thread block.
        splits: The number of thread blocks for each head.
        queries: The largest number of queries of a call.
        keys: The largest number of keys of a call.
    """

    tiling: GradientTiling
    splits: int
    queries: int
    keys: int

    @classmethod
    def of(cls, inputs: KernelInputs) -> Plan:
        """Make the plan for some inputs."""
        q, k, v = inputs.q, inputs.k, inputs.v
        heads = q.shape[0] * q.shape[1]
        tiling = GradientTiling.of(q.dtype, q.shape[3], v.shape[3], shared_bytes())
        keys = _most(k.shape[2], WORKSPACE // (4 * heads * (k.shape[3] + v.shape[3])), tiling.KEYS)
        splits = _splits(heads, -(-keys // tiling.KEYS), tiling.blocks)
        queries = min(WORKSPACE // (4 * heads * splits * tiling.BD), QUERY_TILES * tiling.QUERIES)
        if inputs.rules.mask is not None and inputs.rules.mask.dtype != mx.bool_:
            queries = min(queries, max(SCORES // (heads * keys), 1024))
            keys = _most(keys, SCORES // (heads * min(queries, q.shape[2])), tiling.KEYS)
        return cls(tiling, splits, _most(q.shape[2], queries, tiling.QUERIES), keys)

    def keys_of(self, inputs: KernelInputs, queries: Span) -> Iterator[Span]:
        """Cut the keys that some of the `queries` may see, by position."""
        lowest, highest = (np.int64(inputs.q_pos[i]) for i in (queries[0], queries[1] - 1))
        first, last = inputs.rules.band.index_ranges(lowest, highest, inputs.k_pos)
        for start in range(int(first), int(last), self.keys):
            yield start, min(start + self.keys, int(last))

    def call(self, inputs: KernelInputs, rows: Rows, sums: Gradients, queries: Span, keys: Span) -> Gradients:
        """Add the gradients of `queries` x `keys` to `sums`, whose q has these queries alone."""
        part = inputs.part(slice(*queries), slice(*keys))
        dq, dk, dv, *dmask = launch.run(backward_call(part, rows, self.tiling, self.splits))
        scale, columns = inputs.rules.scale, slice(*keys)
        q = launch.run(collect_queries_call(dq, mx.contiguous(sums.q), scale, self.tiling))[0]
        k = _added(sums.k, dk, inputs.group, scale, columns)
        v = _added(sums.v, dv, inputs.group, 1.0, columns)
        mask = add_to_mask(sums.mask, dmask[0], part, queries, keys) if dmask and sums.mask is not None else sums.mask
        return Gradients(q, k, v, mask)


def _most(length: int, limit: int, tile: int) -> int:
    """The largest number of tokens of a call: `length`, or whole tiles within `limit`."""
    return length if length <= limit else max(1, limit // tile) * tile


def _splits(heads: int, key_tiles: int, slots: int) -> int:
    """How many thread blocks share the keys of a head, so that they fill the GPU's `slots` evenly."""

    def used(splits: int) -> float:
        waves = -(-heads * splits // slots)
        return heads * splits / (waves * slots)

    candidates = range(1, max(1, min(MOST_SPLITS, key_tiles)) + 1)
    best = max(map(used, candidates))
    return next(n for n in candidates if used(n) >= ENOUGH * best)


def _collected(parts: mx.array, sums: mx.array, factor: float) -> mx.array:
    return launch.run(collect_call(parts, mx.contiguous(sums), factor))[0]


def _added(sums: mx.array, parts: mx.array, group: int, factor: float, keys: slice) -> mx.array:
    """Add `parts` ``[B, Hq, keys, D]``, summed over each group, to the rows `keys` of `sums` ``[B, Hkv, Lk, D]``."""
    batch, heads = sums.shape[:2]
    found = _collected(parts.reshape(batch * heads, group, -1), sums[:, :, keys], factor)
    if found.shape == sums.shape:
        return found
    return mx.concatenate([sums[:, :, : keys.start], found, sums[:, :, keys.stop :]], 2)


def add_to_mask(sums: mx.array, found: mx.array, part: KernelInputs, queries: Span, keys: Span) -> mx.array:
    """Add the gradient of each score ``[B, Hq, queries, keys]`` to that of the mask, summed where it was broadcast."""
    found = found.sum(axis=[i for i in range(4) if sums.shape[i] == 1], keepdims=True)
    rows = slice(None) if sums.shape[2] == 1 else slice(*queries)
    if sums.shape[3] == 1:
        columns: slice | mx.array = slice(None)
    else:
        columns = slice(*keys) if part.rules.columns is None else mx.array(part.rules.columns)
    return sums.at[:, :, rows, columns].add(found)
