"""Tests of `ringattn.attention` on one device: every backend against float64. Its errors are in test_validation."""

from __future__ import annotations

import itertools
import sys

import mlx.core as mx
import numpy as np
import pytest
from attention_cases import every_backend, ids_of, make, normal, run, same_bits

import ringattn as ra
from ringattn.cpu import flash, softmax, work_units
from ringattn.cuda import dispatch as cuda_plan
from ringattn.kernels import reference
from ringattn.metal import dispatch as metal_plan
from ringattn.verify.oracle import FLOATS, Case, check, random_case, to64

LENGTHS = (0, 1, 7, 113, 300)
SIZES = {  # sizes that cut the work, and their largest values in tests
    "host": [
        (work_units, {"ROWS": 16, "SCORES": 64, "SMALL": 1 << 10, "EDGE": 16}),
        (flash, {"KEYS": 40}),
    ],
    "metal": [(metal_plan, {"FEW_ROWS": 100, "LEAST_KEYS": 64})],
    "cuda": [(cuda_plan, {"FEW_ROWS": 100, "LEAST_KEYS": 64})],
    "reference": [(reference, {"QUERIES": 16, "KEYS": 32})],
}


# Each feature alone, and many together


FEATURES = {
    "plain": lambda case: {},
    "causal": lambda case: {"mask": "causal"},
    "window": lambda case: {"window": 9},
    "window of one": lambda case: {"window": 1},
    "window and causal": lambda case: {"window": (30, 5), "mask": "causal"},
    "window pair": lambda case: {"window": (3, 20)},
    "softcap": lambda case: {"softcap": 1.5},
    "scale": lambda case: {"scale": 0.7},
    "scale 0": lambda case: {"scale": 0},
    "scale below 0": lambda case: {"scale": -0.2},
    "sinks": lambda case: {"sinks": mx.arange(4) - 1.0},
    "sinks and causal": lambda case: {"sinks": mx.arange(4).astype(case.q.dtype), "mask": "causal"},
    "segments": lambda case: {"segments": ids_of(2, case.q.shape[2], case.k.shape[2])},
    "boolean mask": lambda case: {"mask": normal(4, 2, 4, case.q.shape[2], case.k.shape[2]) > 0},
    "boolean mask of keys": lambda case: {"mask": normal(4, 2, 1, 1, case.k.shape[2]) > 0},
    "boolean mask of rows": lambda case: {"mask": normal(4, case.q.shape[2], 1) > 0},
    "one boolean": lambda case: {"mask": mx.array(False)},
    "additive mask": lambda case: {"mask": normal(4, 4, case.q.shape[2], case.k.shape[2]).astype(case.q.dtype)},
    "bias of rows": lambda case: {"mask": normal(4, 2, 1, case.q.shape[2], 1)},
}


@every_backend
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(backend, feature):
    """Each feature is right for every length, without and with a prefix, in alternating dtypes."""
    for (q_len, extra), dtype in zip(itertools.product(LENGTHS, (0, 25)), itertools.cycle(FLOATS)):
        case = make(q_len, q_len + extra, dtype=dtype)
        case.options = FEATURES[feature](case)
        out, lse = run(case, backend)
        assert out.dtype == dtype
        check(case, out, lse, what=f"{q_len=} {extra=} {dtype=}")


@every_backend
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_cases(backend, first):
    for seed in range(first, first + 20):
        case = random_case(seed, lengths=LENGTHS)
        check(case, *run(case, backend), what=f"{seed=}")


@every_backend
@pytest.mark.parametrize("seed", range(60, 84))
def test_tiles_of_any_size(monkeypatch, backend, seed):
    """Tile sizes do not change results. Tiny tiles exercise all edges."""
    r = np.random.default_rng(seed)
    for module, sizes in SIZES[backend]:
        for name, size in sizes.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, int(r.integers(1, size)))
    case = random_case(seed, lengths=(7, 40, 113))
    check(case, *run(case, backend))


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_softmax_step(size):
    """Any number of steps give the weights, maximum and sum of one softmax, also for rows without a visible key."""
    r = np.random.default_rng(0)
    m, l = np.full((2, 9), -np.inf, np.float32), np.zeros((2, 9), np.float32)
    seen, weights = np.zeros((2, 9, 0)), np.zeros((2, 9, 0))
    for keys in (1, 3, 8, 31, 64, 100):
        scores = (r.standard_normal((2, 9, keys)) * size).astype(np.float32)
        scores[:, 3:6] = -np.inf
        scores[:, 6:][r.random((2, 3, keys)) < 0.7] = -np.inf
        seen = np.concatenate([seen, scores.astype(np.float64)], -1)
        decay = softmax.step(scores, m, l)
        weights = np.concatenate([weights * decay[..., None], scores], -1)
    top = seen.max(-1)
    exact = np.exp(seen - np.where(top == -np.inf, 0, top)[..., None])
    np.testing.assert_array_equal(m, top)
    np.testing.assert_allclose(weights, exact, rtol=1e-5 * max(1, size / 10), atol=1e-30)
    np.testing.assert_allclose(l, exact.sum(-1), rtol=1e-5)


