"""Tests of the gradient of `ringattn.attention`: every backend against the closed form in float64."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from attention_cases import BACKENDS as ALONE

import ringattn as ra
from ringattn.autograd.custom_function import custom_op
from ringattn.core.gradients import Gradients
from ringattn.core.masks import Band
from ringattn.core.rules import ScoreRules
from ringattn.cpu import flash, work_units
from ringattn.kernels import blockwise_backward
from ringattn.kernels.interface import KernelInputs
from ringattn.kernels.reference import ReferenceKernel
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import FLOATS, Case, GradientCase, random_case, to64

BACKENDS = (*ALONE, "blocked")
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def backend(request, monkeypatch):
    """Name of a backend. "blocked" is the reference with its blockwise gradient, as in a ring."""
    if request.param == "blocked":
        monkeypatch.setattr(ReferenceKernel, "differentiable", False)
    if request.param in ("blocked", "metal"):
        monkeypatch.setattr(blockwise_backward, "SCORES", 1 << 12)
        monkeypatch.setattr(blockwise_backward, "KEYS", 48)
        monkeypatch.setattr(blockwise_backward, "MIN_QUERIES", 24)
    return "reference" if request.param == "blocked" else request.param


def gradients(problem: GradientCase, backend: str, through: str = "both", **more) -> dict[str, mx.array]:
    """Compute gradients by `mx.vjp`, through `out`, the lse or both."""
    case, named = problem.case, problem.differentiable

    def function(*arrays: mx.array) -> list[mx.array]:
        given = dict(zip(named, arrays))
        q, k, v = (given.pop(name) for name in "qkv")
        options = {**case.options, **given, "backend": backend, **more}
        if through == "out":
            return [ra.attention(q, k, v, **options)]
        out, lse = ra.attention(q, k, v, return_lse=True, **options)
        empty = lse == -mx.inf
        return [mx.where(empty[..., None], 0 * out, out), mx.where(empty, 0.0, lse)]

    cotangents = [problem.dout] if through == "out" else [problem.dout, problem.dlse]
    _, found = mx.vjp(function, list(named.values()), cotangents)
    return dict(zip(named, found))


def check(problem: GradientCase, backend: str, **more) -> None:
    found = gradients(problem, backend, **more)
    for name, x in found.items():
        like = problem.differentiable[name]
        assert x.shape == like.shape and x.dtype == like.dtype, name
    ratios = problem.ratios(found)
    assert all(ratio <= 1 for ratio in ratios.values()), ratios


@every_backend
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(backend, feature):
    check(GradientCase.random(FEATURES[feature]()), backend)


@every_backend
@pytest.mark.parametrize("seed", range(40))
def test_random_combinations(backend, seed):
    check(GradientCase.random(random_case(seed)), backend)


@every_backend
@pytest.mark.parametrize("seed", [12, 25, 38])
def test_terms_that_cancel(backend, seed):
    """With dlse = dout . out the terms of the gradient of sinks cancel. Only rounding errors remain."""
    r = np.random.default_rng(seed)
    shapes = (2, 4, 1 + seed % 5, 64), (2, 2, 7, 64), (2, 2, 7, 64)
    arrays = [
        mx.array(np.random.default_rng(i).standard_normal(shape), mx.float32) for i, shape in enumerate(shapes, 1)
    ]
    options = {"mask": "causal", "sinks": mx.array(r.standard_normal(4), mx.float32)}
    case = Case(*arrays, np.arange(7 - shapes[0][2], 7), np.arange(7), options)
    problem = GradientCase.random(case, seed)
    problem.dlse = mx.array((to64(problem.dout) * case.exact()[0]).sum(-1), mx.float32)
    check(problem, backend)


@every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_through_out_alone(backend, dtype):
    case = FEATURES["causal"]()
    case = Case(*(x.astype(dtype) for x in (case.q, case.k, case.v)), case.q_pos, case.k_pos, case.options)
    problem = GradientCase.random(case)
    problem.dlse = mx.zeros(problem.dlse.shape)
    check(problem, backend, through="out")


@every_backend
def test_rows_that_see_nothing_have_no_gradient(backend):
    x = mx.array(np.random.default_rng(0).standard_normal((1, 2, 40, 16)), mx.float32)

    def loss(q, k, v):
        out, lse = ra.attention(q, k, v, offset=-20, mask="causal", backend=backend, return_lse=True)
        return out.sum() + mx.where(lse == -mx.inf, 0.0, lse).sum()

    for gradient in mx.grad(loss, argnums=(0, 1, 2))(x, x, x):
        assert mx.all(mx.isfinite(gradient)) and mx.any(gradient != 0)
    assert mx.all(mx.grad(loss)(x, x, x)[:, :, :20] == 0)


@every_backend
def test_padding_may_hold_any_bits(backend):
    r = np.random.default_rng(1)
    ids = np.repeat([-1, 0, 1, -1], 24)[None].astype(np.int32)
    clean = [r.standard_normal((1, 2, 96, 16)).astype(np.float32) for _ in range(3)]
    broken = [x.copy() for x in clean]
    for x, bits in zip(broken, (np.nan, np.inf, np.nan)):
        x[:, :, ids[0] < 0] = bits

    def loss(q, k, v):
        out = ra.attention(q, k, v, segments=(mx.array(ids), mx.array(ids)), mask="causal", backend=backend)
        return (out * out).sum()

    want, got = (mx.grad(loss, argnums=(0, 1, 2))(*map(mx.array, arrays)) for arrays in (clean, broken))
    for a, b in zip(want, got):
        assert mx.array_equal(a, b)
        assert np.all(np.array(b)[:, :, ids[0] < 0] == 0)


HIDING = {  # options that hide keys: 60 queries at positions 0 to 59, 80 keys at 0 to 79
    "causal": lambda r: {"mask": "causal"},
    "window": lambda r: {"window": (5, 3)},
    "softcap": lambda r: {"window": (5, 3), "softcap": 2.0},
    "boolean": lambda r: {"mask": mx.array((r.random((60, 80)) < 0.7) & (np.arange(80) % 9 != 4))},
    "additive": lambda r: {"mask": mx.array(np.where(r.random((4, 60, 80)) < 0.7, r.random((4, 60, 80)), -np.inf))},
    "additive, softcap": lambda r: {**HIDING["additive"](r), "softcap": 2.0},
    "segments": lambda r: {
        "segments": (
            mx.array(np.arange(120).reshape(2, 60) // 25),
            mx.array([[1] * 50 + [7] * 30, [3] * 50 + [9] * 30]),
        )
    },
}


def hiding_case(way: str, dtype: mx.Dtype = mx.float32) -> tuple[Case, np.ndarray]:
    """Make a case with keys that no query sees, and the mask of these keys, bool ``[B, Hkv, Lk]``."""
    r = np.random.default_rng(0)
    shapes = (2, 4, 60, 16), (2, 2, 80, 16), (2, 2, 80, 24)
    q, k, v = (mx.array(r.standard_normal(shape)).astype(dtype) for shape in shapes)
    options = HIDING[way](r)
    if way.startswith("additive"):
        options["mask"][..., 70:] = -mx.inf
    case = Case(q, k, v, np.arange(60), np.arange(80), options)
    unseen = ~case.visible.reshape(2, 2, 2, 60, 80).any((2, 3))
    assert unseen.any() and not unseen.all()
    return case, unseen


def put(case: Case, name: str, where: np.ndarray, value: float) -> Case:
    """Copy a case with `value` in some tokens of q, k or v. `where` is bool ``[B, H, L]``."""
    x = getattr(case, name)
    return replace(case, **{name: mx.where(mx.array(where)[..., None], mx.array(value, x.dtype), x)})


def loss_gradients(case: Case, backend: str) -> dict[str, np.ndarray]:
    """Compute all gradients of a loss through `out` and the lse."""
    named = GradientCase.random(case).differentiable

    def loss(*arrays: mx.array) -> mx.array:
        given = {**case.options, **dict(zip(named, arrays))}
        q, k, v = (given.pop(name) for name in "qkv")
        out, lse = ra.attention(q, k, v, offset=0, backend=backend, return_lse=True, **given)
        out = out.astype(mx.float32)
        return (out * out).sum() + mx.where(lse == -mx.inf, 0.0, lse).sum()

    found = mx.grad(loss, argnums=list(range(len(named))))(*named.values())
    return {name: to64(x) for name, x in zip(named, found)}


@pytest.fixture
def small_tiles(monkeypatch):
    """Give the host kernel several tiles, with empty and full ones among them."""
    for name, size in {"ROWS": 32, "SCORES": 32 * 16, "SMALL": 1, "EDGE": 16}.items():
        monkeypatch.setattr(work_units, name, size)
    monkeypatch.setattr(flash, "KEYS", 16)


@every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", HIDING)
def test_keys_that_no_query_sees_may_hold_any_bits(backend, small_tiles, way, dtype):
    clean, unseen = hiding_case(way, dtype)
    want = loss_gradients(clean, backend)
    for name in ("k", "v"):
        for value in (np.nan, np.inf, -np.inf):
            got = loss_gradients(put(clean, name, unseen, value), backend)
            assert not got["k"][unseen].any() and not got["v"][unseen].any()
            for x in got:
                np.testing.assert_array_equal(got[x], want[x], err_msg=f"d{x}, {value} in {name}")


@every_backend
@pytest.mark.parametrize("way", HIDING)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_of_what_is_not_finite(backend, small_tiles, way, value, name):
    """NaN reaches gradients that depend on it. Rows that do not see it, and keys that only they see, are unchanged."""
    clean, _ = hiding_case(way)
    visible, heads = clean.visible, getattr(clean, name).shape[1]
    where = np.zeros(getattr(clean, name).shape[:3], bool)
    where[1, heads - 1, 10 if way != "segments" else 30] = True
    rows = (np.repeat(where, 4 // heads, 1)[:, :, None] & visible).any(-1) if name != "q" else where & visible.any(-1)
    keys = (rows[..., None] & visible).reshape(2, 2, 2, 60, 80).any((2, 3))
    assert rows.any() and not rows[1].all() and keys.any() and not keys[1].all()
    want, got = loss_gradients(clean, backend), loss_gradients(put(clean, name, where, value), backend)
    for x, touched in {"q": rows, "k": keys, "v": keys}.items():
        np.testing.assert_allclose(got[x][~touched], want[x][~touched], rtol=0, atol=1e-5, err_msg=f"d{x}")
        if np.isnan(value):
            np.testing.assert_array_equal(np.isnan(got[x]).any(-1), touched, err_msg=f"d{x}")
    if "mask" in got:
        touched = (rows[..., None] & visible).any(0)
        np.testing.assert_allclose(got["mask"][~touched], want["mask"][~touched], rtol=0, atol=1e-5)
        if np.isnan(value):
            np.testing.assert_array_equal(np.isnan(got["mask"]), touched)


@every_backend
def test_incoming_gradients_of_rows_that_see_nothing_may_be_anything(backend, small_tiles):
    """The loss may divide by the norm of such a row's `out`, which is zero."""
    case, _ = hiding_case("segments")
    blind = ~case.visible.any(-1)
    assert blind.any() and not blind.all()

    def gradient(dout: np.ndarray) -> list[mx.array]:
        def function(q, k, v):
            return [ra.attention(q, k, v, offset=0, backend=backend, **case.options)]

        return mx.vjp(function, [case.q, case.k, case.v], [mx.array(dout)])[1]

    dout = np.random.default_rng(1).standard_normal((2, 4, 60, 24)).astype(np.float32)
    want = gradient(dout)
    for value in (np.nan, np.inf):
        dout[blind] = value
        for a, b in zip(gradient(dout), want):
            np.testing.assert_array_equal(np.array(a), np.array(b))


