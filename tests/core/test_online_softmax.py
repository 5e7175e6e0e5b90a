"""Tests of states and partials against one softmax over all keys in float64. Their errors are in test_validation."""

from __future__ import annotations

import doctest

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.core.online_softmax import State, finish, merge_states, normalise

steady = settings(deadline=None, derandomize=True, max_examples=100)

ROWS, DIM = (2, 3, 4), 5
ULP = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
DTYPES = list(ULP)


def softmax64(s: np.ndarray, v: np.ndarray, sinks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Compute `out` and `lse` of scores ``[*ROWS, keys]`` and values ``[keys, DIM]`` in float64."""
    sink = np.full(s.shape[:-1], -np.inf) if sinks is None else np.broadcast_to(sinks[:, None], s.shape[:-1])
    m = np.maximum(s.max(-1, initial=-np.inf), sink)
    base = np.where(m == -np.inf, 0, m)
    p = np.exp(s - base[..., None])
    total = p.sum(-1) + np.exp(sink - base)
    with np.errstate(divide="ignore"):
        return p @ v / np.where(total == 0, 1, total)[..., None], np.log(total) + base


def partial_of(s: np.ndarray, v: np.ndarray, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    out, lse = softmax64(s, v)
    return mx.array(out.astype(np.float32)).astype(dtype), mx.array(lse.astype(np.float32))


def state_of(s: np.ndarray, v: np.ndarray, library: str = "mx") -> State:
    m = s.max(-1, initial=-np.inf)
    p = np.exp(s - np.where(m == -np.inf, 0, m)[..., None])
    arrays = [x.astype(np.float32) for x in (p @ v, m, p.sum(-1))]
    return State(*(map(mx.array, arrays) if library == "mx" else arrays))


def numbers(x: mx.array | np.ndarray) -> np.ndarray:
    return np.array(x.astype(mx.float32) if isinstance(x, mx.array) else x).astype(np.float64)


def assert_close(partial, exact, *, out_error: float, lse_error: float) -> None:
    out, lse = map(numbers, partial)
    assert not np.isnan(out).any() and not np.isnan(lse).any()
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact[1]))
    np.testing.assert_allclose(out, exact[0], rtol=0, atol=out_error)
    seen = np.isfinite(exact[1])
    np.testing.assert_allclose(lse[seen], exact[1][seen], rtol=0, atol=lse_error)
    assert not out[~seen].any(), "a row that has seen nothing is 0"


def tolerance(s: np.ndarray, v: np.ndarray, dtype: mx.Dtype = mx.float32) -> dict[str, float]:
    """Tolerance for partials: a float32 lse near x has an error of x ulps, as have the weights computed from it."""
    size = max(1.0, float(np.abs(s[np.isfinite(s)]).max(initial=0)))
    largest = float(np.abs(v).max(initial=1))
    return {"out_error": (4 * size * 2.0**-23 + 2 * ULP[dtype]) * largest, "lse_error": 4 * (size + 8) * 2.0**-23}


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Draw scores (some -inf, sometimes up to +-300), values, and the keys of 1 to 8 parts, some of them empty."""
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keys, count = draw(st.integers(0, 40)), draw(st.integers(1, 8))
    s = r.standard_normal((*ROWS, keys)) * draw(st.sampled_from([1, 10, 100]))
    s = np.clip(s, -300, 300).astype(np.float32).astype(np.float64)
    s[r.random(s.shape) < draw(st.sampled_from([0, 0.5, 0.95]))] = -np.inf
    v = r.standard_normal((keys, DIM)).astype(np.float32).astype(np.float64)
    owner = r.integers(0, count, keys)
    return s, v, [np.flatnonzero(owner == part) for part in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@steady
@given(splits())
def test_partials_of_any_split_merge_to_the_whole(dtype, split):
    s, v, parts = split
    out, lse = ra.merge(*(partial_of(s[..., part], v[part], dtype) for part in parts))
    assert out.dtype == dtype and lse.dtype == mx.float32
    assert out.shape == (*ROWS, DIM) and lse.shape == ROWS
    assert_close((out, lse), softmax64(s, v), **tolerance(s, v, dtype))


@pytest.mark.parametrize("library", ["mx", "numpy"])
@steady
@given(split=splits(), with_sinks=st.booleans())
def test_states_of_any_split_merge_to_the_whole(library, split, with_sinks):
    """The error of `out` does not grow with the scores, because states keep the maximum separate from the sum."""
    s, v, parts = split
    kind = mx.array if library == "mx" else np.ndarray
    sinks = np.array([-2.0, 0.5, 3.0], np.float32) if with_sinks else None
    with np.errstate(all="ignore"):
        state = merge_states(*(state_of(s[..., part], v[part], library) for part in parts))
        given_ = mx.array(sinks) if with_sinks and library == "mx" else sinks
        partial = normalise(state, given_)
    assert all(isinstance(x, kind) and x.dtype in (mx.float32, np.float32) for x in (*state, *partial))
    largest = max(1.0, float(np.abs(v).max(initial=0)))
    lse_error = tolerance(s, v)["lse_error"]
    assert_close(partial, softmax64(s, v, sinks), out_error=32 * 2.0**-23 * largest, lse_error=lse_error)


@steady
@given(splits(), st.randoms(use_true_random=False))
def test_order_and_grouping_do_not_matter_but_for_rounding(split, random):
    s, v, parts = split
    partials = [partial_of(s[..., part], v[part]) for part in parts]
    exact, allowed = softmax64(s, v), tolerance(s, v)
    while len(partials) > 1:  # merge any few of them, put the result back
        random.shuffle(partials)
        few = random.randint(2, len(partials))
        partials = [ra.merge(*partials[:few]), *partials[few:]]
    assert_close(partials[0], exact, **{name: 4 * x for name, x in allowed.items()})


def test_many_partials():
    """Errors do not accumulate over hundreds of partials of one key each."""
    r = np.random.default_rng(0)
    s, v = r.standard_normal((*ROWS, 300)) * 3, r.standard_normal((300, DIM))
    merged = ra.merge(*(partial_of(s[..., j : j + 1], v[j : j + 1]) for j in range(300)))
    assert_close(merged, softmax64(s, v), out_error=1e-5, lse_error=1e-5)


def nothing(dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    return mx.zeros((*ROWS, DIM), dtype), mx.full(ROWS, -mx.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [(0, 0), (0, 2), (1, 0), (1, 2)])
def test_nothing_changes_no_bit(dtype, at):
    """Merging (0, -inf) before and after changes no bit, any number of times."""
    r = np.random.default_rng(1)
    partial = partial_of(r.standard_normal((*ROWS, 9)) * 50, r.standard_normal((9, DIM)), dtype)
    merged = ra.merge(*[nothing(dtype)] * at[0], partial, *[nothing(dtype)] * at[1])
    for x, y in zip(merged, partial):
        assert mx.array_equal(x, y)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_nothing_is_nothing(count, dtype):
    out, lse = ra.merge(*[nothing(dtype)] * count)
    assert out.dtype == dtype and lse.dtype == mx.float32
    assert mx.all(out == 0) and mx.all(lse == -mx.inf)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (1, 1, 1), ()])
def test_any_number_of_rows(rows):
    partial = mx.ones((*rows, 4)), mx.zeros(rows)
    out, lse = ra.merge(partial, partial)
    assert out.shape == (*rows, 4) and mx.all(out == 1) and mx.allclose(lse, mx.log(mx.full(rows, 2.0)))


@pytest.mark.parametrize("distance", [89, 300, 3e38])
def test_far_apart(distance):
    """A part with far lower scores changes nothing, and nothing overflows, in either order."""
    high = mx.ones((*ROWS, DIM)), mx.full(ROWS, 0.75 * distance if distance < 1e38 else distance)
    low = mx.full((*ROWS, DIM), 7.0), mx.full(ROWS, -0.25 * distance if distance < 1e38 else -distance)
    for pair in ((high, low), (low, high)):
        out, lse = ra.merge(*pair)
        assert mx.array_equal(out, high[0]) and mx.array_equal(lse, high[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finish_applies_a_sink_once(dtype):
    r = np.random.default_rng(2)
    s, v, sinks = r.standard_normal((*ROWS, 9)) * 30, r.standard_normal((9, DIM)), np.array([-40.0, 0.0, 100.0])
    s[:, :, 0] = -np.inf  # a row without a visible key has its sink
    out, lse = finish(state_of(s, v), mx.array(sinks.astype(np.float32)), dtype)
    assert out.dtype == dtype and lse.dtype == mx.float32
    exact = softmax64(s, v, sinks)
    np.testing.assert_allclose(numbers(out), exact[0], rtol=0, atol=4 * ULP[dtype])
    np.testing.assert_allclose(numbers(lse), exact[1], rtol=0, atol=4e-5)
    np.testing.assert_array_equal(numbers(lse)[:, :, 0], np.broadcast_to(sinks, (2, 3)))
    assert not numbers(out)[:, :, 0].any()


def test_finish_with_a_sink_of_minus_infinity_is_as_without():
    empty = State.empty(*ROWS, DIM)
    out, lse = finish(empty, mx.full((ROWS[1],), -mx.inf), mx.float32)
    assert mx.all(out == 0) and mx.all(lse == -mx.inf)


# Gradients


def loss(merged, dout: mx.array, dlse: mx.array) -> mx.array:
    """Compute a scalar that depends on every row with a visible key."""
    out, lse = merged
    return (out * dout).sum() + mx.where(lse == -mx.inf, 0.0, lse * dlse).sum()


@pytest.mark.parametrize("hide", ["none", "some", "all of one", "all"])
def test_gradient(hide):
    """Gradients equal central differences of the float64 formula. Partials over no key have gradient 0. None is NaN."""
    r = np.random.default_rng(3)
    outs, lses = r.standard_normal((3, *ROWS, DIM)), r.standard_normal((3, *ROWS))
    empty = {"none": np.zeros(lses.shape, bool), "some": r.random(lses.shape) < 0.5}.get(
        hide, np.ones(lses.shape, bool)
    )
    if hide == "all of one":
        empty[1:] = False
    outs[empty], lses[empty] = 0, -np.inf
    dout, dlse = r.standard_normal((*ROWS, DIM)), r.standard_normal(ROWS)

    def exact(outs, lses):
        m = np.where(np.isneginf(lses.max(0)), 0, lses.max(0))
        p = np.exp(lses - m)
        total = p.sum(0)
        out = (p[..., None] * outs).sum(0) / np.where(total == 0, 1, total)[..., None]
        return (out * dout).sum() + (np.where(total == 0, 0, np.log(np.where(total == 0, 1, total)) + m) * dlse).sum()

    given_ = [mx.array(x.astype(np.float32)) for x in (outs, lses, dout, dlse)]
    function = lambda outs, lses: loss(ra.merge(*zip(outs, lses)), *given_[2:])  # noqa: E731
    grads = [numbers(x) for x in mx.grad(function, argnums=(0, 1))(*given_[:2])]
    for grad in grads:
        assert np.isfinite(grad).all()
        assert not grad[empty].any()
    for _ in range(5):
        steps = [r.standard_normal(x.shape) for x in (outs, lses)]
        up, down = (exact(outs + e * steps[0], lses + e * steps[1]) for e in (1e-5, -1e-5))
        slope = sum((grad * step).sum() for grad, step in zip(grads, steps))
        assert abs((up - down) / 2e-5 - slope) < 1e-4 * (1 + abs(slope))


def test_gradient_of_finish_with_empty_rows_and_sinks():
    """Rows without a key give no NaN, with and without sinks. The gradient of a sink is that of the formula."""
    sinks = mx.array([0.0, 1.0, 2.0])

    def function(sinks, acc, m, l):
        out, lse = finish(State(acc, m, l), sinks, mx.float32)
        return out.sum() + lse.sum()

    grads = mx.grad(function, argnums=(0, 1, 2, 3))(sinks, *State.empty(*ROWS, DIM))
    assert all(mx.all(mx.isfinite(grad)) for grad in grads)
    assert mx.allclose(grads[0], mx.full((3,), float(ROWS[0] * ROWS[2]))), "lse is the sink itself"


def test_the_example_of_merge_runs():
    (test,) = doctest.DocTestFinder(recurse=False).find(ra.merge, "merge", globs={})
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("options", [{"mask": "causal"}, {"window": 3}])
def test_chunks_of_keys_have_to_say_where_they_stand(options):
    """Without `offset` the calls in the documentation of `merge` give another result."""
    r = np.random.default_rng(0)
    q, k, v = (mx.array(r.standard_normal((1, 2, n, 8)), mx.float32) for n in (4, 10, 10))
    chunks = [(0, 3), (3, 8), (8, 10)]

    def merged(offsets):
        parts = [
            ra.attention(q, k[:, :, a:b], v[:, :, a:b], offset=offset, return_lse=True, **options)
            for (a, b), offset in zip(chunks, offsets)
        ]
        return ra.merge(*parts)[0]

    expected = ra.attention(q, k, v, **options)
    assert mx.allclose(merged([6 - a for a, _ in chunks]), expected, atol=1e-6)
    assert not mx.allclose(merged([None] * 3), expected, atol=1e-1)
