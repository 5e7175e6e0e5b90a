"""Tests of `ringattn.attention`: reproducible bits, NaN and infinity, extreme numbers, and memory."""

from __future__ import annotations

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from attention_cases import every_backend, ids_of, make, normal, run, same_bits

import ringattn as ra
from ringattn.cpu import work_units
from ringattn.verify.oracle import FLOATS, Case, check, to64

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
    """Scratch memory is reused from call to call. Its contents must not change results."""
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


# NaN and infinity


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
    """NaN and infinity reach the rows that attend to them, and change no bit of other rows, for any tile size."""
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
    """NaN or infinity in one column of v does not change the other columns."""
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
    """The kernel's accumulators do not overflow where the plain sum of values does not."""
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
    """A row of very low finite logits is still a softmax, as with the lowest float32 for a mask."""
    case = make(20, 30, mask=mx.full((20, 30), -1e30))
    case.options["mask"][:, 10:] = -mx.inf
    out, lse = run(case, backend)
    check(case, out, lse)
    assert mx.all(lse > -mx.inf)


# Memory


def test_host_never_holds_a_score_matrix(monkeypatch):
    """The kernel stays below 4096 x 4096 float32 scores (64 MiB) and their boolean mask (16 MiB)."""
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