@every_backend
def test_through_merge(backend):
    """Merging two parts of the keys gives the gradients of the whole. Some rows see no key of the second part."""
    problem = GradientCase.random(FEATURES["longer cache than queries"]())
    case, cut = problem.case, 280
    parts = [(x, case.k_pos[x]) for x in (slice(0, cut), slice(cut, len(case.k_pos)))]

    def function(q, k, v):
        options = {"mask": "causal", "return_lse": True, "backend": backend}
        return ra.merge(
            *(ra.attention(q, k[:, :, x], v[:, :, x], positions=(case.q_pos, at), **options) for x, at in parts)
        )

    _, found = mx.vjp(function, [case.q, case.k, case.v], [problem.dout, problem.dlse])
    ratios = problem.ratios(dict(zip("qkv", found)))
    assert all(ratio <= 1 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_same_bits_whatever_the_threads(monkeypatch, threads):
    problem = GradientCase.random(FEATURES["longer cache than queries"]())
    monkeypatch.setattr(work_units, "ROWS", 16)
    monkeypatch.setenv("RINGATTN_THREADS", "3")
    want = gradients(problem, "host")
    monkeypatch.setenv("RINGATTN_THREADS", threads)
    for _ in range(3):
        for name, x in gradients(problem, "host").items():
            assert mx.array_equal(x, want[name]), name


@every_backend
def test_works_under_checkpoint(backend):
    x = mx.array(np.random.default_rng(0).standard_normal((1, 2, 33, 16)), mx.float32)

    def loss(x):
        return (ra.attention(x, x * 2, x + 1, mask="causal", backend=backend) ** 2).sum()

    assert mx.allclose(mx.grad(mx.checkpoint(loss))(x), mx.grad(loss)(x), rtol=1e-6)


@pytest.mark.parametrize("backend", ["host", "metal"], indirect=True)
def test_second_derivatives_are_refused(backend):
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 9, 16)), mx.float32)

    def slope(x):
        return mx.grad(lambda y: (ra.attention(y, y, y, backend=backend) ** 2).sum())(x).sum()

    with pytest.raises(ra.TransformError, match="second derivative"):
        mx.eval(mx.grad(slope)(x))


