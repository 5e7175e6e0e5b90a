"""How the gradient of a problem is cut into calls, so that the memory they need has a limit."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..core.gradients import Gradients, Rows
from ..core.kept import Kept
from ..kernels.interface import KernelInputs
from . import launch
from .backward import backward_call, collect_call, collect_queries_call
from .backward_hopper import HeldTiling, held_keys_call, held_queries_call
from .calls import problem
from .device import HOPPER, capability, shared_bytes
from .gradient_tiling import QUERY_TILES, GradientTiling
from .tiling import MULTIPROCESSORS

WORKSPACE = 1 << 30  # bytes of dq, or of dk and dv, that one call leaves to be added up
SCORES = 1 << 26  # of a call with an additive mask, whose gradient it leaves for each score
MOST_SPLITS = 32
ENOUGH = 0.97  # of the best use of the GPU: fewer splits need less memory
WAVES = 3  # blocks for each multiprocessor, from which on they need not be more to fill the GPU evenly

Span = tuple[int, int]


def cut(x: mx.array, tokens: Span) -> mx.array:
    """The part of ``x[:, :, tokens]``, or `x` if that is all."""
    return x if tokens == (0, x.shape[2]) else x[:, :, slice(*tokens)]


def rows_of(rows: Rows, queries: Span) -> Rows:
    """The part of `rows` for some queries, contiguous."""
    return Rows(*(mx.contiguous(cut(x, queries)) for x in rows))


def part_of(inputs: KernelInputs, queries: Span, keys: Span) -> KernelInputs:
    """The part of `inputs` for some queries and keys; q, k and v contiguous."""
    part = inputs.part(slice(*queries), slice(*keys))
    return replace(part, q=mx.contiguous(part.q), k=mx.contiguous(part.k), v=mx.contiguous(part.v))


def plans(inputs: KernelInputs) -> tuple[type[Plan], ...]:
    """The kinds of plan for some inputs, the fastest first."""
    if capability() == HOPPER and inputs.q.dtype.size == 2:
        blocks = inputs.k.shape[0] * inputs.k.shape[1] * (inputs.k.shape[2] // HeldTiling.of_keys(inputs)[0].HELD)
        alone = inputs.group == 1 or blocks >= WAVES * MULTIPROCESSORS
        return HopperPlan if alone else SplitHopperPlan, FusedPlan
    return (FusedPlan,)


@dataclass(frozen=True)
class Plan(abc.ABC):
    """Layout of a gradient on a GPU.

    Attributes:
        queries: The largest number of queries of a call.
        keys: The largest number of keys of a call.
        name: The kind of kernel, in messages.
    """

    queries: int
    keys: int
    name: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def of(cls, inputs: KernelInputs) -> Plan:
        """Make the plan for some inputs."""

    @abc.abstractmethod
    def call(self, inputs: KernelInputs, rows: Rows, sums: Gradients, queries: Span, keys: Span) -> Gradients:
        """Add the gradients of `queries` x `keys` to `sums`, whose q has these queries alone.

        Where q, k and v of `sums` are ``None``, these are all queries and keys, and results are in the dtype of q.
        """

    def queries_of(self, inputs: KernelInputs) -> list[Span]:
        """Cut the queries."""
        return _spans(0, inputs.rows[2], self.queries)

    def keys_of(self, inputs: KernelInputs, queries: Span) -> list[Span]:
        """Cut the keys, if there are many, to those that some of the `queries` may see, by position."""
        lowest, highest = (np.int64(inputs.q_pos[i]) for i in (queries[0], queries[1] - 1))
        first, last = map(int, inputs.rules.band.index_ranges(lowest, highest, inputs.k_pos))
        if first < last and len(inputs.k_pos) <= self.keys:
            first, last = 0, len(inputs.k_pos)  # to copy the sums of a part takes longer than to skip tiles
        return _spans(first, last, self.keys)


@dataclass(frozen=True)
class FusedPlan(Plan):
    """Plan of `backward.cu`.

    Attributes:
        tiling: The tile of one thread block.
        splits: The number of thread blocks for each head.
    """

    tiling: GradientTiling
    splits: int
    name: ClassVar[str] = "mma.sync"

    @classmethod
    def of(cls, inputs: KernelInputs) -> FusedPlan:
        """Make the plan for some inputs."""
        q, k, v = inputs.q, inputs.k, inputs.v
        heads = q.shape[0] * q.shape[1]
        tiling = GradientTiling.of(q.dtype, q.shape[3], v.shape[3], shared_bytes())
        keys = _most(k.shape[2], WORKSPACE // (4 * heads * (k.shape[3] + v.shape[3])), tiling.KEYS)
        splits = _splits(heads, -(-keys // tiling.KEYS), tiling.blocks)
        queries = min(WORKSPACE // (4 * heads * splits * tiling.BD), QUERY_TILES * tiling.QUERIES)
        queries, keys = _within_scores(inputs, queries, keys, tiling.KEYS)
        return cls(_most(q.shape[2], queries, tiling.QUERIES), keys, tiling, splits)

    def call(self, inputs: KernelInputs, rows: Rows, sums: Gradients, queries: Span, keys: Span) -> Gradients:
        part = part_of(inputs, queries, keys)
        dq, dk, dv, *dmask = launch.run(backward_call(part, rows, self.tiling, self.splits))
        scale, columns = inputs.rules.scale, slice(*keys)
        q = launch.run(collect_queries_call(dq, sums.q, part.q, scale, self.tiling))[0]
        k = _added(sums.k, dk, part.k, scale, columns)
        v = _added(sums.v, dv, part.v, 1.0, columns)
        return Gradients(q, k, v, add_to_mask(sums.mask, dmask, part, queries, keys))


@dataclass(frozen=True)
class HopperPlan(Plan):
    """Plan of `backward_hopper.cu` in which a block that holds keys takes all query heads that see them.

    Attributes:
        of_keys: The tiles of the call that holds keys, or of the two.
        of_queries: The tiles of the call that holds queries.
    """

    of_keys: tuple[HeldTiling, ...]
    of_queries: HeldTiling
    name: ClassVar[str] = "wgmma"
    split: ClassVar[bool] = False

    @classmethod
    def of(cls, inputs: KernelInputs) -> HopperPlan:
        """Make the plan for some inputs."""
        k, v = inputs.k, inputs.v
        batch, heads, q_len = inputs.rows if cls.split else (*k.shape[:2], inputs.rows[2])
        of_keys, of_queries = HeldTiling.of_keys(inputs), HeldTiling.of_queries(inputs)
        tile = of_keys[0].HELD
        keys = _most(k.shape[2], WORKSPACE // (4 * batch * heads * (k.shape[3] + v.shape[3])), tile)
        queries, keys = _within_scores(inputs, q_len, keys, tile)
        return cls(_most(q_len, queries, of_queries.HELD), keys, of_keys, of_queries)

    def call(self, inputs: KernelInputs, rows: Rows, sums: Gradients, queries: Span, keys: Span) -> Gradients:
        part = part_of(inputs, queries, keys)
        before = None if sums.q is None else mx.contiguous(sums.q)
        q, *dmask = launch.run(held_queries_call(part, rows, self.of_queries, before))
        k, v = self._of_keys(part, rows, sums, keys)
        return Gradients(q, k, v, add_to_mask(sums.mask, dmask, part, queries, keys))

    def _of_keys(self, part: KernelInputs, rows: Rows, sums: Gradients, keys: Span) -> tuple[mx.array, mx.array]:
        """Add dk and dv of a call to `sums`."""
        if sums.k is None or sums.v is None:
            before = None
        else:
            before = {"dk": mx.contiguous(cut(sums.k, keys)), "dv": mx.contiguous(cut(sums.v, keys))}
        dk, dv = self._found(part, rows, part.k.shape[1], before)
        return _replaced(sums.k, dk, slice(*keys)), _replaced(sums.v, dv, slice(*keys))

    def _found(
        self, part: KernelInputs, rows: Rows, heads: int, before: dict[str, mx.array] | None
    ) -> tuple[mx.array, mx.array]:
        """Run the calls that hold keys, and return dk and dv."""
        calls = [held_keys_call(part, rows, tiling, heads, before) for tiling in self.of_keys]
        dk, dv = (x for call in calls for x in launch.run(call))
        return dk, dv


class SplitHopperPlan(HopperPlan):
    """Plan in which a block takes one query head, so that there are more blocks; a second kernel adds up their sums."""

    name: ClassVar[str] = "wgmma, one query head a block"
    split: ClassVar[bool] = True

    def _of_keys(self, part: KernelInputs, rows: Rows, sums: Gradients, keys: Span) -> tuple[mx.array, mx.array]:
        dk, dv = self._found(part, rows, part.rows[1], None)
        scale, columns = part.rules.scale, slice(*keys)
        return _added(sums.k, dk, part.k, scale, columns), _added(sums.v, dv, part.v, 1.0, columns)


def planned(kind: type[Plan], inputs: KernelInputs) -> tuple[Plan, list[tuple[Span, Span]]]:
    """The plan for some inputs, and the queries and keys of each call; kept for equal shapes, rules and positions."""

    def make() -> tuple[Plan, list[tuple[Span, Span]]]:
        plan = kind.of(inputs)
        return plan, [(queries, keys) for queries in plan.queries_of(inputs) for keys in plan.keys_of(inputs, queries)]

    return _planned.get((kind, problem(inputs)), (inputs.q_pos, inputs.k_pos), make)


_planned: Kept[tuple[Plan, list[tuple[Span, Span]]]] = Kept(64)


def _spans(start: int, stop: int, most: int) -> list[Span]:
    """Cut a range of tokens into spans of at most `most`."""
    return [(at, min(at + most, stop)) for at in range(start, stop, most)]


def _within_scores(inputs: KernelInputs, queries: int, keys: int, tile: int) -> tuple[int, int]:
    """The queries and keys of a call, fewer where an additive mask has a gradient for each score."""
    batch, heads, q_len = inputs.rows
    if inputs.rules.mask is None or inputs.rules.mask.dtype == mx.bool_:
        return queries, keys
    queries = min(queries, max(SCORES // (batch * heads * keys), 1024))
    return queries, _most(keys, SCORES // (batch * heads * min(queries, q_len)), tile)


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


def _added(sums: mx.array | None, parts: mx.array, like: mx.array, factor: float, keys: slice) -> mx.array:
    """Add `parts` ``[B, Hq, keys, D]``, summed over each group, to the rows `keys` of `sums` ``[B, Hkv, Lk, D]``.

    `like` are these keys or their values.
    """
    parts = parts.reshape(like.shape[0] * like.shape[1], -1, like.shape[2] * like.shape[3])
    before = None if sums is None else sums[:, :, keys]
    return _replaced(sums, launch.run(collect_call(parts, before, like, factor))[0], keys)


def _replaced(sums: mx.array | None, found: mx.array, keys: slice) -> mx.array:
    """Replace the rows `keys` of `sums` by `found`."""
    if sums is None or found.shape == sums.shape:
        return found
    return mx.concatenate([sums[:, :, : keys.start], found, sums[:, :, keys.stop :]], 2)


def add_to_mask(
    sums: mx.array | None, found: list[mx.array], part: KernelInputs, queries: Span, keys: Span
) -> mx.array | None:
    """Add the gradient of each score ``[B, Hq, queries, keys]`` to that of the mask, summed where it was broadcast.

    `found` is empty where no mask has a gradient.
    """
    if sums is None or not found:
        return sums
    added = found[0].sum(axis=[i for i in range(4) if sums.shape[i] == 1], keepdims=True)
    rows = slice(None) if sums.shape[2] == 1 else slice(*queries)
    if sums.shape[3] == 1:
        columns: slice | mx.array = slice(None)
    else:
        columns = slice(*keys) if part.rules.columns is None else mx.array(part.rules.columns)
    return sums.at[:, :, rows, columns].add(added)
