"""Attention in a few plain mx operations: the oracle of the other kernels, and what a GPU runs without one of its own.

Queries and keys are taken in chunks: no more than ``[B, Hq, QUERIES, KEYS]`` scores are made at once.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..autograd.custom_function import outside, settled
from ..core.gradients import Gradients, Rows
from ..core.masks import Tile
from ..core.online_softmax import State, merge_states
from ..core.rules import Rules
from . import blockwise_backward
from .interface import ending

NAME = "reference"
DIFFERENTIABLE = True
LAZY = True
QUERIES, KEYS = 1024, 2048


def forward(
    q: mx.array, k: mx.array, v: mx.array, q_pos: np.ndarray, k_pos: np.ndarray, rules: Rules, state: State | None
) -> State:
    """Attend and return the state; see `ringattn.kernels`."""
    batch, heads, q_len, _ = q.shape
    if state is None:
        state = State.empty(batch, heads, q_len, v.shape[-1])
    if rules.segments is not None:  # padding: whatever bits it holds, they must not meet anything, in gradients too
        q, k, v = _cleared(q, rules.segments[0]), _cleared(k, rules.segments[1]), _cleared(v, rules.segments[1])
    parts = [
        _rows(q, k, v, q_pos, k_pos, rules, state, slice(start, min(start + QUERIES, q_len)))
        for start in range(0, q_len, QUERIES)
    ]
    return State(*(mx.concatenate(list(x), 2) for x in zip(*parts))) if len(parts) > 1 else (parts or [state])[0]


finished = ending(forward)


def rows(out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
    """What `backward` needs of each query row; see `ringattn.kernels`."""
    return Rows.of(out, lse, dout, dlse)


def backward(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_pos: np.ndarray,
    k_pos: np.ndarray,
    rules: Rules,
    rows: Rows,
    sums: Gradients,
) -> Gradients:
    """`sums` with the gradients added; see `ringattn.kernels`. `attention` has MLX derive its gradient instead."""
    return blockwise_backward.gradient(q, k, v, q_pos, k_pos, rules, rows, sums, elementwise)


def elementwise(block: blockwise_backward.Block) -> blockwise_backward.Weights:
    """The elementwise work of a block of the gradient."""
    rules, additive = block.rules, block.rules.mask is not None and block.rules.mask.dtype != mx.bool_
    scores, slope = block.scores * rules.scale, mx.array(rules.scale)
    if rules.softcap is not None:
        scores = mx.tanh(scores / rules.softcap)
        scores, slope = scores * rules.softcap, slope * (1 - scores * scores)
    seen = mx.array(rules.band.visible(block.q_pos, block.k_pos)) if block.partial else None
    if rules.segments is not None:
        q_ids, k_ids = rules.segments[0][:, None, :, None], rules.segments[1][:, None, None, :]
        seen = _both(seen, (q_ids == k_ids) & (q_ids >= 0))
    if rules.mask is not None:
        if additive:
            scores = scores + rules.mask.astype(mx.float32)
        seen = _both(seen, rules.mask != -mx.inf if additive else rules.mask)
    weights = mx.exp(scores - block.rows.lse[..., None])
    by_scores = weights * (block.by_weights - block.rows.delta[..., None])
    if seen is not None:
        weights, by_scores = (mx.where(seen, x, 0.0) for x in (weights, by_scores))
    return blockwise_backward.Weights(weights, by_scores * slope, by_scores if additive else None)


def _rows(q, k, v, q_pos: np.ndarray, k_pos: np.ndarray, rules: Rules, state: State, rows: slice) -> State:
    """The state of the queries `rows`."""
    mask, segments = rules.mask, rules.segments
    rules = replace(
        rules,
        mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows],
        segments=None if segments is None else (segments[0][:, rows], segments[1]),
    )
    q, q_pos, state = q[:, :, rows], q_pos[rows], State(*(x[:, :, rows] for x in state))
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
    """Evaluate `state`, lest the scores of all chunks lie in memory at once; inside mx.compile or mx.vmap, do not."""
    if outside():
        return State(*settled(state))
    with suppress(ValueError):
        mx.eval(*state)
    return state


def _cleared(x: mx.array, ids: mx.array) -> mx.array:
    return mx.where((ids >= 0)[:, None, :, None], x, mx.zeros((), x.dtype))


def _scores(q, k, seen: mx.array | None, rules: Rules, keys: slice) -> tuple[mx.array, mx.array | None]:
    """Scores ``[B, Hkv, group, Lq, keys]``, and which of them count; ``None`` where all do."""
    batch, heads, q_len, dim = q.shape
    grouped = q.astype(mx.float32).reshape(batch, k.shape[1], heads // k.shape[1], q_len, dim)
    scores = (grouped @ k.astype(mx.float32)[:, :, None].swapaxes(-1, -2)) * rules.scale  # rounded as in the gradient
    if rules.softcap is not None:
        scores = mx.tanh(scores / rules.softcap) * rules.softcap
    if rules.segments is not None:
        q_ids, k_ids = rules.segments[0][:, :, None], rules.segments[1][:, None, keys]
        seen = _both(seen, ((q_ids == k_ids) & (q_ids >= 0))[:, None, None])
    if rules.mask is not None:
        mask = _columns(rules, keys)
        mask = mask.reshape(mask.shape[0], *_grouped_heads(mask.shape[1], k.shape[1]), *mask.shape[2:])
        if mask.dtype != mx.bool_:
            scores = scores + mask.astype(mx.float32)
        seen = _both(seen, mask if mask.dtype == mx.bool_ else mask != -mx.inf)
    return scores, None if seen is None else mx.broadcast_to(seen, scores.shape)


def _both(a: mx.array | None, b: mx.array) -> mx.array:
    return b if a is None else a & b


def _columns(rules: Rules, keys: slice) -> mx.array:
    assert rules.mask is not None
    if rules.mask.shape[-1] == 1:
        return rules.mask
    return rules.mask[..., keys] if rules.columns is None else rules.mask[..., mx.array(rules.columns[keys])]


def _grouped_heads(mask_heads: int, kv_heads: int) -> tuple[int, int]:
    return (1, 1) if mask_heads == 1 else (kv_heads, mask_heads // kv_heads)


def _chunk(scores: mx.array, seen: mx.array | None, v: mx.array) -> State:
    """The state over one chunk of keys; `seen` is ``None`` where all scores count."""
    v = v.astype(mx.float32)[:, :, None]
    if seen is not None:
        scores = mx.where(seen, scores, -mx.inf)
    m = mx.stop_gradient(scores.max(axis=-1))
    p = mx.exp(scores - mx.where(m == -mx.inf, 0.0, m)[..., None])
    if seen is None:
        acc = p @ v
    else:  # a value that is not finite must reach the rows that see it, and the others not even as 0 * NaN
        finite = mx.isfinite(v)
        spoiled = seen.astype(mx.float32) @ mx.where(finite, 0.0, 1.0)
        acc = mx.where(spoiled > 0, mx.nan, p @ mx.where(finite, v, 0.0))
    rows = (v.shape[0], scores.shape[1] * scores.shape[2], scores.shape[3])
    return State(acc.reshape(*rows, v.shape[-1]), m.reshape(rows), p.sum(axis=-1).reshape(rows))
