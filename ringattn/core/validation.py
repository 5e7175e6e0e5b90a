"""Checks of arguments, and their defaults. Each error is one line: argument, value, expectation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError, ArgumentTypeError
from .intervals import kept_positions

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
_FLOAT_NAMES = "float16, bfloat16 or float32"
Positions = mx.array | np.ndarray | Sequence[int]  # ascending, within int32
_FAR = 2**32  # further apart than any two int32 positions


def check_qkv(q: Any, k: Any, v: Any) -> None:
    """Check q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]`` and v ``[B, Hkv, Lk, Dv]`` of one float dtype."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_array(name, x)
        if x.dtype not in FLOATS:
            raise ArgumentTypeError(f"{name}: {x.dtype}, expected {_FLOAT_NAMES}")
        if x.ndim != 4:
            raise ArgumentError(f"{name}: shape {x.shape}, expected 4 dimensions [batch, heads, tokens, head_dim]")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ArgumentTypeError(f"{name}: {x.dtype}, expected {q.dtype} as q")
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(f"{name}: batch {x.shape[0]}, expected {q.shape[0]} as q")
    if v.shape[1] != k.shape[1]:
        raise ArgumentError(f"v: {v.shape[1]} heads, expected {k.shape[1]} as k")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(f"q: {q.shape[1]} heads, expected a multiple of the {k.shape[1]} heads of k")
    if k.shape[3] != q.shape[3] or q.shape[3] == 0:
        raise ArgumentError(f"k: head_dim {k.shape[3]}, expected {q.shape[3] or 'at least 1'} as q")
    if v.shape[2] != k.shape[2]:
        raise ArgumentError(f"v: {v.shape[2]} tokens, expected {k.shape[2]} as k")


def check_array(name: str, x: Any) -> None:
    """Check that `x` is an mx.array."""
    if not isinstance(x, mx.array):
        raise ArgumentTypeError(f"{name}: {type(x).__name__}, expected an mx.array")


def check_scale(scale: Any, head_dim: int) -> float:
    """Return the scale as a float. The default is ``head_dim ** -0.5``."""
    if scale is None:
        return head_dim**-0.5
    return _number("scale", scale)


def check_softcap(softcap: Any) -> float | None:
    """Check for a positive number or ``None``."""
    if softcap is None:
        return None
    softcap = _number("softcap", softcap)
    if softcap <= 0:
        raise ArgumentError(f"softcap: {softcap}, expected a number above 0, or None")
    return softcap


def check_window(window: Any) -> int | tuple[int, int] | None:
    """Check for ``None``, an int of at least 1, or a pair of ints of at least 0."""
    if window is None:
        return None
    if _is_int(window):
        if window < 1:
            raise ArgumentError(f"window: {window}, expected at least 1, or a pair (left, right)")
        return min(int(window), _FAR)
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(map(_is_int, window)):
        raise ArgumentTypeError(
            f"window: {format_value(window)}, expected an int, a pair of ints (left, right), or None"
        )
    if min(window) < 0:
        raise ArgumentError(f"window: {tuple(window)}, expected numbers of at least 0")
    return min(int(window[0]), _FAR), min(int(window[1]), _FAR)


def check_mask(mask: Any, shape: tuple[int, int, int, int]) -> tuple[bool, mx.array | None]:
    """Return whether the mask is causal, and an array mask of 4 axes that broadcasts to `shape` ``[B, Hq, Lq, Lk]``."""
    if mask is None:
        return False, None
    if isinstance(mask, str):
        if mask != "causal":
            raise ArgumentError(f"mask: {mask!r}, expected 'causal', an array, or None")
        return True, None
    if not isinstance(mask, mx.array):
        raise ArgumentTypeError(f"mask: {type(mask).__name__}, expected 'causal', an mx.array, or None")
    if mask.dtype != mx.bool_ and mask.dtype not in FLOATS:
        raise ArgumentTypeError(f"mask: {mask.dtype}, expected bool, {_FLOAT_NAMES}")
    padded = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(padded, shape)):
        raise ArgumentError(f"mask: shape {tuple(mask.shape)}, expected one that broadcasts to {shape}")
    return False, mask.reshape(padded)


def check_sinks(sinks: Any, heads: int) -> mx.array | None:
    """Check for ``None`` or a float array ``[heads]``."""
    if sinks is None:
        return None
    check_array("sinks", sinks)
    if sinks.dtype not in FLOATS:
        raise ArgumentTypeError(f"sinks: {sinks.dtype}, expected {_FLOAT_NAMES}")
    if tuple(sinks.shape) != (heads,):
        raise ArgumentError(f"sinks: shape {tuple(sinks.shape)}, expected ({heads},), one a query head")
    return sinks


