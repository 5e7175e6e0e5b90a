"""Tests of `ring_attention`, `decode_attention` and `Layout.gather`, against the whole problem in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn.ring.schedule import STRATEGIES
from ringattn.transport import Ring
from ringattn.verify.oracle import Case, check, random_case

LAYOUTS = ("contiguous", "zigzag", "cyclic", "weighted", "one rank", "scattered")


def make_layout(kind: str, n: int, size: int, start: int = 0) -> ra.Layout:
    if kind == "contiguous":
        return ra.Layout.contiguous(n, size, start=start)
    if kind == "zigzag":
        return ra.Layout.zigzag(n, size, start=start)
    if kind == "cyclic":
        return ra.Layout.cyclic(n, size, 5, start=start)
    if kind == "weighted":
        return ra.Layout.weighted(n, [*range(size - 1), 1.5], start=start)
    if kind == "one rank":
        return ra.Layout([[(start, start + n)]] + [[]] * (size - 1), start)
    owners = np.random.default_rng(n).integers(0, size, n)
    return ra.Layout([[(start + i, start + i + 1) for i in np.flatnonzero(owners == r)] for r in range(size)], start)


def layouts(case: Case, kind: str, size: int) -> tuple[ra.Layout, ra.Layout]:
    """Make layouts of the queries and keys of `case`: new queries after a cached prefix."""
    prefix = case.k.shape[2] - case.q.shape[2]
    layout = make_layout(kind, case.q.shape[2], size, start=prefix)
    if not prefix:
        return layout, layout
    return layout, make_layout(kind, prefix, size).extend(layout)


def local(case: Case, ring: Ring, layout: ra.Layout, kv_layout: ra.Layout) -> tuple[list[mx.array], dict]:
    """Cut out this rank's q, k, v and options."""
    rank, options = ring.rank, dict(case.options)
    arrays = [layout.shard(case.q, rank), kv_layout.shard(case.k, rank), kv_layout.shard(case.v, rank)]
    if isinstance(options.get("mask"), mx.array):
        options["mask"] = layout.shard(options["mask"], rank)
    if "segments" in options:
        q_ids, k_ids = options["segments"]
        options["segments"] = (layout.shard(q_ids, rank, axis=1), kv_layout.shard(k_ids, rank, axis=1))
    return arrays, options


def rows_of(layout: ra.Layout, rank: int) -> np.ndarray:
    return layout.positions(rank) - layout.start


