"""Checks of the arguments of linear attention, and their defaults."""

from __future__ import annotations

from typing import Any, TypedDict

import mlx.core as mx

from ..core.validation import FLOATS, check_array, check_scale
from ..errors import ArgumentError, ArgumentTypeError
from .recurrence import Recurrence

_FLOAT_NAMES = "float16, bfloat16 or float32"


class LinearOptions(TypedDict, total=False):
    """Keyword arguments of the calls, for the type checker's overloads of `return_state`."""

    log_decay: mx.array | None
    beta: mx.array | None
    state: mx.array | None
    scale: float | None
    out_dtype: mx.Dtype | None


def check_float(name: str, x: Any) -> None:
    """Check for an mx.array of a float dtype."""
    check_array(name, x)
    if x.dtype not in FLOATS:
        raise ArgumentTypeError(f"{name}: {x.dtype}, expected {_FLOAT_NAMES}")


def check_recurrence(q: Any, k: Any, v: Any, *, log_decay: Any, beta: Any, scale: Any) -> Recurrence:
    """Check the arrays of the tokens, without evaluating them.

    Raises:
        ArgumentError: If an argument is wrong; the message names the first one.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x)
        if x.ndim != 4:
            raise ArgumentError(f"{name}: shape {x.shape}, expected 4 dimensions [batch, heads, tokens, head_dim]")
        if x.dtype != q.dtype:
            raise ArgumentTypeError(f"{name}: {x.dtype}, expected {q.dtype} as q")
    if k.shape != q.shape:
        raise ArgumentError(f"k: shape {k.shape}, expected {q.shape} as q")
    for axis, what in ((0, "batch"), (2, "tokens")):
        if v.shape[axis] != q.shape[axis]:
            raise ArgumentError(f"v: shape {v.shape}, expected {what} {q.shape[axis]} as q")
    if 0 in (q.shape[1], q.shape[3], v.shape[1], v.shape[3]):
        name, x = ("q", q) if 0 in (q.shape[1], q.shape[3]) else ("v", v)
        raise ArgumentError(f"{name}: shape {x.shape}, expected at least 1 head and a head_dim of at least 1")
    if v.shape[1] % k.shape[1]:
        raise ArgumentError(f"v: {v.shape[1]} heads, expected a multiple of the {k.shape[1]} heads of k")
    tokens = v.shape[:3]
    if log_decay is not None:
        _check_shape("log_decay", log_decay, tokens, (*tokens, k.shape[3]))
    if beta is not None:
        _check_shape("beta", beta, tokens)
    return Recurrence(q, k, v, log_decay, beta, check_scale(scale, q.shape[3]))


def check_state(state: Any, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    """Check for an array of `shape` and `dtype`. The default is zeros."""
    if state is None:
        return mx.zeros(shape, dtype)
    check_array("state", state)
    if state.dtype != dtype:
        raise ArgumentTypeError(f"state: {state.dtype}, expected {dtype}")
    if state.shape != shape:
        raise ArgumentError(f"state: shape {state.shape}, expected {shape}")
    return state


def _check_shape(name: str, x: Any, *shapes: tuple[int, ...]) -> None:
    check_float(name, x)
    if x.shape not in shapes:
        raise ArgumentError(f"{name}: shape {x.shape}, expected {' or '.join(map(str, shapes))}")