def long_case(tokens: int, **options) -> Case:
    r = np.random.default_rng(5)
    q, k, v = (mx.array(r.standard_normal((1, 2, tokens, 16)).astype(np.float32)) for _ in range(3))
    return Case(q, k, v, np.arange(tokens), np.arange(tokens), options)


@pytest.mark.parametrize("backend", ["blocked"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"window": 60}, {"window": (10, 90)}], ids=str)
def test_blocks_are_those_that_the_mask_leaves(monkeypatch, backend, options):
    """The gradient computes exactly the blocks that are not empty."""
    made, block = [], blockwise_backward._Blocks.block
    monkeypatch.setattr(
        blockwise_backward._Blocks, "block", lambda self, a, b, part: made.append((a, b)) or block(self, a, b, part)
    )
    problem = GradientCase.random(long_case(400, **options))
    check(problem, backend)
    seen, rows = problem.case.visible[0, 0], range(0, 400, 42)
    expected = {
        ((a, min(a + 42, 400)), (b, min(b + 48, 400)))
        for a in rows
        for b in range(0, 400, 48)
        if seen[a : a + 42, b : b + 48].any()
    }
    assert set(made) == expected and len(made) == len(expected)


def test_blocks_bound_the_memory(monkeypatch):
    """The gradient stays far below 4096 x 4096 scores of two heads (134 MB), though mx.grad keeps inputs of arrays."""
    monkeypatch.setattr(blockwise_backward, "SCORES", 1 << 18)
    monkeypatch.setattr(blockwise_backward, "KEYS", 512)
    case = long_case(4096)
    results = ra.attention(case.q, case.k, case.v, backend="host", return_lse=True)
    rules = ScoreRules(0.25, Band())

    def gradient(q, k, v, dout, dlse, out, lse):
        rows = ReferenceKernel().rows(out, lse, dout, dlse)
        inputs = KernelInputs(q, k, v, case.q_pos, case.k_pos, rules)
        return ReferenceKernel().backward(inputs, rows, Gradients.zeros(q, k, v, rules))[:3]

    def loss(*x):
        return custom_op("test", lambda *x: results, x, gradient)[0].sum()

    arrays = [case.q, case.k, case.v]
    mx.eval(arrays, results)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = mx.grad(loss, argnums=(0, 1, 2))(*arrays)
    mx.eval(found)
    assert mx.get_peak_memory() - before < 20e6
    expected = mx.grad(lambda *x: ra.attention(*x, backend="host").sum(), argnums=(0, 1, 2))(*arrays)
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))


def test_gradient_of_an_operation_with_one_input():
    """MLX passes a single input as itself, and not as a list."""

    def gradient(x, dresult, result):
        return [dresult * 2 * x]

    found = mx.grad(lambda x: custom_op("test", lambda x: [x * x], (x,), gradient)[0].sum())(mx.array([[1.0], [3.0]]))
    assert found.tolist() == [[2.0], [6.0]]


def test_host_gradient_never_holds_a_score_matrix(monkeypatch):
    monkeypatch.setenv("RINGATTN_THREADS", "1")
    case = long_case(4096, mask="causal")
    arrays = [case.q, case.k, case.v]
    mx.eval(arrays)
    tracemalloc.start()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(lambda *x: ra.attention(*x, mask="causal", backend="host").sum(), argnums=(0, 1, 2))(*arrays))
    peak = tracemalloc.get_traced_memory()[1], mx.get_peak_memory() - before
    tracemalloc.stop()
    assert peak[0] < 12e6 and peak[1] < 12e6, peak
