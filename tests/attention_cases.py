"""Cases and backends that the tests of `ringattn.attention` share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn.cuda import launch
from ringattn.verify.oracle import Case

BACKENDS = ("host", "metal", "reference", *(["cuda"] if launch.gpu() else []))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32, size: float = 1.0) -> mx.array:
    r = np.random.default_rng(seed)
    return (mx.array(r.standard_normal(shape).astype(np.float32)) * size).astype(dtype)


def make(
    q_len: int,
    k_len: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    v_dim: int | None = None,
    dtype: mx.Dtype = mx.float32,
    size: float = 1.0,
    offset: int | None = None,
    **options,
) -> Case:
    """Make a case of contiguous tokens."""
    k_len = q_len if k_len is None else k_len
    offset = k_len - q_len if offset is None else offset
    q = normal(1, batch, heads, q_len, dim, dtype=dtype, size=size)
    k = normal(2, batch, kv_heads, k_len, dim, dtype=dtype)
    v = normal(3, batch, kv_heads, k_len, dim if v_dim is None else v_dim, dtype=dtype)
    return Case(q, k, v, np.arange(offset, offset + q_len), np.arange(k_len), options)


def run(case: Case, backend: str, **more) -> tuple[mx.array, mx.array]:
    """Compute `out` and `lse`. Pass positions where they are not the default."""
    q_len, k_len = len(case.q_pos), len(case.k_pos)
    usual = np.array_equal(case.q_pos, np.arange(k_len - q_len, k_len)) and np.array_equal(case.k_pos, np.arange(k_len))
    if not usual and "offset" not in more:
        more["positions"] = (case.q_pos, case.k_pos)
    return ra.attention(case.q, case.k, case.v, backend=backend, return_lse=True, **{**case.options, **more})


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(memoryview(a)) == bytes(memoryview(b))


def ids_of(batch: int, q_len: int, k_len: int) -> tuple[mx.array, mx.array]:
    """Make the ids of documents of about 20 tokens, with padding at both ends."""
    k_ids = np.tile(np.arange(k_len) // 20, (batch, 1)).astype(np.int32)
    k_ids[:, : k_len // 10] = -1
    k_ids[-1, k_len - k_len // 5 :] = -3
    return mx.array(k_ids[:, k_len - q_len :]), mx.array(k_ids)
