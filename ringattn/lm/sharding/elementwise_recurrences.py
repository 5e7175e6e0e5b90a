"""Recurrences of mlx-lm's layers over a ring in which each element of a state has a decay of its own.

A token takes a state h to ``a * h + u``. As in `recurrences`, a rank runs over its tokens once, from a state of zeros.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...core.affine import AffineMap
from .. import mlx_lm_compat as compat
from .recurrent_cache import RecurrentCache
from .running_layer import Result, Run


def states_of_tokens(cache: RecurrentCache, a: mx.array, u: mx.array, state: mx.array | None) -> Result:
    """Find the states after each of this rank's tokens, and after all tokens. Collective.

    Args:
        cache: The layer's cache.
        a: The decays of this rank's tokens ``[batch, tokens, ...]``, float32.
        u: The inputs to the state, like `a`.
        state: The state before the forward pass ``[batch, ...]``; ``None`` for zeros.
    """
    before = mx.zeros_like(a[:, 0]) if state is None else state.astype(mx.float32)
    if cache.is_first:
        states = _scan(a, u, before)
        return states, cache.chain(before, AffineMap(None, states[:, -1]), before.shape, False).after
    states = _scan(a, u, mx.zeros_like(before))
    decay = mx.cumprod(a, axis=1)  # from the first token to each one
    found = cache.chain(before, AffineMap(decay[:, -1], states[:, -1]), before.shape, False)
    return states + decay * found.before[0][:, None], found.after


def _scan(a: mx.array, u: mx.array, state: mx.array) -> mx.array:
    """The states after each token."""
    states = []
    for t in range(a.shape[1]):
        state = a[:, t] * state + u[:, t]
        states.append(state)
    return mx.stack(states, axis=1)


def real_gated(plain: Run, cache: RecurrentCache, x: mx.array, a: mx.array, h0: mx.array | None = None) -> Result:
    """Run mlx-lm's `rnn_scan` (Griffin, arXiv 2402.19427): x and a ``[batch, tokens, width]``."""
    return states_of_tokens(cache, a.astype(mx.float32), x.astype(mx.float32), h0)


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
    decay = mx.exp(dt[..., None] * A.astype(mx.float32))
    states, after = states_of_tokens(cache, decay, (dt * wide)[..., None] * B[..., None, :], state)
    return (states @ C[..., None])[..., 0] + layer.D * wide, after


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
