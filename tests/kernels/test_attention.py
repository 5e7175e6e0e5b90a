"""`ringattn.attention` on one device, every backend against float64. Its errors are in test_wrong_input."""

from __future__ import annotations

import itertools
import sys
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn.cpu import softmax, work_units
from ringattn.cuda import dispatch as cuda_plan
from ringattn.cuda import launch as cuda_launch
from ringattn.kernels import reference
from ringattn.metal import dispatch as metal_plan
from ringattn.verify.oracle import FLOATS, Case, check, random_case, to64

BACKENDS = ("host", "metal", "reference", *(["cuda"] if cuda_launch.gpu() else []))
LENGTHS = (0, 1, 7, 113, 300)
SIZES = {  # what cuts the work, and the largest that a test makes of it
    "host": (work_units, {"ROWS": 16, "SCORES": 64, "SMALL": 1 << 10, "EDGE": 16}),
    "metal": (metal_plan, {"FEW_ROWS": 100, "LEAST_KEYS": 64}),
    "cuda": (cuda_plan, {"FEW_ROWS": 100, "LEAST_KEYS": 64}),
    "reference": (reference, {"QUERIES": 16, "KEYS": 32}),
}
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
    """A problem of contiguous tokens."""
    k_len = q_len if k_len is None else k_len
    offset = k_len - q_len if offset is None else offset
    q = normal(1, batch, heads, q_len, dim, dtype=dtype, size=size)
    k = normal(2, batch, kv_heads, k_len, dim, dtype=dtype)
    v = normal(3, batch, kv_heads, k_len, dim if v_dim is None else v_dim, dtype=dtype)
    return Case(q, k, v, np.arange(offset, offset + q_len), np.arange(k_len), options)


def run(case: Case, backend: str, **more) -> tuple[mx.array, mx.array]:
    """`out` and `lse`; positions are given where they are not what they are by default."""
    q_len, k_len = len(case.q_pos), len(case.k_pos)
    usual = np.array_equal(case.q_pos, np.arange(k_len - q_len, k_len)) and np.array_equal(case.k_pos, np.arange(k_len))
    if not usual and "offset" not in more:
        more["positions"] = (case.q_pos, case.k_pos)
    return ra.attention(case.q, case.k, case.v, backend=backend, return_lse=True, **{**case.options, **more})


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(memoryview(a)) == bytes(memoryview(b))


# Every feature alone, and many together