def run(case: Case, ring: Ring, kind: str, **more) -> tuple[mx.array, mx.array, ra.Layout]:
    layout, kv_layout = layouts(case, kind, ring.size)
    arrays, options = local(case, ring, layout, kv_layout)
    out, lse = ra.ring_attention(
        *arrays, ring=ring, layout=layout, kv_layout=kv_layout, return_lse=True, **{**options, **more}
    )
    return out, lse, layout


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
def test_random_cases(ring: Ring, kind: str, strategy: str | None) -> None:
    for seed in range(5):
        case = random_case(1000 * LAYOUTS.index(kind) + seed)
        backend = "reference" if seed % 5 == 3 else None
        out, lse, layout = run(case, ring, kind, strategy=strategy, backend=backend)
        assert out.dtype == case.q.dtype
        check(case, out, lse, rows=rows_of(layout, ring.rank), what=f"{seed=} {kind} {strategy}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metal(ring: Ring, strategy: str) -> None:
    """The Metal kernels carry the state from hop to hop."""
    for seed, options in ((1, {"mask": "causal"}), (2, {"window": 40, "softcap": 3.0})):
        case = replace(random_case(seed, q_len=113, k_len=113), options=options)
        out, lse, layout = run(case, ring, "zigzag", strategy=strategy, backend="metal")
        check(case, out, lse, rows=rows_of(layout, ring.rank), what=f"{seed=} {strategy}")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_decode(ring: Ring, kind: str) -> None:
    for seed in range(12):
        case = random_case(seed, q_len=1 + seed % 3, k_len=(seed * 13) % 150 + 3)
        kv_layout = make_layout(kind, case.k.shape[2], ring.size)
        arrays = [case.q, kv_layout.shard(case.k, ring.rank), kv_layout.shard(case.v, ring.rank)]
        options = {"mask": None, **case.options}
        if "segments" in options:
            q_ids, k_ids = options["segments"]
            options["segments"] = (q_ids, kv_layout.shard(k_ids, ring.rank, axis=1))
        out, lse = ra.decode_attention(*arrays, ring=ring, kv_layout=kv_layout, return_lse=True, **options)
        check(case, out, lse, what=f"{seed=} {kind}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bits_repeat(ring: Ring, strategy: str) -> None:
    """Every run gives the same bits, for any order of arrival."""
    case = random_case(5, q_len=300, k_len=300)
    first = [np.array(x.astype(mx.float32)) for x in run(case, ring, "zigzag", strategy=strategy)[:2]]
    for _ in range(5):
        again = run(case, ring, "zigzag", strategy=strategy)[:2]
        for a, b in zip(first, again):
            np.testing.assert_array_equal(a, np.array(b.astype(mx.float32)))


def test_decode_is_the_same_everywhere(ring: Ring) -> None:
    case = random_case(7, q_len=2, k_len=200)
    kv_layout = make_layout("weighted", 200, ring.size)
    k, v = (kv_layout.shard(x, ring.rank) for x in (case.k, case.v))
    out = ra.decode_attention(case.q, k, v, ring=ring, kv_layout=kv_layout)
    mx.eval(out)
    bits = [bytes(reply) for reply in ring.exchange([memoryview(out).cast("B")])]
    assert len(set(bits)) == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32])
def test_gather(ring: Ring, dtype: mx.Dtype) -> None:
    for kind in LAYOUTS:
        for n in (0, 1, 7, 113):
            layout = make_layout(kind, n, ring.size, start=3)
            whole = mx.random.normal((2, 3, n, 4), key=mx.random.key(n)).astype(dtype)
            for axis, x in ((2, whole), (-3, whole.swapaxes(1, 2))):
                got = layout.gather(layout.shard(x, ring.rank, axis), ring, axis)
                assert mx.array_equal(got, x), (kind, n)


def test_error_does_not_grow_with_ranks(ring: Ring) -> None:
    """bfloat16 on any number of ranks is as accurate as on one: nothing is rounded between hops."""
    case = random_case(1, q_len=300, k_len=300)
    case.q, case.k, case.v = (x.astype(mx.bfloat16) for x in (case.q, case.k, case.v))
    case.options = {"mask": "causal"}
    exact = case.exact()[0]
    out, _, layout = run(case, ring, "zigzag", strategy="pass_kv")
    one = ra.attention(case.q, case.k, case.v, **case.options)
    rows = rows_of(layout, ring.rank)
    errors = [
        np.abs(np.array(x.astype(mx.float32)) - exact[:, :, rows]).max(initial=0)
        for x in (out, one[:, :, mx.array(rows)])
    ]
    assert errors[0] <= 1.01 * errors[1]


def test_padding_may_hold_anything(ring: Ring) -> None:
    case = random_case(3, q_len=113, k_len=113)
    ids = np.zeros((case.q.shape[0], 113), np.int32)
    ids[:, 40:60] = -1
    case.options = {"segments": (mx.array(ids), mx.array(ids)), "mask": "causal"}
    clean = Case(case.q, case.k, case.v, case.q_pos, case.k_pos, case.options)
    junk = mx.array(np.where(ids[:, None, :, None] < 0, np.float32(np.nan), 0)).astype(case.q.dtype)
    case.q, case.k, case.v = (x + junk for x in (case.q, case.k, case.v))
    for strategy in STRATEGIES:
        for backend in ("host", "reference"):
            out, lse, layout = run(case, ring, "zigzag", strategy=strategy, backend=backend)
            check(clean, out, lse, rows=rows_of(layout, ring.rank), what=f"{strategy} {backend}")