@every_backend
@pytest.mark.parametrize("mask", [None, "causal"])
def test_many_tokens(backend, mask):
    case = make(1023, 1500, batch=1, kv_heads=1, heads=2, dim=64, mask=mask)
    check(case, *run(case, backend))


@every_backend
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1), (7, 1)])
def test_grouped_heads(backend, heads, kv_heads):
    case = make(40, 70, heads=heads, kv_heads=kv_heads, mask="causal", sinks=mx.arange(heads) - 2.0)
    case.options["mask"] = normal(5, 1, heads, 40, 70) > -1
    check(case, *run(case, backend))


@every_backend
@pytest.mark.parametrize("dim,v_dim", [(1, 1), (5, 3), (8, 64), (80, 128), (256, 16), (192, 128)])
def test_head_dims(backend, dim, v_dim):
    case = make(33, 50, dim=dim, v_dim=v_dim, mask="causal")
    out, lse = run(case, backend)
    assert out.shape == (2, 4, 33, v_dim)
    check(case, out, lse)


@every_backend
def test_return_lse_and_out_dtype(backend):
    case = make(20, 30, dtype=mx.bfloat16, mask="causal")
    out, lse = run(case, backend)
    alone = ra.attention(case.q, case.k, case.v, mask="causal", backend=backend)
    assert isinstance(alone, mx.array) and same_bits(alone.view(mx.uint16), out.view(mx.uint16))
    assert lse.shape == (2, 4, 20) and lse.dtype == mx.float32
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        other, other_lse = run(case, backend, out_dtype=dtype)
        assert other.dtype == dtype and same_bits(other_lse, lse)
        budget = 2.0 ** -{mx.float32: 20, mx.float16: 9, mx.bfloat16: 6}[dtype]
        if backend == "cuda":  # its matrix units take the weights rounded to bfloat16
            budget = max(budget, 2.0**-8)
        np.testing.assert_allclose(to64(other), case.exact()[0], rtol=0, atol=budget)
    assert run(case, backend, out_dtype=mx.float32)[0].astype(mx.bfloat16).tolist() == out.tolist(), "rounded once"


def test_backend_by_default():
    case = make(5)
    assert same_bits(ra.attention(case.q, case.k, case.v), run(case, "host")[0])


# Positions of tokens


@every_backend
@pytest.mark.parametrize("far", [sys.maxsize, 2**70], ids=["sys.maxsize", "2**70"])
def test_a_window_may_be_endless(backend, far):
    """A window side may be unbounded, given as any large number."""
    case = make(40, 60)
    for window, same in (
        (far, {"mask": "causal"}),
        ((4, far), {"window": (4, 1000)}),
        ((far, 4), {"window": (1000, 4)}),
    ):
        for x, y in zip(run(case, backend, window=window), run(case, backend, **same)):
            assert same_bits(x, y), window


@every_backend
@pytest.mark.parametrize("options", [{"mask": "causal"}, {"window": 20}, {"window": (10, 10)}], ids=str)
@pytest.mark.parametrize("offset", [-400, -113, -40, -1, 0, 1, 40, 187, 300, 400, 2**31 - 113, -(2**31)])
def test_offset(backend, offset, options):
    case = make(113, 300, offset=offset, batch=1, heads=2, **options)
    check(case, *run(case, backend, offset=offset))


@every_backend
@pytest.mark.parametrize("q_len,k_len", [(300, 113), (7, 0), (300, 1), (41, 40), (0, 9)])
def test_more_queries_than_keys(backend, q_len, k_len):
    """The last query is aligned with the last key, so the first queries come before all keys and see none."""
    case = make(q_len, k_len, mask="causal")
    out, lse = run(case, backend)
    check(case, out, lse)
    blind = q_len - k_len
    if blind > 0:
        assert mx.all(out[:, :, :blind] == 0) and mx.all(lse[:, :, :blind] == -mx.inf)
        assert mx.all(lse[:, :, blind:] > -mx.inf)


