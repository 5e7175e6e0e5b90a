"""Recurrences of mlx-lm's layers over a ring in which each element of a state has a decay of its own.

A token takes a state h to ``a * h + u``. As in `recurrences`, a rank runs over its tokens once, from a state of zeros.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...core.affine import AffineMap
from .. import mlx_lm_compat as compat
from .forward_pass import current
from .recurrent_cache import RecurrentCache
from .running_layer import Result, Run

BLOCK = 256  # tokens whose states are in memory at once: one state of Mamba is 16 times as large as its output


def real_gated(plain: Run, cache: RecurrentCache, x: mx.array, a: mx.array, h0: mx.array | None = None) -> Result:
    """Run mlx-lm's `rnn_scan` (Griffin, arXiv 2402.19427): x and a ``[batch, tokens, width]``."""
    a = a.astype(mx.float32)
    u = x.astype(mx.float32)
    before = mx.zeros_like(a[:, 0]) if h0 is None else h0.astype(mx.float32)
    states = _scan(a, u, before if cache.is_first else mx.zeros_like(before))
    decay = None if cache.is_first else mx.cumprod(a, axis=1)  # from the first token to each one
    own = AffineMap(None if decay is None else decay[:, -1], states[:, -1])
    found = cache.chain(before, own, before.shape, False)
    return states if decay is None else states + decay * found.before[0][:, None], found.after


def _scan(a: mx.array, u: mx.array, state: mx.array) -> mx.array:
    """The states after each token."""
    states = []
    for t in range(a.shape[1]):
        state = a[:, t] * state + u[:, t]
        states.append(state)
    return mx.stack(states, axis=1)


def real_gated_unit(
    plain: Run, own: RecurrentCache, layer: Any, /, x: mx.array, cache: mx.array | None = None
) -> Result:
    """Run mlx-lm's `RGLRU`. Without a state, `cache`, it scales the first token as that of a sequence."""
    if cache is None and own.shared and not own.is_first:
        cache = mx.zeros((x.shape[0], layer.width))
    return plain(layer, x, cache)


def selective_scan(
    plain: Run, cache: RecurrentCache, layer: Any, x: mx.array, A: mx.array, state: mx.array | None = None
) -> Result:
    """Run the `ssm_step` of a Mamba layer (arXiv 2312.00752) on x ``[batch, tokens, channels]``.

    The state is ``[batch, channels, n]``. A token takes it to ``exp(dt A) * h + (dt x) B^T``, and its output is
    ``h C + D x``.
    """
    dt, B, C = (part.astype(mx.float32) for part in _selection(layer, x))
    wide = x.astype(mx.float32)
    A = A.astype(mx.float32)
    before = mx.zeros((x.shape[0], *A.shape)) if state is None else state.astype(mx.float32)
    blocks = [slice(start, start + BLOCK) for start in range(0, x.shape[1], BLOCK)]
    first = cache.is_first
    after = before if first else mx.zeros_like(before)
    is_read = current.needs_output(own=1)  # the state
    outs = []
    for at in blocks:
        states = _scan(mx.exp(dt[:, at, :, None] * A), (dt * wide)[:, at, :, None] * B[:, at, None], after)
        after = states[:, -1]
        if is_read:
            outs.append(_read(states, C[:, at]))
        else:
            mx.eval(after)
    time = mx.cumsum(dt, axis=1)[..., None]  # from the first token to each one
    own = AffineMap(None if first else mx.exp(time[:, -1] * A), after)
    found = cache.chain(before, own, before.shape, False)
    if not is_read:
        return mx.zeros_like(wide), found.after
    if not first:
        reads = [_read(mx.exp(time[:, at] * A) * found.before[0][:, None], C[:, at]) for at in blocks]
        outs = [out + more for out, more in zip(outs, reads)]
    return mx.concatenate(outs, axis=1) + layer.D * wide, found.after


def _read(states: mx.array, C: mx.array) -> mx.array:
    """The outputs of a block of states. They are evaluated, so that the states of other blocks take no memory."""
    out = (states @ C[..., None])[..., 0]
    mx.eval(out)
    return out


def _selection(layer: Any, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The step size, B and C of each token: with Jamba's norms (arXiv 2403.19887), Falcon Mamba's, or none."""
    ranks = layer.time_step_rank
    dt, B, C = mx.split(layer.x_proj(x), [ranks, ranks + layer.ssm_state_size], axis=-1)
    if hasattr(layer, "dt_layernorm"):
        dt, B, C = layer.dt_layernorm(dt), layer.b_layernorm(B), layer.c_layernorm(C)
    elif layer.use_bcdt_rms:
        dt, B, C = (mx.fast.rms_norm(part, None, layer.args.mixer_rms_eps) for part in (dt, B, C))
    return nn.softplus(layer.dt_proj(dt)), B, C


def mamba_sequence(
    plain: Run, cache: RecurrentCache, layer: Any, x: mx.array, inputs: mx.array | None, state: mx.array | None
) -> tuple[mx.array, Result]:
    """Run the `_process_sequence` of mlx-lm's Mamba, which calls its `ssm_step` for one token after the other.

    Jamba's layer is the same with one call for all tokens. Mamba stores its state only in a cache of mlx-lm's own
    class, so it is stored here.
    """
    run = compat.JambaMambaMixer._process_sequence if cache.shared else plain
    out, kept = run(layer, x, inputs, state)
    cache[0], cache[1] = kept
    return out.astype(x.dtype), kept
