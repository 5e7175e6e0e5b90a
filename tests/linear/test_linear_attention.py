"""Linear attention on one device, against the recurrence token by token in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.core.affine import apply
from ringattn.linear import engine
from ringattn.linear.recurrence import Recurrence
from ringattn.linear.triangular import unit_inverse
from ringattn.verify.linear_features import LINEAR_FEATURES, linear_case
from ringattn.verify.linear_oracle import LinearCase
from ringattn.verify.oracle import to64

TOKENS = ("q", "k", "v", "log_decay", "beta")
LENGTHS = (0, 1, 2, 3, 31, 63, 64, 65, 130, 200)


def run(case: LinearCase, **more) -> tuple[mx.array, mx.array]:
    return ra.linear_attention(case.q, case.k, case.v, return_state=True, **{**case.options, **more})


def check(case: LinearCase, found: tuple[mx.array, mx.array]) -> None:
    ratios = case.ratios(*found)
    assert max(ratios) <= 1, ratios


def recurrence(case: LinearCase) -> Recurrence:
    scale = case.q.shape[3] ** -0.5 if case.scale is None else case.scale
    return Recurrence(case.q, case.k, case.v, case.log_decay, case.beta, scale)


def from_unknown_state(case: LinearCase) -> tuple[mx.array, mx.array]:
    """The results by way of the map of the whole sequence, as on a rank of a ring."""
    span = engine.run(recurrence(case), None)
    state = mx.zeros(recurrence(case).state_shape) if case.state is None else case.state
    out = span.out + span.reads @ state.swapaxes(-1, -2)
    return out.astype(case.q.dtype), apply(span.step, state, case.beta is not None)


cases = st.builds(
    linear_case,
    st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.sampled_from(LENGTHS),
    dim=st.sampled_from([1, 5, 16, 40]),
    v_dim=st.sampled_from([1, 7, 32]),
    decay=st.sampled_from([None, "head", "channel"]),
    strength=st.sampled_from([1e-6, 0.01, 0.3, 3.0, 100.0]),
    forget=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    beta=st.sampled_from([None, 1.0, 2.0]),
    state=st.booleans(),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
)


@settings(max_examples=80, deadline=None)
@given(cases)
def test_random_problems(case: LinearCase) -> None:
    if case.beta is not None and case.k.shape[3] < 16:  # nearly equal keys: see `test_reflections_of_one_key`
        case.beta = mx.minimum(case.beta, 1.0)
    found = run(case)
    assert found[0].dtype == case.q.dtype and found[1].dtype == mx.float32
    check(case, found)
    check(case, from_unknown_state(case))


@pytest.mark.parametrize("seed", range(340, 400, 4))
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_keys_with_few_dims(dim: int, seed: int) -> None:
    """Keys of one dim are equal but for their signs, so each token undoes the write before it."""
    case = linear_case(seed, heads=1, group=1, length=64, dim=dim, v_dim=7, strength=1e-6, forget=0.0, beta=1.0)
    check(case, run(case))
    check(case, from_unknown_state(case))


@pytest.mark.parametrize("feature", LINEAR_FEATURES)
def test_every_feature(feature: str) -> None:
    case = LINEAR_FEATURES[feature]()
    check(case, run(case))
    check(case, from_unknown_state(case))


@pytest.mark.parametrize("length", [64, 1000])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_groups_of_chunks(monkeypatch: pytest.MonkeyPatch, decay: str | None, length: int) -> None:
    monkeypatch.setattr(engine, "GROUP", 1)
    case = linear_case(0, length=length, decay=decay, strength=0.01, beta=1.0)
    check(case, run(case))
    check(case, from_unknown_state(case))


def test_reflections_of_one_key() -> None:
    """With beta 2 and equal keys the powers of the triangular matrix are huge, and its inverse is not.

    The writes of a chunk have alternating signs and cancel. Their sums, and so the errors, are up to a chunk's length
    times those of the recurrence token by token, whose writes are undone one after the other.
    """
    case = linear_case(0, length=256, decay=None, beta=2.0)
    case.k = mx.broadcast_to(case.k[:, :, :1], case.k.shape)
    case.beta = mx.full(case.beta.shape, 2.0)
    assert max(case.ratios(*run(case))) <= engine.CHUNK
    case = replace_all(case, beta=mx.full(case.beta.shape, 1.0))
    check(case, run(case))


def test_inverse_of_a_triangular_matrix() -> None:
    r = np.random.default_rng(0)
    for size in (1, 2, 8, 64):
        lower = np.tril(r.standard_normal((3, size, size)), -1).astype(np.float32) / 4
        exact = np.linalg.inv(np.eye(size) + lower.astype(np.float64))
        found = unit_inverse(mx.array(lower))
        assert np.abs(np.array(found) - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_strong_decay_does_not_spoil_its_neighbours(decay: str) -> None:
    """Decays after it are products of their own tokens, with all digits, though the sum from the start is -1e6."""
    case = linear_case(1, length=60, decay=decay, strength=0.01, forget=0.0)
    case.log_decay = case.log_decay + mx.where(mx.arange(60) == 20, -1e6, 0.0).reshape(
        1, 1, 60, *[1] * (decay == "channel")
    )
    out, state = run(case)
    assert max(case.ratios(out, state)) <= 1
    forgotten = replace_all(case, log_decay=mx.where(case.log_decay < -1e5, -mx.inf, case.log_decay))
    for x, y in zip((out, state), run(forgotten)):
        assert mx.array_equal(x, y).item()


def replace_all(case: LinearCase, **changed) -> LinearCase:
    return LinearCase(**{name: changed.get(name, getattr(case, name)) for name in (*TOKENS, "state", "scale")})


@pytest.mark.parametrize("beta", [None, 1.0])
def test_forgetting_all_is_a_new_start(beta: float | None) -> None:
    case = linear_case(2, length=100, beta=beta, forget=0.0)
    case.log_decay = mx.where(mx.arange(100) == 70, -mx.inf, case.log_decay)
    out, state = run(case)
    tail = LinearCase(*(None if (x := getattr(case, name)) is None else x[:, :, 70:] for name in TOKENS))
    alone = run(tail)
    assert mx.allclose(out[:, :, 70:], alone[0], atol=1e-6).item() and mx.allclose(state, alone[1], atol=1e-6).item()


@pytest.mark.parametrize("beta", [None, 1.0])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("name", [*TOKENS, "state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number_stays_in_its_head_and_after_its_token(
    name: str, decay: str, beta: float | None, value: float
) -> None:
    case = linear_case(3, batch=2, length=80, decay=decay, beta=beta)
    clean = run(case)
    x = getattr(case, name)
    if x is None:
        return
    whole = np.array(x)
    whole[(1, 1) if name == "state" else (1, 1, 70)] = value
    out, state = run(replace_all(case, **{name: mx.array(whole)}))
    wrong = np.zeros(out.shape[:3], bool)
    heads = [2, 3] if name in "qk" else [1]
    wrong[1, heads, 0 if name == "state" else 70 : 71 if name == "q" else 80] = True
    found = ~np.isfinite(np.array(out)).all(-1)
    if name == "state":  # it may be forgotten, but only in this head
        assert found[1, 1, 0] and not (found & ~wrong).any()
    else:
        assert np.array_equal(found, wrong)
        assert np.array_equal(np.array(out)[~wrong], np.array(clean[0])[~wrong])
        spoilt = ~np.isfinite(np.array(state)).all((2, 3))
        assert np.array_equal(spoilt, np.zeros_like(spoilt) if name == "q" else wrong[:, :, -1])


def test_one_token_at_a_time() -> None:
    case = linear_case(4, length=40, beta=1.0, decay="channel")
    state = case.state
    outs = []
    for t in range(40):
        q, k, v, log_decay, beta = (getattr(case, name)[:, :, t : t + 1] for name in TOKENS)
        out, state = ra.linear_attention(q, k, v, log_decay=log_decay, beta=beta, state=state, return_state=True)
        outs.append(out)
    check(case, (mx.concatenate(outs, 2), state))


def test_the_same_bits_on_every_run_and_out_dtype() -> None:
    case = linear_case(5, length=150, beta=1.0, dtype=mx.bfloat16)
    out, state = run(case)
    again = run(case)
    assert mx.array_equal(out, again[0]).item() and mx.array_equal(state, again[1]).item()
    wide, _ = run(case, out_dtype=mx.float32)
    assert wide.dtype == mx.float32 and mx.array_equal(wide.astype(mx.bfloat16), out).item()
    assert mx.array_equal(ra.linear_attention(case.q, case.k, case.v, **case.options), out).item()


def test_memory_grows_linearly() -> None:
    """The peak beyond the inputs is a few times the output, at any length: never tokens x tokens."""

    def peak(length: int) -> int:
        case = linear_case(6, heads=1, group=2, length=length, dim=32, v_dim=32, beta=1.0)
        mx.eval([getattr(case, name) for name in TOKENS])
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(run(case))
        return mx.get_peak_memory() - before

    peaks = [peak(1 << n) for n in (14, 15, 16)]
    out = 2 * 32 * 4 << 14  # bytes
    assert peaks[1] - peaks[0] < 4 * out and peaks[2] - peaks[1] < 8 * out, peaks


# Gradients


def loss_in_float64(
    case: LinearCase, weights: np.ndarray, of_state: np.ndarray, changed: dict[str, np.ndarray]
) -> float:
    out, state, _ = case.recur(values=changed)
    return float((out * weights).sum() + (state * of_state).sum())


@pytest.mark.parametrize("length", [1, 7, 80])
@pytest.mark.parametrize("beta", [None, 1.0])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_gradient(decay: str | None, beta: float | None, length: int) -> None:
    """Against differences of the float64 recurrence, in random directions; finite also where a token forgets all."""
    case = linear_case(7, length=length, dim=8, v_dim=6, decay=decay, beta=beta, forget=0.1)
    r = np.random.default_rng(0)
    weights, of_state = (r.standard_normal(x.shape) for x in (case.v, case.state))
    named = {**case.tokens, "state": case.state}

    def loss(arrays: dict[str, mx.array]) -> mx.array:
        out, state = run(replace_all(case, **arrays))
        return (out * mx.array(weights, mx.float32)).sum() + (state * mx.array(of_state, mx.float32)).sum()

    found = mx.grad(loss)(named)
    for name, x in named.items():
        exact = to64(x)
        gradient = to64(found[name])
        assert np.isfinite(gradient).all(), name
        fixed = np.isneginf(exact)
        assert not gradient[fixed].any(), name
        for _ in range(3):
            step = np.where(fixed, 0.0, r.standard_normal(exact.shape))
            high, low = (loss_in_float64(case, weights, of_state, {name: exact + s * 1e-5 * step}) for s in (1, -1))
            size = np.sqrt((gradient**2).sum()) + 1e-3
            assert abs((high - low) / 2e-5 - (gradient * step).sum()) < 1e-4 * size * np.sqrt(step.size), name


def test_transformations() -> None:
    case = linear_case(8, batch=2, length=70, beta=1.0)
    expected = run(case)

    def function(*arrays: mx.array) -> list[mx.array]:
        return list(run(replace_all(case, **dict(zip((*TOKENS, "state"), arrays)))))

    arrays = [getattr(case, name) for name in (*TOKENS, "state")]
    for x, y in zip(mx.compile(function)(*arrays), expected):
        assert mx.allclose(x, y, atol=1e-6).item()
    mapped = mx.vmap(lambda *x: function(*(y[None] for y in x)))(*arrays)
    for x, y in zip(mapped, expected):
        assert mx.allclose(x[:, 0], y, atol=1e-6).item()
    tangents = [mx.zeros_like(x) for x in arrays]
    tangents[2] = arrays[2]  # the outputs are linear in v and the state together
    tangents[5] = arrays[5]
    _, moved = mx.jvp(function, arrays, tangents)
    for x, y in zip(moved, expected):
        assert mx.allclose(x, y, atol=1e-5).item()