def ids_of(batch: int, q_len: int, k_len: int) -> tuple[mx.array, mx.array]:
    """Documents of some 20 tokens, and padding at both ends."""
    k_ids = np.tile(np.arange(k_len) // 20, (batch, 1)).astype(np.int32)
    k_ids[:, : k_len // 10] = -1
    k_ids[-1, k_len - k_len // 5 :] = -3
    return mx.array(k_ids[:, k_len - q_len :]), mx.array(k_ids)


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
    """Every length without and with a prefix, the dtypes by turns."""
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
    """How the work is cut is a matter of speed alone: with tiny tiles every case meets all their edges."""
    r = np.random.default_rng(seed)
    module, sizes = SIZES[backend]
    for name, size in sizes.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, int(r.integers(1, size)))
    case = random_case(seed, lengths=(7, 40, 113))
    check(case, *run(case, backend))


@pytest.mark.parametrize("seed", range(84, 100))
def test_host_without_its_compiled_step(monkeypatch, seed):
    monkeypatch.setattr(softmax, "compiled", lambda: None)
    case = random_case(seed, lengths=LENGTHS)
    check(case, *run(case, "host"))


@pytest.mark.parametrize("how", ["in_numpy", "compiled"])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_softmax_step(monkeypatch, how, size):
    """Any number of steps leave weights, maximum and sum of one softmax, rows that see nothing included."""
    if how == "in_numpy":
        monkeypatch.setattr(softmax, "compiled", lambda: None)
    elif softmax.compiled() is None:
        pytest.skip("there was no compiler")
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


# Where tokens stand


@every_backend
@pytest.mark.parametrize("far", [sys.maxsize, 2**70], ids=["sys.maxsize", "2**70"])
def test_a_window_may_be_endless(backend, far):
    """On the side that is not meant to be bounded, whatever large number stands for that."""
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
    """The last query stands with the last key, so the first ones come before all keys and see nothing."""
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
    """What a rank of a zigzag ring has: queries from both ends of the sequence."""
    layout = ra.Layout.zigzag(600, 3)
    for rank in range(3):
        case = make(200, 200, batch=1, mask="causal")
        case.q_pos, case.k_pos = layout.positions(rank), layout.positions((rank + 1) % 3)
        check(case, *run(case, backend))


@every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_inputs(backend, dtype):
    """Slices of a larger cache, and tokens before heads in memory: the same bits as contiguous copies."""
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


# Bits


@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"window": 50}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_bits_do_not_depend_on_threads(monkeypatch, options, size):
    case = make(700, 900, heads=2, dim=32, size=size, **options)
    monkeypatch.setenv("RINGATTN_THREADS", "3")
    work_units._pool.cache_clear()
    first = run(case, "host")
    for threads in ("1", "2", "3", "3", "3"):
        monkeypatch.setenv("RINGATTN_THREADS", threads)
        assert all(map(same_bits, run(case, "host"), first)), threads


@every_backend
def test_bits_do_not_depend_on_what_ran_before(backend):
    """Scratch memory is kept from call to call: what it holds must not matter."""
    case = make(113, 300, window=(20, 60), softcap=3.0)
    first = run(case, backend)
    for junk in (np.nan, np.inf, 1e38):
        other = make(300, 300, dim=64, mask="causal")
        other.q, other.v = other.q * junk, other.v * junk
        mx.eval(run(other, backend))
        assert all(map(same_bits, run(case, backend), first))


@every_backend
def test_batch_entries_and_heads_do_not_meet(backend):
    case = make(50, 70, heads=6, kv_heads=3, mask="causal")
    out, lse = run(case, backend)
    for b in range(2):
        for h in range(6):
            alone = ra.attention(
                *(x[b : b + 1, i : i + 1] for x, i in ((case.q, h), (case.k, h // 2), (case.v, h // 2))),
                mask="causal",
                backend=backend,
                return_lse=True,
            )
            assert mx.allclose(alone[0][0, 0], out[b, h], atol=2e-6) and mx.allclose(
                alone[1][0, 0], lse[b, h], atol=2e-6
            )


# Numbers that are not numbers


def poisoned(case: Case, name: str, value: float, at: tuple) -> Case:
    arrays = {n: np.array(getattr(case, n).astype(mx.float32)) for n in ("q", "k", "v")}
    arrays[name][at] = value
    return Case(*(mx.array(x).astype(case.q.dtype) for x in arrays.values()), case.q_pos, case.k_pos, case.options)


MASKS = {
    "none": {},
    "causal": {"mask": "causal"},
    "window": {"window": 30},
    "boolean": {"mask": normal(6, 150, 200) > 0},
    "additive": {"mask": mx.where(normal(6, 4, 150, 200) > 0, normal(7, 4, 150, 200), -mx.inf)},
    "segments": {"segments": ids_of(2, 150, 200)},
}


@every_backend
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_with_those_who_see_it(backend, mask, name, value):
    """It comes out in the rows that attend to it and leaves the bits of all others alone, whatever the tile."""
    clean = make(150, 200, **MASKS[mask])
    batch, head, token = 1, 1, 120
    case = poisoned(clean, name, value, (batch, head, token))
    touched = np.zeros((2, 4, 150), bool)
    if name == "q":
        touched[batch, head, token] = clean.visible[batch, head, token].any()
    else:
        touched[batch, 2:4] = clean.visible[batch, 2:4, :, token]
    (out, lse), (clean_out, clean_lse) = run(case, backend), run(clean, backend)
    bad = ~np.isfinite(np.array(out)).all(-1)
    np.testing.assert_array_equal(bad, touched)
    np.testing.assert_allclose(np.array(out)[~touched], np.array(clean_out)[~touched], rtol=0, atol=5e-6)
    np.testing.assert_allclose(np.array(lse)[~touched], np.array(clean_lse)[~touched], rtol=0, atol=5e-6)


@every_backend
def test_one_column_of_a_value(backend):
    """What is not finite in one column of v leaves the other columns alone."""
    clean = make(20, 30, mask="causal")
    out = np.array(run(poisoned(clean, "v", np.nan, (0, 0, 15, 3)), backend)[0])
    expected = np.zeros(out.shape, bool)
    expected[0, :2, 5:, 3] = True
    np.testing.assert_array_equal(np.isnan(out), expected)


@every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"window": (9, 9)}, {"sinks": mx.zeros(4)}], ids=str)
def test_padding_may_hold_anything(backend, options, junk, dtype):
    clean = make(113, 150, dtype=dtype, segments=ids_of(2, 113, 150), **options)
    case = clean
    for name, ids in zip("qkv", (0, 1, 1)):
        padding = np.array(clean.options["segments"][ids]) < 0
        heads = getattr(clean, name).shape[1]
        case = poisoned(case, name, junk, np.repeat(padding[:, None], heads, 1))
    assert not np.isfinite(to64(case.v)).all() or junk == 3e38
    check(clean, *run(case, backend))


@every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [10.0, 100.0])
def test_peaked_logits(backend, dtype, size):
    for options in ({}, {"mask": "causal"}, {"softcap": 300.0}, {"sinks": mx.array([0.0, 300.0, -300.0, 50.0])}):
        case = make(113, 150, dim=64, dtype=dtype, size=size, **options)
        check(case, *run(case, backend), what=str(options))


