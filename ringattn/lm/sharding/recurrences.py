"""The recurrences of mlx-lm's layers over a ring: each rank runs over its own tokens only.

The outputs of a linear recurrence are those from a state of zeros plus a part that is linear in the state before the
tokens. So a rank runs over its tokens once, before it knows that state, and adds the second part after one round with
the other ranks (`ringattn.ring.states`). The rank with the first tokens knows its state, and runs as one process does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...core.affine import AffineMap
from ...errors import UnsupportedModelError
from ...linear.engine import run
from ...linear.recurrence import Recurrence, Span
from ...ring.states import BeforeAndAfter, ChainCall, chain_states, is_first
from .. import mlx_lm_compat as compat
from .forward_pass import current
from .recurrent_cache import RecurrentCache, TracingRecurrentCache

Result = tuple[mx.array, mx.array]  # outputs, and the state after the tokens
Run = Callable[..., Result]


def reading_cache() -> RecurrentCache | None:
    """The cache of the recurrent layer that runs."""
    return current.reading if isinstance(current.reading, RecurrentCache) else None


def over_ring(name: str, run: Run) -> Callable[[Run], Run]:
    """Wrap mlx-lm's recurrence `name`: calls of a layer whose tokens are spread over a ring go to `run`."""

    def wrap(plain: Run) -> Run:
        def recurrence(*args: Any, **options: Any) -> Result:
            cache = reading_cache()
            if cache is None:
                return plain(*args, **options)
            out, state = run(plain, cache, *args, **options) if cache.shared else plain(*args, **options)
            if isinstance(cache, TracingRecurrentCache):
                cache.note_state(state)
            return out, state

        return recurrence

    return wrap


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
    known = before if _first(cache) else None
    if compat.has_delta_kernel(k):
        span = _delta_by_kernel(partial(plain, **options), q, k, v, (a, b, A_log, dt_bias), known)
    else:
        span = _delta_by_chunks(q, k, v, (a, b, A_log, dt_bias), known, **options)
    states = _chain(cache, before, span.step, (batch, heads, keys, keys), True)
    out = span.out if span.reads is None else span.out + span.reads @ states.before[0].swapaxes(2, 3)
    return out.swapaxes(1, 2).astype(q.dtype), states.after


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
    if _first(cache):
        out, after = plain(x, A_log, B, C, D, dt, dt_bias, before, time_step_limit)
        states = _chain(cache, before, AffineMap(None, after.astype(mx.float32)), transition, False)
        return out, states.after
    out, offset = plain(x.astype(mx.float32), A_log, B, C, D, dt, dt_bias, None, time_step_limit)
    steps = compat.compute_dt(dt, dt_bias, time_step_limit) * -mx.exp(A_log).astype(mx.float32)
    decay = mx.exp(mx.cumsum(steps, axis=1))  # from the first token to each one
    own = AffineMap(decay[:, -1, :, None, None], offset.astype(mx.float32))
    states = _chain(cache, before, own, transition, False)
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
) -> Result:
    """Run mlx-lm's `recurrent_gla`: q ``[batch, heads, tokens, dim]``, one decay `g` a head.

    The state is ``[batch, heads, key dim, value dim]``.
    """
    batch, heads, tokens, keys = q.shape
    before = mx.zeros((batch, heads, keys, v.shape[-1])) if h is None else h.astype(mx.float32)
    transition = (batch, heads, 1, 1)
    if _first(cache):
        out, after = plain(q, k, v, g, scale, before)
        states = _chain(cache, before, AffineMap(None, after.astype(mx.float32)), transition, False)
        return out, states.after
    out, offset = plain(q.astype(mx.float32), k, v, g, scale, mx.zeros_like(before))
    rate = g.astype(mx.float32).reshape(1, heads, 1, 1)
    own = AffineMap(mx.broadcast_to(mx.exp(rate * tokens), transition), offset.astype(mx.float32))
    states = _chain(cache, before, own, transition, False)
    decay = mx.exp(rate * mx.arange(1, tokens + 1)[:, None])
    return (out + decay * (q.astype(mx.float32) * scale @ states.before[0])).astype(q.dtype), states.after


RECURRENCES: dict[str, Run] = {
    "gated_delta_update": gated_delta,
    "ssm_update": selective_state,
    "recurrent_gla": constant_decay,
}


def _first(cache: RecurrentCache) -> bool:
    """Whether this rank has the first tokens of the forward pass."""
    assert cache.step is not None
    return is_first(cache.step.new, cache.ring.rank, 0)


def _chain(
    cache: RecurrentCache, before: mx.array, own: AffineMap, transition: tuple[int, ...], matrix: bool
) -> BeforeAndAfter:
    """Find the states before this rank's tokens and after all tokens."""
    assert cache.step is not None
    what = "a recurrent layer"
    with cache.ring.call(what):
        return chain_states(cache.ring, ChainCall(what, cache.step.new, transition, matrix), before, [own])


def _refuse_mask(mask: mx.array | None) -> None:
    if mask is not None:
        raise UnsupportedModelError("mask: of a recurrent layer with padding, expected one sequence without padding")
