"""Recurrences of mlx-lm's layers over a ring, whose states are matrices: each rank runs over its own tokens only.

The outputs of a linear recurrence are those from a state of zeros plus a part that is linear in the state before the
tokens. So a rank runs over its tokens once, before it knows that state, and adds the second part after one round with
the other ranks (`ringattn.ring.states`). The rank with the first tokens knows its state, and runs as one process does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...core.affine import AffineMap
from ...errors import UnsupportedModelError
from ...linear.engine import run
from ...linear.recurrence import Recurrence, Span
from .. import mlx_lm_compat as compat
from .recurrent_cache import RecurrentCache
from .running_layer import Result, Run


def gated_delta(
    plain: Run,
    cache: RecurrentCache,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    **options: Any,
) -> Result:
    """Run mlx-lm's `gated_delta_update`. Shapes are its own: q, k ``[batch, tokens, heads, dim]``.

    On a Mac's GPU with its kernel. Elsewhere mlx-lm computes one token after the other by many operations of MLX, and
    `ringattn.linear` takes chunks of tokens.
    """
    _refuse_mask(mask)
    batch, _, heads, dim = v.shape
    keys = k.shape[-1]
    before = mx.zeros((batch, heads, dim, keys)) if state is None else state.astype(mx.float32)
    known = before if cache.is_first else None
    if compat.has_delta_kernel(k):
        span = _delta_by_kernel(partial(plain, **options), q, k, v, (a, b, A_log, dt_bias), known)
    else:
        span = _delta_by_chunks(q, k, v, (a, b, A_log, dt_bias), known, **options)
    states = cache.chain(before, span.step, (batch, heads, keys, keys), True)
    out = span.out if span.reads is None else span.out + span.reads @ states.before[0].swapaxes(2, 3)
    return out.swapaxes(1, 2), states.after


def _delta_by_kernel(
    plain: Run, q: mx.array, k: mx.array, v: mx.array, gates: tuple[mx.array, ...], known: mx.array | None
) -> Span:
    """Run mlx-lm's function once.

    The rows of a state do not depend on each other. So with ``key dim`` rows more, which start from the identity and
    have values of zero, it also returns the transition, and as their outputs the part for the state before.
    """
    batch, tokens, heads, dim = v.shape
    keys = k.shape[-1]
    if known is not None:
        out, after = plain(q, k, v, *gates, known)
        return Span(out.swapaxes(1, 2), AffineMap(None, after))
    values = mx.concatenate([v.astype(mx.float32), mx.zeros((batch, tokens, heads, keys))], axis=-1)
    start = mx.concatenate([mx.zeros((dim, keys)), mx.eye(keys)])
    both, ends = plain(
        q.astype(mx.float32), k.astype(mx.float32), values, *gates, mx.broadcast_to(start, (batch, heads, *start.shape))
    )
    both = both.swapaxes(1, 2)
    return Span(both[..., :dim], AffineMap(ends[:, :, dim:], ends[:, :, :dim]), both[..., dim:])


def _delta_by_chunks(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    gates: tuple[mx.array, ...],
    known: mx.array | None,
    *,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    use_kernel: bool = True,
) -> Span:
    """Run `ringattn.linear` with the gates of mlx-lm's function."""
    a, b, A_log, dt_bias = gates
    rate, steps = mx.exp(A_log.astype(mx.float32)), a.astype(mx.float32) + dt_bias
    log_decay = -rate * nn.softplus(steps) if lower_bound is None else lower_bound * mx.sigmoid(rate * steps)
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    q, k, v, log_decay, beta = (x.swapaxes(1, 2) for x in (q, k, v, log_decay, beta))
    return run(Recurrence(q, k, v, log_decay, beta, scale=1.0), known)


