"""Tests of the CPU kernel: every instruction set of this processor, and NumPy alone, against float64."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from attention_cases import make, normal, run, same_bits

import ringattn as ra
from ringattn.core.masks import Band
from ringattn.core.online_softmax import finish
from ringattn.core.rules import ScoreRules
from ringattn.cpu import flash, work_units
from ringattn.cpu.backend import HostKernel
from ringattn.kernels.interface import KernelInputs
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import FLOATS, GradientCase, check, random_case
from ringattn.verify.variants import attention_gradients

WAYS = [*flash.instruction_sets(), "NumPy"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """Use one instruction set, or NumPy alone."""
    if request.param == "NumPy":
        monkeypatch.setattr(flash, "compiled", lambda: None)
    else:
        monkeypatch.setattr(flash, "instruction_set", lambda: WAYS.index(request.param))
    return request.param


def gradients(problem: GradientCase) -> dict[str, mx.array]:
    return attention_gradients(problem, "host", positions=(problem.case.q_pos, problem.case.k_pos))


def check_both(case, what: str = "") -> None:
    """Check the results, and the gradient of a loss through both of them."""
    check(case, *run(case, "host"), what=what)
    problem = GradientCase.random(case)
    ratios = problem.ratios(gradients(problem))
    assert all(ratio <= 1 for ratio in ratios.values()), (what, ratios)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(way, feature):
    check_both(FEATURES[feature](), feature)


@pytest.mark.parametrize("first", range(100, 140, 10))
def test_random_cases(way, first):
    for seed in range(first, first + 10):
        check_both(random_case(seed), f"{seed=}")


@pytest.mark.parametrize("seed", [322, 2202])
def test_one_score_that_decides_a_result(way, seed):
    """One key beside a sink: the error of its score is that of the result. Plain products have short chains there."""
    check_both(random_case(seed))


@pytest.mark.parametrize("dim,v_dim", [(1, 1), (3, 17), (16, 5), (40, 80), (100, 33), (256, 128), (64, 256)])
def test_sizes_that_no_block_divides(way, dim, v_dim):
    lengths = [(1, 1), (7, 5), (33, 50), (113, 203)]
    for (q_len, k_len), dtype in zip(lengths, itertools.cycle(FLOATS)):
        case = make(q_len, k_len, dim=dim, v_dim=v_dim, dtype=dtype, heads=6, mask="causal")
        check_both(case, f"{q_len=} {k_len=} {dtype=}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9])
def test_few_rows(way, rows, dtype):
    """A token or a few against a long cache, with any number of keys in the last step."""
    for k_len, options in itertools.product(
        (1, 130, 271),
        ({}, {"window": 100}, {"softcap": 2.0}, {"mask": normal(6, rows, 1, 271) > 0}, {"mask": normal(6, rows, 1, 1)}),
    ):
        options = {name: x[..., :k_len] if name == "mask" else x for name, x in options.items()}
        case = make(1, k_len, heads=rows, kv_heads=1, dim=64, v_dim=80, dtype=dtype, **options)
        check(case, *run(case, "host"), what=f"{k_len=} {options}")


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_state_carried_from_block_to_block(way, tokens):
    """Two blocks of keys give the result of all keys, whatever the strides of the state."""
    case = make(tokens, 90, dim=64, mask="causal")
    rules = ScoreRules(case.q.shape[-1] ** -0.5, Band.of(True, None))
    state = None
    for keys in (slice(0, 50), slice(50, 90)):
        k, v = case.k[:, :, keys], case.v[:, :, keys]
        inputs = KernelInputs(case.q, k, v, case.q_pos.astype(np.int32), case.k_pos[keys].astype(np.int32), rules)
        state = HostKernel().forward(inputs, state)
    assert state is not None
    check(case, *finish(state, None, mx.float32))


def test_numbers_that_are_far_apart_in_memory(way):
    """Any strides of the inputs are read, also along head_dim."""
    q, k, v = (normal(i, 2, n, 2, 16, 33) for i, n in enumerate((2, 1, 1)))
    strided = [x.reshape(2, -1, 16, 33).swapaxes(2, 3) for x in (q, k, v)]
    copies = [mx.array(np.ascontiguousarray(np.array(x))) for x in strided]
    for a, b in zip(*(ra.attention(*x, backend="host", return_lse=True) for x in (strided, copies))):
        assert mx.allclose(a, b, atol=1e-6)


def test_keys_that_are_read_in_place_and_keys_that_are_copied(way):
    """The compiled kernel copies keys that are too far apart in memory. The bits are the same."""
    q, k, v = normal(0, 1, 8, 300, 128), normal(1, 1, 400, 8, 128).swapaxes(1, 2), normal(2, 1, 8, 400, 128)
    near = mx.array(np.ascontiguousarray(np.array(k)))
    for a, b in zip(*(ra.attention(q, x, v, backend="host", return_lse=True) for x in (k, near))):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_results_are_rounded_as_by_mlx(way, dtype):
    """One key has the weight 1, so its value is the result, rounded to nearest even."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, (1, 1, 512, 80), np.uint32)
    edges = np.array([0, -0.0, 65504, 65519.9, 65520, -1e30, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 1e-8, 2.0**-14, 6.1e-5])
    v = bits.view(np.float32)
    v = np.where(np.isfinite(v), v, 1)
    v[..., 256:, :] = np.float32(2) ** (np.log2(np.abs(v[..., 256:, :]) + 1e-30) / 4)  # most within float16
    v[..., : len(edges)] = edges
    ids = mx.arange(512)[None]
    v = mx.array(v.astype(np.float32))
    out = ra.attention(v, mx.zeros(v.shape), v, scale=0, segments=(ids, ids), out_dtype=dtype, backend="host")
    expected = v.astype(dtype)
    tiny = mx.abs(v) < 1e-37  # subnormal floats may become 0
    assert mx.all((out == expected) | tiny)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_those_who_see_it(way, rows, value):
    v = np.array(normal(3, 1, 2, 70, 32))
    v[0, 0, 60, 3] = value
    q, k = normal(1, 1, 4, rows, 32), normal(2, 1, 2, 70, 32)
    mask = np.ones((4, rows, 70), bool)
    mask[0, :, 60] = False
    mask[1, rows // 2 :, 60] = False
    out = np.array(ra.attention(q, k, mx.array(v), mask=mx.array(mask), backend="host"))
    expected = np.zeros(out.shape, bool)
    expected[0, :2, :, 3] = mask[:2, :, 60]
    np.testing.assert_array_equal(~np.isfinite(out), expected)


def test_inputs_do_not_change(way):
    """One query of one head has results as large as its sinks: they must not share memory."""
    arrays = {"q": normal(1, 1, 1, 1, 16), "k": normal(2, 1, 1, 9, 16), "v": normal(3, 1, 1, 9, 16)}
    sinks = mx.array([0.5])
    before = {name: np.array(x) for name, x in {**arrays, "sinks": sinks}.items()}
    for _ in range(2):
        mx.eval(ra.attention(*arrays.values(), sinks=sinks, backend="host", return_lse=True))
    for name, x in {**arrays, "sinks": sinks}.items():
        np.testing.assert_array_equal(np.array(x), before[name], err_msg=name)


@pytest.mark.parametrize("options", [{}, {"mask": "causal"}], ids=str)
def test_bits_do_not_depend_on_threads(way, monkeypatch, options):
    """Of results and gradients, for many rows and for few."""
    for rows in (1, 300):
        problem = GradientCase.random(make(rows, 300, dim=64, **options))
        results = []
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("RINGATTN_THREADS", threads)
            work_units._pool.cache_clear()
            results.append([*run(problem.case, "host"), *gradients(problem).values()])
        assert all(all(map(same_bits, x, results[0])) for x in results)
    work_units._pool.cache_clear()


def test_the_compiled_kernel_is_used():
    """Where there is a compiler, NumPy is not a silent fallback."""
    if flash.compiled() is None:
        pytest.skip("there was no compiler")
    assert flash.instruction_sets()[flash.instruction_set()] == flash.instruction_sets()[-1]