@every_backend
@pytest.mark.parametrize("q_len", [1, 113])
def test_values_near_the_end_of_float32(backend, q_len):
    """As long as their plain sum fits, so does what the kernel carries."""
    case = make(q_len, 30, batch=1, mask=None)
    case.v = mx.clip(case.v, -1, 1) * 1e37
    out, lse = run(case, backend)
    check(case, out, lse)
    assert np.isfinite(np.array(out)).all()


@every_backend
def test_additive_mask_with_rows_of_minus_infinity(backend):
    mask = np.array(normal(8, 1, 4, 113, 150))
    mask[:, 1, 40:60] = -np.inf
    mask[:, :, 70:, 20:130] = -np.inf
    case = make(113, 150, mask=mx.array(mask))
    out, lse = run(case, backend)
    check(case, out, lse)
    assert mx.all(out[:, 1, 40:60] == 0) and mx.all(lse[:, 1, 40:60] == -mx.inf)


@every_backend
def test_huge_additive_mask_is_not_minus_infinity(backend):
    """A row of finite but very low logits still is a softmax (as with float32's least number for a mask)."""
    case = make(20, 30, mask=mx.full((20, 30), -1e30))
    case.options["mask"][:, 10:] = -mx.inf
    out, lse = run(case, backend)
    check(case, out, lse)
    assert mx.all(lse > -mx.inf)


# Memory


def test_host_never_holds_a_score_matrix(monkeypatch):
    """4096 x 4096 scores of float32 would be 64 MiB, and a boolean mask of them 16."""
    monkeypatch.setenv("RINGATTN_THREADS", "1")
    case = make(4096, batch=1, heads=1, kv_heads=1, dim=16)
    positions = case.q_pos * 2
    for options in (
        {},
        {"mask": "causal"},
        {"window": (1000, 1000)},
        {"positions": (positions, positions), "window": 9},
    ):
        mx.eval(case.q, case.k, case.v)
        tracemalloc.start()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(ra.attention(case.q, case.k, case.v, backend="host", return_lse=True, **options))
        peak = tracemalloc.get_traced_memory()[1], mx.get_peak_memory() - before
        tracemalloc.stop()
        assert peak[0] < 8e6, f"NumPy: {peak[0]} bytes with {options}"
        assert peak[1] < 4e6, f"MLX: {peak[1]} bytes with {options}"


# Transformations