@every_backend
@pytest.mark.parametrize("kind", ["array", "mx", "list", "negative"])
def test_positions_that_are_not_contiguous(backend, kind):
    for seed, options in enumerate([{"mask": "causal"}, {"window": 40}, {"window": (5, 60), "mask": "causal"}, {}]):
        r = np.random.default_rng(seed)
        case = make(113, 300, batch=1, **options)
        shift = -700 if kind == "negative" else 0
        case.q_pos = np.sort(r.choice(900, 113, replace=False)) + shift
        case.k_pos = (
            np.concatenate([np.arange(100), np.sort(r.choice(np.arange(100, 900), 200, replace=False))]) + shift
        )
        given = {"mx": mx.array, "list": np.ndarray.tolist}.get(kind, lambda x: x.astype(np.int32))
        check(case, *run(case, backend, positions=(given(case.q_pos), given(case.k_pos))), what=str(options))


@every_backend
def test_zigzag_positions(backend):
    """A rank of a zigzag ring has queries from both ends of the sequence."""
    layout = ra.Layout.zigzag(600, 3)
    for rank in range(3):
        case = make(200, 200, batch=1, mask="causal")
        case.q_pos, case.k_pos = layout.positions(rank), layout.positions((rank + 1) % 3)
        check(case, *run(case, backend))


@every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_inputs(backend, dtype):
    """Slices of a larger cache, with tokens before heads in memory, give the bits of contiguous copies."""
    q = normal(1, 2, 40, 4, 16, dtype=dtype).swapaxes(1, 2)
    cache = normal(2, 2, 2, 2, 128, 16, dtype=dtype)
    k, v = cache[0, :, :, 9:99], cache[1, :, :, 30:120]
    mask = (normal(4, 90, 2, 40) > -1).transpose(1, 2, 0)[:, None]
    copies = [mx.array(np.array(x.view(mx.uint16) if dtype == mx.bfloat16 else x)) for x in (q, k, v)]
    copies = [x.view(dtype) for x in copies]
    for options in ({"mask": "causal"}, {"mask": mask}, {"mask": "causal", "window": 20}):
        case = Case(q, k, v, np.arange(50, 90), np.arange(90), options)
        out, lse = run(case, backend)
        check(case, out, lse)
        again = run(Case(*copies, case.q_pos, case.k_pos, options), backend)
        assert mx.array_equal(out, again[0]) and mx.array_equal(lse, again[1])


@every_backend
def test_strided_segments_and_sinks(backend: str) -> None:
    """Every second number of an array gives the bits of a copy, in the results and in the gradients."""
    wide = mx.array(np.random.default_rng(0).integers(0, 3, (2, 140)), mx.int32)
    strided = {"segments": (wide[:, 60::2], wide[:, ::2]), "sinks": normal(0, 8)[::2]}
    copies = {
        "segments": tuple(mx.array(np.array(ids)) for ids in strided["segments"]),
        "sinks": mx.array(np.array(strided["sinks"])),
    }
    case = make(40, 70, **strided)
    check(case, *run(case, backend))
    results = []
    for options in (strided, copies):

        def loss(q: mx.array, options=options) -> mx.array:
            return ra.attention(q, case.k, case.v, backend=backend, **options).square().sum()

        results.append([*run(case, backend, **options), mx.grad(loss)(case.q)])
    assert all(map(same_bits, *results))


@every_backend
def test_keys_in_a_gap_between_queries(backend: str) -> None:
    """No query of a tile sees the keys between two of its queries."""
    r = np.random.default_rng(0)
    for _ in range(60):
        q_len, k_len = int(r.integers(1, 40)), int(r.integers(1, 600))
        q_pos, k_pos = (np.sort(r.choice(900, n, replace=False)).astype(np.int32) for n in (q_len, k_len))
        q, k = (mx.array(r.standard_normal((1, 1, n, 8)).astype(np.float32)) for n in (q_len, k_len))
        window = [(0, 0), 3, (5, 2), 60][int(r.integers(0, 4))]
        case = Case(q, k, k, q_pos, k_pos, {"window": window})
        out, lse = ra.attention(q, k, k, positions=(q_pos, k_pos), backend=backend, return_lse=True, window=window)
        check(case, out, lse)