def check_segments(segments: Any, batch: int, q_len: int, k_len: int, *, single: bool) -> tuple | None:
    """Return the ids of queries ``[B, Lq]`` and of keys ``[B, Lk]``, int32. `single` allows one array for both."""
    if segments is None:
        return None
    if single and isinstance(segments, mx.array):
        segments = (segments, segments)
    if not isinstance(segments, (tuple, list)) or len(segments) != 2:
        raise ArgumentTypeError(f"segments: {type(segments).__name__}, expected a pair (q_ids, k_ids)")
    return tuple(
        _check_ids(f"segments[{i}]", ids, (batch, tokens))
        for i, (ids, tokens) in enumerate(zip(segments, (q_len, k_len)))
    )


def _check_ids(name: str, ids: Any, shape: tuple[int, int]) -> mx.array:
    check_array(name, ids)
    if not mx.issubdtype(ids.dtype, mx.integer):
        raise ArgumentTypeError(f"{name}: {ids.dtype}, expected an integer dtype")
    if tuple(ids.shape) != shape:
        raise ArgumentError(f"{name}: shape {tuple(ids.shape)}, expected {shape}")
    if ids.dtype in (mx.int64, mx.uint64, mx.uint32) and ids.size:
        low, high = ids.min().item(), ids.max().item()
        if low < -(2**31) or high >= 2**31:  # in 32 bits two documents could get one id
            raise ArgumentError(f"{name}: ids from {low} to {high}, expected ids that fit int32")
    return ids.astype(mx.int32)


def check_positions(offset: Any, positions: Any, q_len: int, k_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of queries and keys. The default aligns the last query with the last key."""
    if positions is None:
        offset = k_len - q_len if offset is None else check_int("offset", offset)
        if offset + q_len > 2**31:
            raise ArgumentError(f"offset: {offset} for {q_len} queries, expected positions that fit int32")
        return kept_positions(((offset, offset + q_len),)), kept_positions(((0, k_len),))
    if offset is not None:
        raise ArgumentError(f"offset: {offset} together with positions, expected one of the two")
    if not isinstance(positions, (tuple, list)) or len(positions) != 2:
        raise ArgumentTypeError(f"positions: {type(positions).__name__}, expected a pair (q_pos, k_pos)")
    q_pos, k_pos = (
        check_token_positions(f"positions[{i}]", x, n) for i, (x, n) in enumerate(zip(positions, (q_len, k_len)))
    )
    return q_pos, k_pos


def check_token_positions(name: str, x: Any, tokens: int) -> np.ndarray:
    """Return ascending positions ``[tokens]`` as int32."""
    if not isinstance(x, (mx.array, np.ndarray, Sequence)) or isinstance(x, str):
        raise ArgumentTypeError(f"{name}: {type(x).__name__}, expected int32 positions")
    if isinstance(x, mx.array) and not mx.issubdtype(x.dtype, mx.integer):
        raise ArgumentTypeError(f"{name}: {x.dtype}, expected int32")
    try:
        x = np.asarray(x)
    except ValueError:
        raise ArgumentTypeError(f"{name}: {format_value(x)}, expected int32 positions") from None
    if x.size == 0:
        x = x.astype(np.int32)
    if x.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name}: {x.dtype}, expected int32")
    if x.shape != (tokens,):
        raise ArgumentError(f"{name}: shape {x.shape}, expected ({tokens},)")
    if np.any(np.diff(x.astype(np.int64)) < 0):
        raise ArgumentError(f"{name}: not ascending, expected ascending positions")
    if x.size and (x[0] < -(2**31) or x[-1] >= 2**31):
        raise ArgumentError(f"{name}: up to {x[-1]}, expected numbers that fit int32")
    return x.astype(np.int32)


def check_out_dtype(out_dtype: Any, default: mx.Dtype) -> mx.Dtype:
    """Check for one of the three float dtypes. The default is q's."""
    if out_dtype is None:
        return default
    if out_dtype not in FLOATS:
        raise ArgumentTypeError(f"out_dtype: {format_value(out_dtype)}, expected mx.float16, mx.bfloat16 or mx.float32")
    return out_dtype


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check for ``None`` or one of `choices`."""
    if value is not None and (not isinstance(value, str) or value not in choices):
        raise ArgumentError(f"{name}: {format_value(value)}, expected one of {', '.join(map(repr, choices))}, or None")


def check_flag(name: str, value: Any) -> bool:
    """Check for True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentTypeError(f"{name}: {format_value(value)}, expected True or False")
    return bool(value)


def check_int(name: str, value: Any, least: int = -(2**31)) -> int:
    """Check for an int of at least `least` that fits 32 bits."""
    if not _is_int(value):
        raise ArgumentTypeError(f"{name}: {format_value(value)}, expected an integer")
    if value < least:
        raise ArgumentError(f"{name}: {value}, expected at least {least}")
    if value >= 2**31:
        raise ArgumentError(f"{name}: {value}, expected a number that fits 32 bits")
    return int(value)


def format_value(value: Any) -> str:
    """Format `value` for an error message: one line, without the contents of an array."""
    if isinstance(value, (mx.array, np.ndarray)):
        return f"array of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ArgumentTypeError(f"{name}: {format_value(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ArgumentError(f"{name}: {format_value(value)}, expected a finite number")
    return number