TRANSFORMS = {
    "grad": lambda f, x: mx.grad(lambda x: f(x).sum())(x),
    "value_and_grad": lambda f, x: mx.value_and_grad(lambda x: f(x).sum())(x)[1],
    "vjp": lambda f, x: mx.vjp(f, [x], [f(x)])[1][0],
    "jvp": lambda f, x: mx.jvp(f, [x], [mx.ones_like(x)])[1][0],
    "vmap": lambda f, x: mx.vmap(f)(mx.stack([x, x])),
    "compile": lambda f, x: mx.compile(f)(x),
    "grad of checkpoint": lambda f, x: mx.grad(lambda x: mx.checkpoint(f)(x).sum())(x),
    "second derivative": lambda f, x: mx.grad(lambda x: mx.grad(lambda x: f(x).sum())(x).sum())(x),
    "compiled grad": lambda f, x: mx.compile(mx.grad(lambda x: f(x).sum()))(x),
}
OF = ("q", "k", "v", "sinks", "mask", "lse")


def function_of(name: str, backend: str):
    """`attention` as a function of one of its arrays, and that array."""
    case = make(5, 7, batch=1)
    arrays = {"q": case.q, "k": case.k, "v": case.v, "sinks": mx.zeros(4), "mask": normal(9, 5, 7)}

    def function(x: mx.array) -> mx.array:
        changed = {**arrays, "q" if name == "lse" else name: x}
        q, k, v = (changed.pop(n) for n in "qkv")
        out, lse = ra.attention(q, k, v, backend=backend, return_lse=True, **changed)
        return lse if name == "lse" else out

    return function, arrays["q" if name == "lse" else name]


REFUSED = ("jvp", "vmap", "compile", "second derivative", "compiled grad")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_of_fused_kernels(transform, name, backend):
    """Their arithmetic is not in the graph: what they do not provide for must raise, or it would silently be zero."""
    if (transform, name, backend) == ("compile", "sinks", "host"):
        pytest.skip("sinks come in after the kernel, so compiling for them alone works")
    function, x = function_of(name, backend)
    if (transform, backend) == ("compile", "cuda"):
        assert mx.allclose(TRANSFORMS[transform](function, x), function(x), atol=1e-6), "it stays lazy, so it works"
    elif (transform, backend) in (("jvp", "cuda"), ("vmap", "cuda")):
        with pytest.raises((ra.TransformError, ValueError), match="cuda|Not implemented for CustomKernel"):
            mx.eval(TRANSFORMS[transform](function, x))
    elif transform in REFUSED:
        with pytest.raises(ra.TransformError) as caught:
            mx.eval(TRANSFORMS[transform](function, x))
        assert backend in str(caught.value) and "\n" not in str(caught.value)
    else:
        expected = TRANSFORMS[transform](function_of(name, "reference")[0], x)
        assert mx.allclose(TRANSFORMS[transform](function, x), expected, atol=1e-5)
    assert mx.all(mx.isfinite(function(x))), "and works afterwards"


@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if "compile" not in name])
def test_reference_has_transformations(transform, name):
    function, x = function_of(name, "reference")
    result = TRANSFORMS[transform](function, x)
    assert mx.all(mx.isfinite(result))
    if transform == "vmap":
        assert mx.allclose(result, mx.stack([function(x)] * 2), atol=1e-6)
    elif transform != "second derivative":
        assert mx.any(result != 0)
    elif name not in ("v",):  # out is linear in v
        assert mx.any(mx.abs(result) > 1e-4)


def test_reference_compiles():
    function, x = function_of("q", "reference")
    compiled = mx.compile(function)
    for _ in range(2):
        assert mx.allclose(compiled(x), function(x), atol=1e-6)
        x = x + 1


@every_backend
def test_keys_in_a_gap_between_queries(backend: str) -> None:
    """Keys that no query of a tile sees, between two that it has."""
    r = np.random.default_rng(0)
    for _ in range(60):
        q_len, k_len = int(r.integers(1, 40)), int(r.integers(1, 600))
        q_pos, k_pos = (np.sort(r.choice(900, n, replace=False)).astype(np.int32) for n in (q_len, k_len))
        q, k = (mx.array(r.standard_normal((1, 1, n, 8)).astype(np.float32)) for n in (q_len, k_len))
        window = [(0, 0), 3, (5, 2), 60][int(r.integers(0, 4))]
        case = Case(q, k, k, q_pos, k_pos, {"window": window})
        out, lse = ra.attention(q, k, k, positions=(q_pos, k_pos), backend=backend, return_lse=True, window=window)
        check(case, out, lse)