def selective_state(
    plain: Run,
    cache: RecurrentCache,
    x: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> Result:
    """Run mlx-lm's `ssm_update` (Mamba 2): x ``[batch, tokens, heads, dim]``, B and C ``[batch, tokens, groups, n]``.

    Its decays do not depend on the state, so the part for the state before is a product.
    """
    _refuse_mask(mask)
    batch, _, heads, dim = x.shape
    before = mx.zeros((batch, heads, dim, B.shape[-1])) if state is None else state.astype(mx.float32)
    transition = (batch, heads, 1, 1)
    if cache.is_first:
        out, after = plain(x, A_log, B, C, D, dt, dt_bias, before, time_step_limit)
        states = cache.chain(before, AffineMap(None, after.astype(mx.float32)), transition, False)
        return out, states.after
    out, offset = plain(x.astype(mx.float32), A_log, B, C, D, dt, dt_bias, None, time_step_limit)
    steps = compat.compute_dt(dt, dt_bias, time_step_limit) * -mx.exp(A_log).astype(mx.float32)
    decay = mx.exp(mx.cumsum(steps, axis=1))  # from the first token to each one
    own = AffineMap(decay[:, -1, :, None, None], offset.astype(mx.float32))
    states = cache.chain(before, own, transition, False)
    groups = B.shape[2]
    of_groups = states.before[0].reshape(batch, groups, heads // groups * dim, -1).swapaxes(2, 3)
    reads = C.astype(mx.float32).swapaxes(1, 2) @ of_groups  # [batch, groups, tokens, heads of a group * dim]
    reads = reads.swapaxes(1, 2).reshape(x.shape)
    return (out + decay[..., None] * reads).astype(x.dtype), states.after


def constant_decay(
    plain: Run,
    cache: RecurrentCache,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    scale: float,
    h: mx.array | None = None,
    mask: mx.array | None = None,
) -> Result:
    """Run mlx-lm's `recurrent_gla`: q ``[batch, heads, tokens, dim]``, one decay `g` a head.

    The state is ``[batch, heads, key dim, value dim]``.
    """
    _refuse_mask(mask)
    batch, heads, tokens, keys = q.shape
    before = mx.zeros((batch, heads, keys, v.shape[-1])) if h is None else h.astype(mx.float32)
    transition = (batch, heads, 1, 1)
    if cache.is_first:
        out, after = plain(q, k, v, g, scale=scale, h=before)
        states = cache.chain(before, AffineMap(None, after.astype(mx.float32)), transition, False)
        return out, states.after
    out, offset = plain(q, k, v, g, scale=scale, h=mx.zeros_like(before))
    one = [x[:, :, :1] for x in (q, mx.zeros_like(k), mx.zeros_like(v))]
    _, used = plain(*one, g, scale=scale, h=mx.ones_like(before))  # mlx-lm rounds decays to the layer's dtype
    rate = mx.log(used[:1, :, :1, :1].astype(mx.float32))
    own = AffineMap(mx.broadcast_to(mx.exp(rate * tokens), transition), offset.astype(mx.float32))
    states = cache.chain(before, own, transition, False)
    decay = mx.exp(rate * mx.arange(1, tokens + 1)[:, None])
    return out + decay * ((q * scale).astype(mx.float32) @ states.before[0]), states.after


def wkv7(
    plain: Run,
    cache: RecurrentCache,
    layer: Any,
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array | None = None,
) -> Result:
    """Run mlx-lm's `Rwkv7TimeMixing._wkv7` (RWKV-7, arXiv 2503.14456): all ``[batch, tokens, heads, dim]``.

    A token takes a state S to ``S (diag(w) + a b^T) + v k^T``. mlx-lm's kernel has as many rows of values as of keys,
    so the rows that start from the identity run in the batch, beside those from zeros.
    """
    batch, _, heads, dim = r.shape
    shape = (batch, heads, dim, dim)
    before = mx.zeros(shape) if state is None else state.astype(mx.float32)
    wide = [x.astype(mx.float32) for x in (r, w, k, v, a, b)]
    if cache.is_first:
        out, after = plain(layer, *wide, before)
        return out.reshape(r.shape), cache.chain(before, AffineMap(None, after), shape, True).after  # 5 axes on the CPU
    twice = [mx.concatenate([x, mx.zeros_like(x) if i == 3 else x]) for i, x in enumerate(wide)]
    out, ends = plain(layer, *twice, mx.concatenate([mx.zeros(shape), mx.broadcast_to(mx.eye(dim), shape)]))
    out = out.reshape(2 * batch, *r.shape[1:])
    states = cache.chain(before, AffineMap(ends[batch:], ends[:batch]), shape, True)
    reads = out[batch:].swapaxes(1, 2) @ states.before[0].swapaxes(2, 3)
    return out[:batch] + reads.swapaxes(1, 2), states.after


def _refuse_mask(mask: mx.array | None) -> None:
    if mask is not None:
        raise UnsupportedModelError("mask: of a recurrent layer with padding, expected one sequence without padding")
