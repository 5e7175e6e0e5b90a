"""A problem for every feature of `attention`, with lengths that no tile size divides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from .oracle import Case

Random = np.random.Generator


def _case(
    seed: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 113,
    k_len: int = 113,
    dim: int = 64,
    v_dim: int = 64,
    dtype: mx.Dtype = mx.float32,
    size: float = 1.0,
    options: Callable[[Random, Case], dict[str, Any]] = lambda r, case: {},
) -> Case:
    r = np.random.default_rng(seed)

    def normal(*shape: int) -> mx.array:
        return mx.array(r.standard_normal(shape).astype(np.float32))

    q = (normal(batch, heads, q_len, dim) * size).astype(dtype)
    k, v = (normal(batch, kv_heads, k_len, d).astype(dtype) for d in (dim, v_dim))
    q_pos = np.arange(k_len - q_len, k_len, dtype=np.int32)
    case = Case(q, k, v, q_pos, np.arange(k_len, dtype=np.int32))
    case.options = options(r, case)
    return case


def _causal(r: Random, case: Case) -> dict[str, Any]:
    return {"mask": "causal"}


def _boolean(r: Random, case: Case) -> dict[str, Any]:
    return {"mask": mx.array(r.random((case.q.shape[2], case.k.shape[2])) < 0.6)}


def _additive(r: Random, case: Case) -> dict[str, Any]:
    shape = (1, case.q.shape[1], case.q.shape[2], case.k.shape[2])
    return {"mask": mx.array(np.where(r.random(shape) < 0.3, -np.inf, r.standard_normal(shape)).astype(np.float32))}


def _segments(r: Random, case: Case) -> dict[str, Any]:
    ids = np.sort(r.integers(-1, 4, (case.q.shape[0], case.k.shape[2])), 1).astype(np.int32)
    return {"segments": (mx.array(ids[:, -case.q.shape[2] :]), mx.array(ids)), "mask": "causal"}


def _sinks(r: Random, case: Case) -> dict[str, Any]:
    return {"sinks": mx.array(r.standard_normal(case.q.shape[1]).astype(np.float32)), "mask": "causal"}


def _everything(r: Random, case: Case) -> dict[str, Any]:
    return {**_segments(r, case), **_sinks(r, case), "window": 40, "softcap": 20.0, "scale": 0.2}


FEATURES: dict[str, Callable[[], Case]] = {
    "plain": lambda: _case(0),
    "causal": lambda: _case(1, options=_causal),
    "causal, float16": lambda: _case(2, dtype=mx.float16, options=_causal),
    "causal, bfloat16": lambda: _case(3, dtype=mx.bfloat16, options=_causal),
    "longer cache than queries": lambda: _case(4, q_len=40, k_len=300, options=_causal),
    "window": lambda: _case(5, options=lambda r, case: {"window": 7}),
    "window on both sides": lambda: _case(6, options=lambda r, case: {"window": (9, 4)}),
    "boolean mask": lambda: _case(7, options=_boolean),
    "additive mask": lambda: _case(8, options=_additive),
    "softcap": lambda: _case(9, options=lambda r, case: {"softcap": 3.0}),
    "sinks": lambda: _case(10, options=_sinks),
    "segments and padding": lambda: _case(11, batch=2, options=_segments),
    "one key/value head": lambda: _case(12, kv_heads=1, options=_causal),
    "value head_dim": lambda: _case(13, dim=80, v_dim=32, options=_causal),
    "head_dim 128": lambda: _case(14, dim=128, v_dim=128, options=_causal),
    "peaked scores": lambda: _case(15, size=30.0, options=_causal),
    "everything, bfloat16": lambda: _case(16, batch=2, dtype=mx.bfloat16, options=_everything),
    "head_dim 256": lambda: _case(17, dim=256, v_dim=256, options=lambda r, case: {"mask": "causal", "softcap": 50.0}),
    "head_dim 192, values 128": lambda: _case(18, dim=192, v_dim=128, options=_causal),
}


def in_dtype(make: Callable[[], Case], dtype: mx.Dtype) -> Case:
    """Make a problem, with q, k and v in `dtype`."""
    case = make()
    return replace(case, q=case.q.astype(dtype), k=case.k.astype(dtype), v=case.v.astype(dtype))
