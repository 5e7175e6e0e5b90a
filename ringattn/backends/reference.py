"""Attention in a few plain mx operations: the oracle of the other kernels, and what a GPU runs without one of its own.

Keys are taken in chunks, so that no more than ``[B, Hq, Lq, CHUNK]`` scores exist at once.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..mask import Tile
from ..merge import State, merge_states
from . import Rules

DIFFERENTIABLE = True
CHUNK = 4096


def forward(
    q: mx.array, k: mx.array, v: mx.array, q_pos: np.ndarray, k_pos: np.ndarray, rules: Rules, state: State | None
) -> State:
    """Attend and return the state; see `ringattn.backends`."""
    batch, heads, q_len, _ = q.shape
    if state is None:
        state = State.empty(batch, heads, q_len, v.shape[-1])
    if rules.segments is not None:  # padding: whatever bits it holds, they must not meet anything, in gradients too
        q, k, v = _cleared(q, rules.segments[0]), _cleared(k, rules.segments[1]), _cleared(v, rules.segments[1])
    for start in range(0, k.shape[2] if q.size else 0, CHUNK):
        keys = slice(start, min(start + CHUNK, k.shape[2]))
        scores, visible = _scores(q, k[:, :, keys], q_pos, k_pos[keys], rules, keys)
        hides = rules.mask is not None or rules.segments is not None or not _all_seen(rules, q_pos, k_pos[keys])
        state = merge_states(state, _chunk(scores, visible if hides else None, v[:, :, keys]))
    return state


def _cleared(x: mx.array, ids: mx.array) -> mx.array:
    return mx.where((ids >= 0)[:, None, :, None], x, mx.zeros((), x.dtype))


def _all_seen(rules: Rules, q_pos: np.ndarray, k_pos: np.ndarray) -> bool:
    return rules.band.tile(int(q_pos[0]), int(q_pos[-1]), int(k_pos[0]), int(k_pos[-1])) is Tile.FULL


def _scores(q, k, q_pos, k_pos, rules: Rules, keys: slice) -> tuple[mx.array, mx.array]:
    """Scores and what is visible of them, ``[B, Hkv, group, Lq, chunk]``."""
    batch, heads, q_len, dim = q.shape
    grouped = q.astype(mx.float32).reshape(batch, k.shape[1], -1, q_len, dim) * rules.scale
    scores = grouped @ k.astype(mx.float32)[:, :, None].swapaxes(-1, -2)
    if rules.softcap is not None:
        scores = mx.tanh(scores / rules.softcap) * rules.softcap
    visible = mx.array(rules.band.visible(q_pos, k_pos))
    if rules.segments is not None:
        q_ids, k_ids = rules.segments[0], rules.segments[1][:, keys]
        same = (q_ids[:, :, None] == k_ids[:, None, :]) & (q_ids[:, :, None] >= 0)
        visible = visible & same[:, None, None]
    if rules.mask is not None:
        mask = _columns(rules, keys)
        mask = mask.reshape(mask.shape[0], *_grouped_heads(mask.shape[1], k.shape[1]), *mask.shape[2:])
        if mask.dtype == mx.bool_:
            visible = visible & mask
        else:
            scores = scores + mask.astype(mx.float32)
            visible = visible & (mask != -mx.inf)
    return scores, mx.broadcast_to(visible, scores.shape)


def _columns(rules: Rules, keys: slice) -> mx.array:
    assert rules.mask is not None
    if rules.mask.shape[-1] == 1:
        return rules.mask
    return rules.mask[..., keys] if rules.columns is None else rules.mask[..., mx.array(rules.columns[keys])]


def _grouped_heads(mask_heads: int, kv_heads: int) -> tuple[int, int]:
    return (1, 1) if mask_heads == 1 else (kv_heads, mask_heads // kv_heads)


def _chunk(scores: mx.array, visible: mx.array | None, v: mx.array) -> State:
    """The state over one chunk of keys; `visible` is ``None`` where all of it is."""
    v = v.astype(mx.float32)[:, :, None]
    if visible is not None:
        scores = mx.where(visible, scores, -mx.inf)
    m = mx.stop_gradient(scores.max(axis=-1))
    p = mx.exp(scores - mx.where(m == -mx.inf, 0.0, m)[..., None])
    if visible is None:
        acc = p @ v
    else:  # a value that is not finite must reach the rows that see it, and the others not even as 0 * NaN
        finite = mx.isfinite(v)
        spoiled = visible.astype(mx.float32) @ mx.where(finite, 0.0, 1.0)
        acc = mx.where(spoiled > 0, mx.nan, p @ mx.where(finite, v, 0.0))
    rows = (v.shape[0], -1, scores.shape[-2])
    return State(acc.reshape(*rows, v.shape[-1]), m.reshape(rows), p.sum(axis=-1).reshape(rows))
