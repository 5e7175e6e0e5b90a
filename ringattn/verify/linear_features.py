"""Problems of linear attention: every kind of decay, with and without the delta rule."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .linear_oracle import LinearCase


def linear_case(
    seed: int,
    *,
    batch: int = 1,
    heads: int = 2,
    group: int = 2,
    length: int = 150,
    dim: int = 32,
    v_dim: int = 24,
    decay: str | None = "head",
    strength: float = 0.5,
    forget: float = 0.02,
    beta: float | None = None,
    state: bool = True,
    dtype: mx.Dtype = mx.float32,
) -> LinearCase:
    """Draw a problem with keys and queries of norm 1.

    Args:
        seed: The same seed gives the same problem everywhere.
        batch, heads, group, length, dim, v_dim: Sizes; `group` is the value heads for each key head.
        decay: ``"head"``, ``"channel"`` or ``None``.
        strength: Mean size of the log-decays.
        forget: Share of the log-decays that are -inf.
        beta: Upper bound of beta, or ``None`` for no delta rule.
        state: Whether there is a state before the first token.
        dtype: The dtype of q, k and v.
    """
    r = np.random.default_rng(seed)
    tokens = (batch, heads * group, length)

    def normal(*shape: int) -> np.ndarray:
        return r.standard_normal(shape)

    def array(x: np.ndarray, to: mx.Dtype = mx.float32) -> mx.array:
        return mx.array(x.astype(np.float32)).astype(to)

    q, k = (
        x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-3) for x in normal(2, batch, heads, length, dim)
    )
    log_decay = -r.exponential(strength, (*tokens, dim) if decay == "channel" else tokens)
    log_decay = np.where(r.random(log_decay.shape) < forget, -np.inf, log_decay)
    return LinearCase(
        array(q, dtype),
        array(k, dtype),
        array(normal(*tokens, v_dim), dtype),
        None if decay is None else array(log_decay),
        None if beta is None else array(r.random(tokens) * beta),
        array(normal(batch, heads * group, v_dim, dim)) if state else None,
    )


LINEAR_FEATURES: dict[str, Callable[[], LinearCase]] = {
    "linear attention": lambda: linear_case(0, decay=None, state=False),
    "linear attention, decay of heads": lambda: linear_case(1),
    "linear attention, decay of channels": lambda: linear_case(2, decay="channel"),
    "delta rule": lambda: linear_case(3, decay=None, beta=1.0),
    "gated delta rule": lambda: linear_case(4, beta=2.0),
    "gated delta rule, bfloat16": lambda: linear_case(5, beta=1.0, dtype=mx.bfloat16),
    "Kimi delta attention": lambda: linear_case(6, decay="channel", beta=1.0, dim=64, v_dim=64),
    "strong decay": lambda: linear_case(7, decay="channel", strength=30.0, beta=1.0),
}
