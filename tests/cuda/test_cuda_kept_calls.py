"""Tests of the calls that are kept for others of the same shapes, rules and positions."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_model
import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn.core.intervals import kept_positions
from ringattn.core.masks import Band
from ringattn.core.online_softmax import State
from ringattn.core.rules import ScoreRules
from ringattn.cuda import backward, backward_hopper, calls, dispatch, gradient_call, gradient_plans, launch
from ringattn.cuda.device import HOPPER
from ringattn.kernels.interface import KernelInputs, OutputSpec

TOKENS = 70


@pytest.fixture(autouse=True)
def prepared(monkeypatch) -> Iterator[list]:
    """The kernel calls that were prepared in a test, on a model of the GPU."""
    made = []

    def forward_call(*arguments):
        made.append(arguments)
        return original(*arguments)

    original = dispatch.forward_call
    monkeypatch.setattr(dispatch, "forward_call", forward_call)
    monkeypatch.setattr(launch.launcher, "executor", cuda_model.run)
    yield made


def normal(seed: int, heads: int, tokens: int = TOKENS, dim: int = 32, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((2, heads, tokens, dim), key=mx.random.key(seed)).astype(dtype)


def problem(heads: int = 2, kv_heads: int = 2, q_len: int = TOKENS, k_len: int = TOKENS, dim: int = 32, **options):
    """Arguments of `attention`."""
    dtype = options.pop("dtype", mx.float32)
    q = normal(options.pop("seed", 0), heads, q_len, dim, dtype)
    k, v = (normal(seed, kv_heads, k_len, d, dtype) for seed, d in ((1, dim), (2, options.pop("v_dim", dim))))
    return (q, k, v), {"mask": "causal", **options}


def padded(tokens: int) -> tuple[mx.array, mx.array]:
    ids = mx.broadcast_to(mx.where(mx.arange(TOKENS) < tokens, 0, -1), (2, TOKENS))
    return ids, ids


OTHERS = {
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "softcap": {"softcap": 2.0},
    "another softcap": {"softcap": 1.0},
    "no mask": {"mask": None},
    "window": {"window": 9},
    "offset": {"offset": 7},
    "positions": {"positions": (np.arange(0, 140, 2), np.arange(TOKENS))},
    "other positions": {"positions": (np.arange(0, 140, 2), np.arange(40, 40 + TOKENS))},
    "queries": {"q_len": 66},
    "keys": {"k_len": 90},
    "heads": {"heads": 4},
    "kv heads": {"kv_heads": 1},
    "head_dim": {"dim": 48, "v_dim": 32},
    "value dim": {"v_dim": 48},
    "dtype": {"dtype": mx.bfloat16},
    "out_dtype": {"out_dtype": mx.bfloat16},
    "dtype of the inputs alone": {"dtype": mx.bfloat16, "out_dtype": mx.float32},
    "numbers": {"seed": 5},
    "sinks": {"sinks": mx.array([0.5, 2.0])},
    "other sinks": {"sinks": mx.array([2.0, -1.0])},
    "boolean mask": {"mask": mx.arange(TOKENS) % 3 > 0},
    "another boolean mask": {"mask": mx.arange(TOKENS) % 4 > 0},
    "additive mask": {"mask": mx.sin(mx.arange(TOKENS))},
    "additive mask of another dtype": {"mask": mx.sin(mx.arange(TOKENS)).astype(mx.float16)},
    "segments": {"segments": padded(50)},
    "other segments": {"segments": padded(30)},
    "few queries": {"q_len": 3, "k_len": 1200},
    "few queries, more keys": {"q_len": 3, "k_len": 2000},
}


def test_other_calls_are_not_answered_by_a_kept_one(monkeypatch, forget) -> None:
    """The same kernels and bits as without kept calls, for calls that differ in one thing from an earlier one."""
    names = []
    monkeypatch.setattr(launch.launcher, "executor", lambda call: names.append(call.name) or cuda_model.run(call))
    calls_in_order = [problem(**OTHERS[name]) for name in (*OTHERS, *reversed(OTHERS)) for _ in range(2)]
    results = [ra.attention(*x, **options, return_lse=True, backend="cuda") for x, options in calls_in_order]
    kept_names, names[:] = list(names), []
    for (arrays, options), found in zip(calls_in_order, results):
        forget()
        expected = ra.attention(*arrays, **options, return_lse=True, backend="cuda")
        assert all(map(mx.array_equal, found, expected)), options
        assert found[0].dtype == expected[0].dtype
    assert names == kept_names


def gradients(x: tuple[mx.array, ...], options: dict) -> list[mx.array]:
    """The results of `attention` and its gradients."""

    def loss(*arrays: mx.array) -> mx.array:
        out, lse = ra.attention(*arrays, **options, return_lse=True, backend="cuda")
        return (out * mx.cos(mx.arange(out.size)).reshape(out.shape)).sum() + mx.where(mx.isinf(lse), 0, lse).sum()

    return list(mx.grad(loss, argnums=[0, 1, 2])(*x))


@pytest.mark.parametrize("hopper", [False, True])
def test_other_gradients_are_not_answered_by_a_kept_one(monkeypatch, forget, hopper: bool) -> None:
    """The same kernels and bits as without kept calls, for gradients of calls that differ from an earlier one."""
    names = []
    monkeypatch.setattr(launch.launcher, "executor", lambda call: names.append(call.name) or cuda_model.run(call))
    monkeypatch.setattr(gradient_plans, "capability", lambda: HOPPER if hopper else (8, 0))
    cases = [problem(**{"dtype": mx.bfloat16, **OTHERS[name]}) for name in OTHERS if "few queries" not in name]
    calls_in_order = [case for case in (*cases, *reversed(cases)) for _ in range(2)]
    results = [gradients(x, options) for x, options in calls_in_order]
    kept_names, names[:] = list(names), []
    for (arrays, options), found in zip(calls_in_order, results):
        forget()
        assert all(map(mx.array_equal, found, gradients(arrays, options))), options
    assert names == kept_names


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_an_equal_gradient_is_prepared_once(monkeypatch, name: str, hopper: bool) -> None:
    made = []
    original = gradient_call.gradient_call
    for module in (backward, backward_hopper):
        monkeypatch.setattr(module, "gradient_call", lambda *x, **more: made.append(x[0]) or original(*x, **more))
    monkeypatch.setattr(gradient_plans, "capability", lambda: HOPPER if hopper else (8, 0))
    counts = []
    for seed in range(3):
        gradients(*problem(**{"dtype": mx.bfloat16, **OTHERS[name], "seed": seed}))
        counts.append(len(made))
    times = 3 if "positions" in name else 1  # positions that users can write to are not kept
    assert counts[0] > 0 and counts[-1] == times * counts[0]


@pytest.mark.parametrize("name", OTHERS)
def test_an_equal_call_is_prepared_once(name: str, prepared: list) -> None:
    for seed in range(3):
        arrays, options = problem(**{**OTHERS[name], "seed": seed})
        ra.attention(*arrays, **options, backend="cuda")
    assert len(prepared) == (3 if "positions" in name else 1), "positions that users can write to are not kept"


def test_a_state_and_an_output_are_part_of_the_call() -> None:
    x = normal(0, 2)
    positions = kept_positions(((0, TOKENS),))
    inputs = KernelInputs(x, x, x, positions, positions, ScoreRules(0.5, Band(None, 0)))
    for _ in range(2):
        first = State(*dispatch.attend(inputs, None, None))
        second = State(*dispatch.attend(inputs, first, None))
        assert mx.allclose(second.l, 2 * first.l) and mx.array_equal(first.m, second.m)
        (out,) = dispatch.attend(inputs, first, OutputSpec(mx.float32, False))
        same, lse = dispatch.attend(inputs, first, OutputSpec(mx.float32, True))
        assert mx.array_equal(out, same) and mx.allclose(lse, first.m + mx.log(2 * first.l), atol=1e-5)


def test_positions_are_part_of_the_call() -> None:
    x = normal(0, 2)
    early, late = (kept_positions(((start, start + TOKENS),)) for start in (0, 20))
    found = [
        dispatch.attend(KernelInputs(x, x, x, *positions, ScoreRules(0.5, Band(None, 0))), None, None)[2][0, 0]
        for positions in ((early, early), (late, early), (early, late))
    ]
    seen = [mx.isfinite(l) & (l > 0) for l in found]
    assert [int(rows.sum()) for rows in seen] == [TOKENS, TOKENS, TOKENS - 20]
    assert not mx.array_equal(found[0], found[1])


def test_arrays_of_a_call_are_not_kept() -> None:
    x = normal(0, 2)
    kept = ra.attention(x, x, x, segments=padded(50), mask=mx.ones((TOKENS, TOKENS)), backend="cuda")
    assert kept.shape == x.shape
    for launches in (x for _, choices in dispatch._kept._results.values() for x in choices):
        names = {name for name, y in zip(launches.forward.input_names, launches.forward.inputs) if y is not None}
        assert names == calls.SHARED & set(launches.forward.input_names)