def test_bytes_are_the_fewest(ring: Ring) -> None:
    """With contiguous causal blocks only later ranks need a block, and it goes no further."""
    n, size = 96, ring.size
    layout = ra.Layout.contiguous(n, size)
    x = layout.shard(mx.random.normal((1, 2, n, 8), key=mx.random.key(0)), ring.rank)
    before = ring.bytes_sent
    ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal", strategy="pass_kv")
    sent = ring.bytes_sent - before
    passing = [b for b in range(size) if b <= ring.rank] if ring.rank + 1 < size else []
    assert sent == sum(layout.local_length(b) for b in passing) * 2 * 2 * 8 * 4


def test_window_ends_the_ring_early(ring: Ring) -> None:
    n, size = 64 * ring.size, ring.size
    layout = ra.Layout.contiguous(n, size)
    x = layout.shard(mx.random.normal((1, 1, n, 8), key=mx.random.key(0)), ring.rank)
    before = ring.bytes_sent
    ra.ring_attention(x, x, x, ring=ring, layout=layout, window=5, strategy="pass_kv")
    assert ring.bytes_sent - before == (4 * 2 * 8 * 4 if ring.rank + 1 < size else 0)


LONG = 640  # tokens: blocks longer than a message that MPI copies


@cache
def long_problem(dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Make queries, keys and the result of causal attention on one device, with tokens before heads in memory."""
    whole = [mx.random.normal((1, LONG, heads, 64), key=mx.random.key(heads)).astype(dtype) for heads in (6, 2)]
    q, k = (x.swapaxes(1, 2) for x in whole)
    expected = ra.attention(q, k, k, mask="causal").astype(mx.float32)
    mx.eval(q, k, expected)
    return q, k, expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(mx.float32, 2e-6), (mx.bfloat16, 0.02)])
def test_blocks_of_very_different_sizes(ring: Ring, strategy: str, strided: bool, dtype: mx.Dtype, atol: float) -> None:
    """A block that fills only part of its slot is forwarded as it arrived, without old contents of the slot."""
    layout = ra.Layout.weighted(LONG, [1, *[7] * (ring.size - 1)])
    q, k, expected = long_problem(dtype)
    for _ in range(3):
        mine = [layout.shard(x, ring.rank) for x in (q, k, k)]
        mine = mine if strided else [mx.contiguous(x) for x in mine]
        out = ra.ring_attention(*mine, ring=ring, layout=layout, mask="causal", strategy=strategy)
        mine_expected = layout.shard(expected, ring.rank)
        np.testing.assert_allclose(np.array(out.astype(mx.float32)), np.array(mine_expected), atol=atol)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_keys_between_queries(ring: Ring, strategy: str) -> None:
    """Runs of keys may lie between two queries of a rank, visible to neither."""
    q_layout, kv_layout = ra.Layout.cyclic(1200, ring.size, 200), ra.Layout.contiguous(1200, ring.size)
    x = mx.random.normal((1, 1, 1200, 16), key=mx.random.key(0))
    mine = [q_layout.shard(x, ring.rank), *[kv_layout.shard(x, ring.rank)] * 2]
    out = ra.ring_attention(*mine, ring=ring, layout=q_layout, kv_layout=kv_layout, window=10, strategy=strategy)
    expected = q_layout.shard(ra.attention(x, x, x, window=10), ring.rank)
    np.testing.assert_allclose(np.array(out), np.array(expected), atol=2e-6)


def test_gather_has_no_gradient_yet(ring: Ring) -> None:
    layout = ra.Layout.contiguous(8, ring.size)
    x = mx.ones((1, 1, layout.local_length(ring.rank), 2))
    with pytest.raises(ra.TransformError, match="gather"):
        mx.grad(lambda x: layout.gather(x, ring).sum())(x)
    ring.barrier()
