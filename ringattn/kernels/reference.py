"""Attention in plain mx operations: the oracle of the other kernels, and the fallback on other GPUs.

Queries and keys are processed in chunks: at most ``[B, Hq, QUERIES, KEYS]`` scores are in memory at a time.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import mlx.core as mx

from ..autograd.custom_function import inside_custom_op
from ..autograd.evaluation import evaluated_copies
from ..core.gradients import Gradients, Rows
from ..core.masks import Tile
from ..core.online_softmax import State, merge_states
from ..core.rules import ScoreRules
from . import blockwise_backward, products
from .interface import Kernel, KernelInputs

QUERIES = 1024
KEYS = 2048


class ReferenceKernel(Kernel):
    """Plain mx operations. In `attention` MLX derives the gradient; in a ring it is computed block by block."""

    name = "reference"
    differentiable = True

    def forward(self, inputs: KernelInputs, state: State | None = None) -> State:
        inputs.arrive()
        batch, heads, q_len = inputs.rows
        if state is None:
            state = State.empty(batch, heads, q_len, inputs.v.shape[-1])
        parts = [_rows(inputs, state, slice(start, min(start + QUERIES, q_len))) for start in range(0, q_len, QUERIES)]
        return State(*(mx.concatenate(list(x), 2) for x in zip(*parts))) if len(parts) > 1 else (parts or [state])[0]

    def backward(self, inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
        inputs.arrive()
        return blockwise_backward.gradient(inputs, rows, sums, elementwise)


def elementwise(block: blockwise_backward.ScoreBlock) -> blockwise_backward.Weights:
    """Compute the elementwise work of a block of the gradient."""
    rules = block.rules
    additive = rules.mask is not None and rules.mask.dtype != mx.bool_
    scores = block.scores * rules.scale
    slope = mx.array(rules.scale)
    if rules.softcap is not None:
        scores = mx.tanh(scores / rules.softcap)
        slope = slope * (1 - scores * scores)
        scores = scores * rules.softcap
    seen = mx.array(rules.band.visible(block.q_pos, block.k_pos)) if block.partial else None
    if rules.segments is not None:
        q_ids, k_ids = rules.segments[0][:, None, :, None], rules.segments[1][:, None, None, :]
        seen = _both(seen, (q_ids == k_ids) & (q_ids >= 0))
    if rules.mask is not None:
        if additive:
            scores = scores + rules.mask.astype(mx.float32)
        seen = _both(seen, rules.mask != -mx.inf if additive else rules.mask)
    weights = mx.exp(scores - block.rows.lse[..., None])
    dscores = weights * (block.dweights - block.rows.delta[..., None])
    dproducts = dscores * slope
    if seen is not None:
        weights, dscores, dproducts = (mx.where(seen, x, 0.0) for x in (weights, dscores, dproducts))
    return blockwise_backward.Weights(weights, dproducts, dscores if additive else None)


def _rows(inputs: KernelInputs, state: State, rows: slice) -> State:
    """Compute the state of the queries `rows`."""
    k, v, k_pos, mask, segments = inputs.k, inputs.v, inputs.k_pos, inputs.rules.mask, inputs.rules.segments
    rules = replace(
        inputs.rules,
        mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows],
        segments=None if segments is None else (segments[0][:, rows], segments[1]),
    )
    q = inputs.q[:, :, rows]
    q_pos = inputs.q_pos[rows]
    state = State(*(x[:, :, rows] for x in state))
    for start in range(0, k.shape[2], KEYS):
        keys = slice(start, min(start + KEYS, k.shape[2]))
        tile = rules.band.tile(int(q_pos[0]), int(q_pos[-1]), int(k_pos[keys][0]), int(k_pos[keys][-1]))
        if tile is Tile.EMPTY:
            continue
        seen = mx.array(rules.band.visible(q_pos, k_pos[keys])) if tile is Tile.PARTIAL else None
        scores, seen = _scores(q, k[:, :, keys], seen, rules, keys)
        state = merge_states(state, _chunk(scores, seen, v[:, :, keys]))
    return _settled(state)


def _settled(state: State) -> State:
    """Evaluate `state`, so that the scores of one chunk are in memory at a time. Skip it in mx.compile and mx.vmap."""
    if inside_custom_op():
        return State(*evaluated_copies(state))
    with suppress(ValueError):
        mx.eval(*state)
    return state


def _scores(q, k, seen: mx.array | None, rules: ScoreRules, keys: slice) -> tuple[mx.array, mx.array | None]:
    """Compute scores ``[B, Hkv, group, Lq, keys]`` and which of them are visible. ``None`` means all."""
    batch, heads, q_len, dim = q.shape
    _, kv_heads, k_len, _ = k.shape
    group = heads // kv_heads
    mask = None if rules.mask is None else _columns(rules, keys)
    if mask is not None:
        mask = mask.reshape(mask.shape[0], *_grouped_heads(mask.shape[1], kv_heads), *mask.shape[2:])
    stacked = q.astype(mx.float32).reshape(batch, kv_heads, group * q_len, dim)
    scores = products.scores(stacked, k.astype(mx.float32)) * rules.scale  # same rounding as in the gradient
    scores = scores.reshape(batch, kv_heads, group, q_len, k_len)
    seen = _seen(seen, mask, rules, keys)
    if seen is not None:
        seen = mx.broadcast_to(seen, scores.shape)
    if rules.softcap is not None:
        if seen is not None:  # tanh has a NaN slope at NaN, even for a hidden pair
            scores = products.select_visible(scores, seen, 0.0)
        scores = mx.tanh(scores / rules.softcap) * rules.softcap
    if mask is not None and mask.dtype != mx.bool_:
        scores = scores + mask.astype(mx.float32)
    return scores, seen


def _seen(seen: mx.array | None, mask: mx.array | None, rules: ScoreRules, keys: slice) -> mx.array | None:
    """Combine `seen`, which is by position, with segments and an array mask. The result broadcasts to the scores."""
    if rules.segments is not None:
        q_ids, k_ids = rules.segments[0][:, :, None], rules.segments[1][:, None, keys]
        seen = _both(seen, ((q_ids == k_ids) & (q_ids >= 0))[:, None, None])
    if mask is not None:
        seen = _both(seen, mask if mask.dtype == mx.bool_ else mask != -mx.inf)
    return seen


def _both(a: mx.array | None, b: mx.array) -> mx.array:
    return b if a is None else a & b


def _columns(rules: ScoreRules, keys: slice) -> mx.array:
    assert rules.mask is not None
    if rules.mask.shape[-1] == 1:
        return rules.mask
    return rules.mask[..., keys] if rules.columns is None else rules.mask[..., mx.array(rules.columns[keys])]


def _grouped_heads(mask_heads: int, kv_heads: int) -> tuple[int, int]:
    return (1, 1) if mask_heads == 1 else (kv_heads, mask_heads // kv_heads)


def _chunk(scores: mx.array, seen: mx.array | None, v: mx.array) -> State:
    """Compute the state over one chunk of keys. `seen` is ``None`` where all scores are visible."""
    batch, kv_heads, group, q_len, keys = scores.shape
    v = v.astype(mx.float32)
    stacked = (batch, kv_heads, group * q_len, keys)
    if seen is not None:
        scores = products.select_visible(scores, seen, -mx.inf)
    m = mx.stop_gradient(scores.max(axis=-1))
    p = mx.exp(scores - mx.where(m == -mx.inf, 0.0, m)[..., None])
    if seen is None:
        acc = p.reshape(stacked) @ v
    else:
        p = products.select_visible(p, seen, 0.0)  # zero, even where m is NaN
        acc = products.weighted_values(p.reshape(stacked), v, seen.astype(mx.float32).reshape(stacked))
    rows = (batch, kv_heads * group, q_len)
    return State(acc.reshape(*rows, v.shape[-1]), m.reshape(rows), p.sum(axis=-1).reshape(rows))
