"""The text of the CUDA kernels, executed on the CPU by `tools.hostcuda`, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn import backends
from ringattn.core.gradients import Gradients
from ringattn.core.kept import Kept
from ringattn.core.masks import Band
from ringattn.core.online_softmax import finish
from ringattn.core.rules import ScoreRules
from ringattn.cuda import KernelCall, dispatch, gradient_plans, hopper_tiling, launch, set_executor, tail
from ringattn.cuda.backend import CudaKernel
from ringattn.cuda.device import HOPPER
from ringattn.kernels.gpu.key_tiles import key_tile_ranges
from ringattn.kernels.interface import KernelInputs, OutputSpec
from ringattn.kernels.reference import ReferenceKernel
from ringattn.verify.features import FEATURES, in_dtype
from ringattn.verify.oracle import Case, GradientCase, random_case, ratios
from ringattn.verify.variants import attention_gradients
from tools.hostcuda import Runtime, lacking

pytestmark = pytest.mark.skipif(lacking() is not None, reason=f"the host runtime for CUDA lacks {lacking()}")

IDS = mx.array([[0] * 90 + [1] * 60])
CAUSAL = ScoreRules(0.3, Band(None, 0))
EVERY_RULE = ScoreRules(0.3, Band(None, 0), 2.0, mx.sin(mx.arange(150 * 150)).reshape(1, 1, 150, 150), None, (IDS, IDS))
OPTIONS = ("boolean mask", "additive mask", "softcap", "window on both sides", "value head_dim", "peaked scores")


def capped(case: Case) -> Case:
    return replace(case, options=case.options | {"softcap": 20.0})


def rest(seeds: range) -> Iterator[tuple[str, Callable[[], Case]]]:
    yield from ((name, partial(in_dtype, FEATURES[name], dtype)) for name, dtype in zip(OPTIONS, cycle(HALVES)))
    yield from ((f"random {seed}", partial(random_case, seed, lengths=(7, 113, 150))) for seed in seeds)


HALVES = (mx.float16, mx.bfloat16)
EVERYTHING = {"everything, bfloat16": FEATURES["everything, bfloat16"], "causal, float16": FEATURES["causal, float16"]}
WIDE = {
    "head_dim 256, bfloat16": partial(in_dtype, FEATURES["head_dim 256"], mx.bfloat16),
    "head_dim 192, values 128, float16": partial(in_dtype, FEATURES["head_dim 192, values 128"], mx.float16),
    "the same with a softcap": lambda: capped(in_dtype(FEATURES["head_dim 192, values 128"], mx.float16)),
}
MASKS = {
    "boolean mask, float32": FEATURES["boolean mask"],
    "additive mask, bfloat16": partial(in_dtype, FEATURES["additive mask"], mx.bfloat16),
}
WAITING = EVERYTHING | {"700 keys": partial(in_dtype, partial(random_case, 4, q_len=70, k_len=700), mx.bfloat16)}
REST = dict(rest(range(6)))


@pytest.fixture(autouse=True)
def executor(monkeypatch) -> Iterator[None]:
    set_executor(Runtime())
    yield
    set_executor(None)


@pytest.fixture
def hopper(monkeypatch) -> list[str]:
    """Choose the kernels by wgmma where there are some, and keep the names of those that ran."""
    names: list[str] = []
    runtime = Runtime()

    def run(call: KernelCall) -> list[mx.array]:
        names.append(call.name)
        return runtime(call)

    for module in (dispatch, gradient_plans):
        monkeypatch.setattr(module, "capability", lambda: HOPPER)
    set_executor(run)
    return names


def attend(case: Case) -> tuple[mx.array, mx.array]:
    return ra.attention(case.q, case.k, case.v, **case.options, backend="cuda", return_lse=True)


def error(case: Case) -> float:
    """The largest error of results and gradients, as a part of what is allowed."""
    problem = GradientCase.random(case)
    return max(*ratios(case, *attend(case)), *problem.ratios(attention_gradients(problem, "cuda")).values())


@pytest.mark.parametrize("name", EVERYTHING | MASKS)
def test_results_and_gradients(name: str) -> None:
    assert error((EVERYTHING | MASKS)[name]()) <= 1


@pytest.mark.parametrize("name", EVERYTHING | WIDE)
def test_results_and_gradients_by_wgmma(hopper: list[str], name: str) -> None:
    assert error((EVERYTHING | WIDE)[name]()) <= 1
    assert all(any(kernel in ran for ran in hopper) for kernel in ("forward_hopper", "backward_hopper"))


@pytest.mark.emulator
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", REST)
def test_results_and_gradients_of_each_feature_by_wgmma(name: str) -> None:
    assert error(REST[name]()) <= 1


@pytest.mark.emulator
@pytest.mark.parametrize("name", REST)
def test_results_and_gradients_of_each_feature(name: str) -> None:
    assert error(REST[name]()) <= 1


@pytest.mark.parametrize(
    ("capability", "waves", "dtype", "rules"),
    [
        ((8, 0), 3, mx.float32, CAUSAL),
        ((8, 0), 3, mx.bfloat16, EVERY_RULE),
        (HOPPER, 3, mx.bfloat16, CAUSAL),  # dk and dv are added up by another kernel
        (HOPPER, 0, mx.bfloat16, CAUSAL),
        (HOPPER, 0, mx.float16, EVERY_RULE),
    ],
)
def test_gradients_alone_are_those_with_sums_rounded(
    monkeypatch, capability: tuple[int, int], waves: int, dtype: mx.Dtype, rules: ScoreRules
) -> None:
    monkeypatch.setattr(gradient_plans, "capability", lambda: capability)
    monkeypatch.setattr(gradient_plans, "WAVES", waves)
    r = np.random.default_rng(0)
    kernel, at = backends.select("cuda"), np.arange(150, dtype=np.int32)

    def normal(count: int, dim: int, dtype: mx.Dtype) -> mx.array:
        return mx.array(r.standard_normal((1, count, 150, dim)), mx.float32).astype(dtype)

    q, k, v = (normal(count, dim, dtype) for count, dim in ((4, 40), (2, 40), (2, 24)))
    inputs = KernelInputs(q, k, v, at, at, rules)
    out, lse = kernel.finish(inputs, OutputSpec(dtype, True))
    rows = kernel.rows(out, lse, normal(4, 24, dtype), mx.zeros_like(lse))
    alone = kernel.gradients(inputs, rows)
    zeros = Gradients.zeros(q, k, v, rules)
    before = Gradients(*(None if x is None else mx.array(r.standard_normal(x.shape), mx.float32) for x in zeros))
    sums, more = (kernel.backward(inputs, rows, start) for start in (zeros, before))
    exact = ReferenceKernel().gradients(inputs, rows)
    assert mx.array_equal(alone.q, sums.q.astype(dtype)) and alone.q.dtype == dtype
    for one, zero, other, start, right in zip(alone, sums, more, before, exact):
        if one is not None:
            assert mx.array_equal(one, zero.astype(one.dtype))
            assert mx.allclose(other, start + zero, rtol=0, atol=1e-6 * mx.abs(start).max().item())
            assert mx.allclose(zero, right, rtol=0, atol=0.02 * mx.abs(right).max().item())


@pytest.mark.parametrize("capability", [(8, 0), HOPPER])
@pytest.mark.parametrize("name", WAITING)
def test_what_is_waited_for_may_be_late(monkeypatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda: capability)
    monkeypatch.setattr(hopper_tiling, "ARRIVALS", 32)  # one lane would speak for others whose products are late here
    monkeypatch.setattr(dispatch, "_kept", Kept(64))
    case = WAITING[name]()
    early = attend(case)
    set_executor(Runtime(late=True))
    assert all(mx.array_equal(x, y, equal_nan=True) for x, y in zip(early, attend(case)))


@pytest.mark.parametrize("name", [*EVERYTHING, "head_dim 256, bfloat16"])
def test_what_a_gradient_waits_for_may_be_late(monkeypatch, hopper: list[str], name: str) -> None:
    monkeypatch.setattr(hopper_tiling, "ARRIVALS", 32)  # see test_what_is_waited_for_may_be_late
    problem = GradientCase.random((EVERYTHING | WIDE)[name]())
    early = attention_gradients(problem, "cuda")
    assert any("backward_hopper" in ran for ran in hopper)
    set_executor(Runtime(late=True))
    late = attention_gradients(problem, "cuda")
    assert all(mx.array_equal(early[what], late[what], equal_nan=True) for what in early)


def test_keys_in_several_runs_and_a_state(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST_KEYS", 64)
    case = random_case(3, q_len=3, k_len=300)
    assert (
        max(ratios(case, *ra.attention(case.q, case.k, case.v, **case.options, backend="cuda", return_lse=True))) <= 1
    )


@pytest.mark.parametrize(("dims", "runs"), [((64, 64), 3), ((128, 33), 11)])
def test_last_tiles_whose_keys_are_cut(monkeypatch, hopper: list[str], dims: tuple[int, int], runs: int) -> None:
    """From nothing, and from and to a state; 6 tiles of 4 heads have one block. Some rows, keys and runs are empty."""
    monkeypatch.setattr(hopper_tiling, "ARRIVALS", 32)  # see test_what_is_waited_for_may_be_late
    monkeypatch.setattr(dispatch, "_kept", Kept(64))
    monkeypatch.setattr(tail.Tail, "of", lambda tiling, *_: tail.Tail(tiling, 8, 6, runs))
    r = np.random.default_rng(0)
    shapes = (2, 150, dims[0]), (1, 700, dims[0]), (1, 700, dims[1])
    q, k, v = (mx.array(r.standard_normal((2, *shape)), mx.float32).astype(mx.bfloat16) for shape in shapes)
    case = Case(q, k, v, np.arange(150), np.arange(700))
    results = ra.attention(q, k, v, backend="cuda", return_lse=True)
    assert max(ratios(case, *results)) <= 1
    kernel, state = CudaKernel(), None
    for keys in (slice(0, 300), slice(300, 700)):
        positions = case.q_pos, case.k_pos[keys]
        inputs = KernelInputs(q, k[:, :, keys], v[:, :, keys], *positions, ScoreRules(dims[0] ** -0.5, Band()))
        before, state = state, kernel.forward(inputs, state)
    assert max(ratios(case, *kernel.finish(inputs, OutputSpec(mx.bfloat16, True, None), before))) <= 1
    assert max(ratios(case, *finish(state, None, mx.bfloat16))) <= 1
    assert len([name for name in hopper if "zeros" in name]) == len(hopper) // 2 == 4
    set_executor(Runtime(late=True))
    again = ra.attention(q, k, v, backend="cuda", return_lse=True)
    assert all(mx.array_equal(x, y) for x, y in zip(results, again))  # whichever run is the last


def test_a_trial_of_cut_tiles_cuts_them(monkeypatch, hopper: list[str]) -> None:
    """In two runs, both with as many tiles of keys as use every stage again; all queries see almost all keys."""
    monkeypatch.setattr(dispatch.launch, "default", lambda: True)
    q, k = (mx.zeros((1, 8, n, 64), mx.bfloat16) for n in (2304, 12_304))
    seen = []
    attend = dispatch.Launches.run

    def run(self, inputs: KernelInputs, state, output) -> list[mx.array]:
        seen.append((self, inputs))
        return attend(self, inputs, state, output) if inputs.q.shape[2] < 100 else []

    monkeypatch.setattr(dispatch.Launches, "run", run)
    positions = np.arange(2304, dtype=np.int32) + 10_000, np.arange(12_304, dtype=np.int32)
    rules = ScoreRules(0.125, Band(None, 0))
    dispatch.attend(KernelInputs(q, k, k, *positions, rules), None, OutputSpec(mx.bfloat16, True, None))
    (trial, inputs), (real, _) = seen
    assert real.tail is not None and real.tail.whole == 132
    assert trial.tail is not None and (trial.tail.tiles, trial.tail.whole, trial.tail.runs) == (1, 0, 2)
    tiling = trial.plan.tiling
    reach = key_tile_ranges(rules.band, inputs.q_pos, inputs.k_pos, tiling.BQ, 1, tiling.BK)
    assert reach[0, 3] // 2 > tiling.stages


def test_a_kernel_that_cuts_no_tiles_replaces_one_that_fails(monkeypatch, hopper: list[str]) -> None:
    """And not the slower one for other GPUs."""
    q, k = (mx.zeros((1, 8, n, 64), mx.bfloat16) for n in (2304, 8192))
    inputs = KernelInputs(q, k, k, *(np.arange(x.shape[2], dtype=np.int32) for x in (q, k)), ScoreRules(0.125, Band()))
    monkeypatch.setattr(dispatch, "_kept", Kept(64))
    choices = dispatch.Launches.kept(inputs, None, None)
    kernels = [choice.forward.name.removeprefix("ringattn_cuda_").rpartition("_")[0] for choice in choices]
    assert kernels == ["forward_hopper", "forward_hopper", "forward"]
    assert [choice.tail is not None for choice in choices] == [True, False, False]


def test_keys_that_no_row_sees_may_be_nan() -> None:
    r = np.random.default_rng(0)
    q, k, v = (mx.array(r.standard_normal((1, 2, 90, 64)), mx.float32).astype(mx.bfloat16) for _ in range(3))
    spoiled = [mx.concatenate([x[:, :, :80], mx.full((1, 2, 10, 64), mx.nan, mx.bfloat16)], axis=2) for x in (k, v)]
    results = [ra.attention(q[:, :, :80], *keys, mask=mx.arange(90) < 80, backend="cuda") for keys in ((k, v), spoiled)]
    assert mx.array_equal(*results)


@pytest.mark.emulator
@pytest.mark.parametrize("name", EVERYTHING | MASKS)
def test_no_two_threads_race(name: str) -> None:
    set_executor(Runtime(races=True))
    assert error((EVERYTHING | MASKS)[name]()) <= 1
    assert not launch.default()
