"""Tests of what the CUDA kernels are given, by a model of them; `tools.nvidia.check` runs the kernels themselves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import cuda_model
import mlx.core as mx
import numpy as np
import pytest

import ringattn as ra
from ringattn import backends
from ringattn.core.masks import Band
from ringattn.core.rules import ScoreRules
from ringattn.cuda import dispatch, gradient, gradient_plans, launch, set_executor
from ringattn.cuda.backward import deal
from ringattn.cuda.backward_hopper import HeldTiling
from ringattn.cuda.device import HOPPER, LEAST_SHARED_BYTES, SHARED_BYTES
from ringattn.cuda.gradient_tiling import GradientTiling
from ringattn.cuda.hopper_tiling import REGISTERS, HopperTiling
from ringattn.cuda.tiling import Tiling
from ringattn.errors import ArgumentError, ArgumentTypeError, KernelWarning
from ringattn.kernels.interface import KernelInputs
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import FLOATS, Case, GradientCase, check, random_case
from ringattn.verify.variants import attention_gradients
from tools.nvidia.kernels import zeros


@pytest.fixture(autouse=True)
def model(monkeypatch):
    calls = []

    def run(call):
        calls.append(call)
        return cuda_model.run(call)

    monkeypatch.setattr(launch.launcher, "executor", run)
    monkeypatch.setattr(launch.self_test, "verdicts", {})
    return calls


def attend(case: Case, **more) -> tuple[mx.array, mx.array]:
    return ra.attention(case.q, case.k, case.v, backend="cuda", return_lse=True, **case.options, **more)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature: str) -> None:
    case = FEATURES[feature]()
    check(case, *attend(case))


@pytest.mark.parametrize("seed", range(30))
def test_random_problems(seed: int) -> None:
    case = random_case(seed)
    check(case, *attend(case))


@pytest.fixture
def forward_by_wgmma(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda: HOPPER)


def in_half(case: Case) -> Case:
    return case if case.q.dtype.size == 2 else replace(case, **{n: getattr(case, n).astype(mx.bfloat16) for n in "qkv"})


def kernels(model) -> list[str]:
    return [call.name.removeprefix("ringattn_cuda_").rpartition("_")[0] for call in model]


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_by_wgmma(feature: str, model, forward_by_wgmma) -> None:
    case = in_half(FEATURES[feature]())
    check(case, *attend(case))
    few = case.q.shape[2] <= dispatch.FEW_ROWS
    assert kernels(model)[0] == ("forward" if few else "forward_hopper")


@pytest.mark.parametrize("seed", range(30))
def test_random_problems_by_wgmma(seed: int, model, forward_by_wgmma, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST_KEYS", 64)
    case = in_half(random_case(seed, q_len=200, k_len=300))
    check(case, *attend(case))
    assert kernels(model)[0] == "forward_hopper"


def test_float32_does_not_take_wgmma(model, forward_by_wgmma) -> None:
    case = FEATURES["plain"]()
    check(case, *attend(case))
    assert kernels(model) == ["forward"]


@pytest.mark.parametrize("seed", range(0, 30, 3))
def test_few_queries_against_keys_in_several_runs(seed: int, model, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST_KEYS", 64)
    case = random_case(seed, q_len=3, k_len=700)
    check(case, *attend(case))
    assert [call.name.split("_")[2] for call in model] == ["forward", "combine"]


def test_a_ring_hop_continues_a_state(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST_KEYS", 64)
    for q_len in (4, 100):
        x = mx.array(np.random.default_rng(0).standard_normal((1, 2, q_len, 64)), mx.float32)
        layout = ra.Layout.zigzag(q_len, 1)
        with ra.init("solo") as ring:
            out = ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal", backend="cuda")
        assert mx.allclose(out, ra.attention(x, x, x, mask="causal", backend="reference"), atol=1e-5)


def gradients(case: Case) -> None:
    """Check the gradients of a problem."""
    problem = GradientCase.random(case)
    ratios = problem.ratios(attention_gradients(problem, "cuda"))
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("feature", FEATURES)
def test_the_gradient_of_every_feature(feature: str, model) -> None:
    gradients(FEATURES[feature]())
    assert [call.name.split("_")[2] for call in model] == ["forward", "rows", "backward", *["collect"] * 3]


@pytest.mark.parametrize("seed", range(30))
def test_the_gradient_of_random_problems(seed: int) -> None:
    gradients(random_case(seed))


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(gradient_plans, "capability", lambda: HOPPER)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_gradient_of_every_feature_by_wgmma(feature: str, model, hopper) -> None:
    gradients(in_half(FEATURES[feature]()))
    calls = 3 if feature == "head_dim 256" else 2
    assert [call.name.split("_")[2] for call in model] == ["forward", "rows", *["backward"] * calls, *["collect"] * 2]


@pytest.mark.parametrize("seed", range(30))
def test_the_gradient_of_random_problems_by_wgmma(seed: int, hopper) -> None:
    gradients(in_half(random_case(seed)))


@pytest.mark.parametrize("seed", range(0, 30, 3))
def test_a_gradient_by_wgmma_in_several_calls(seed: int, model, hopper, monkeypatch) -> None:
    monkeypatch.setattr(gradient_plans, "WORKSPACE", 1 << 14)
    monkeypatch.setattr(gradient_plans, "SCORES", 1 << 12)
    gradients(in_half(random_case(seed, q_len=150, k_len=300)))
    assert sum("hopper" in call.name for call in model) > 2


@pytest.mark.parametrize(
    ("tokens", "heads", "kind"),
    [
        (1000, 4, gradient_plans.SplitHopperPlan),
        (40_000, 4, gradient_plans.HopperPlan),
        (1000, 2, gradient_plans.HopperPlan),
    ],
)
def test_the_heads_of_a_group_share_a_block_where_blocks_are_many(tokens: int, heads: int, kind, hopper) -> None:
    q, k = (mx.zeros((1, n, tokens, 64), mx.bfloat16) for n in (heads, 2))
    at = np.arange(tokens, dtype=np.int32)
    assert gradient_plans.plans(KernelInputs(q, k, k, at, at, ScoreRules(1.0, Band())))[0] is kind


def test_the_gradient_by_wgmma_takes_half_precision(hopper) -> None:
    for dtype, dims, expected in (
        (mx.bfloat16, 128, gradient_plans.HopperPlan),
        (mx.float16, 256, gradient_plans.HopperPlan),
        (mx.float32, 64, gradient_plans.FusedPlan),
    ):
        x = mx.zeros((1, 1, 8, dims), dtype)
        at = np.arange(8, dtype=np.int32)
        assert gradient_plans.plans(KernelInputs(x, x, x, at, at, ScoreRules(1.0, Band())))[0] is expected


@pytest.mark.parametrize("feature", FEATURES)
def test_a_gradient_in_several_calls(feature: str, model, monkeypatch) -> None:
    monkeypatch.setattr(gradient_plans, "WORKSPACE", 1 << 17)
    monkeypatch.setattr(gradient_plans, "SCORES", 1 << 12)
    monkeypatch.setattr(gradient_plans, "QUERY_TILES", 1)
    monkeypatch.setattr(gradient_plans, "shared_bytes", lambda: LEAST_SHARED_BYTES)
    gradients(FEATURES[feature]())
    assert sum(call.name.split("_")[2] == "backward" for call in model) > 1


GPUS = sorted({LEAST_SHARED_BYTES, *SHARED_BYTES.values()})


def test_every_tile_fits_on_every_gpu() -> None:
    for dtype, dim, v_dim, rows, shared in itertools.product(
        FLOATS, (8, 64, 80, 128, 136, 256), (8, 128, 256), (1, 17, 64, 999), GPUS
    ):
        tiling = Tiling.of(dtype, dim, v_dim, rows, shared)
        assert tiling.shared_memory <= shared
        assert tiling.BK % 16 == tiling.BD % 16 == tiling.BV % 16 == 0 and dim <= tiling.BD and v_dim <= tiling.BV
        assert min(rows, 32) <= tiling.BQ
        assert tiling.fragments * (tiling.BK + tiling.BV) / 2 <= 192, "sums and scores stay in registers"


def test_every_tile_of_wgmma_fits() -> None:
    for dim, v_dim, rows in itertools.product((8, 64, 80, 128, 136, 256), (8, 33, 128, 256), (65, 99_999)):
        tiling = HopperTiling.of(dim, v_dim, rows)
        loader, row = REGISTERS[tiling.groups]
        assert tiling.shared_memory <= SHARED_BYTES[HOPPER] and dim <= tiling.BD and v_dim <= tiling.BV
        assert 128 * (loader + tiling.groups * row) <= 1 << 16, "registers of a multiprocessor"
        assert row >= tiling.BK // 2 + tiling.BK // 4 + tiling.BV // 2 + 24, (
            "scores, weights and sums stay in registers"
        )


@pytest.mark.parametrize("shared", GPUS)
def test_every_tile_of_the_gradient_fits_on_every_gpu(shared: int) -> None:
    for dtype, dim, v_dim in itertools.product(FLOATS, (8, 64, 80, 128, 136, 256), (8, 128, 200, 256)):
        tiling = GradientTiling.of(dtype, dim, v_dim, shared)
        assert tiling.shared_memory <= shared and tiling.blocks >= 132
        assert dim <= tiling.BD and v_dim <= tiling.BV
        assert tiling.BD % (16 * tiling.halves) == tiling.BV % (16 * tiling.halves) == 0
        assert tiling.QUERIES % (16 * tiling.fragments) == 0
        assert tiling.warps % (tiling.QUERIES // (16 * tiling.fragments)) == 0, "warps share dq"
        assert (tiling.BD + tiling.BV) // tiling.halves // 2 <= 128, "the sums of dk and dv stay in registers"


@pytest.mark.parametrize("softcap", (None, 5.0))
def test_every_tile_of_the_gradient_by_wgmma_fits(softcap: float | None) -> None:
    for dim, v_dim in itertools.product((8, 64, 80, 128, 192, 256), (8, 33, 128, 256)):
        q, v = (mx.zeros((1, 1, 8, n), mx.bfloat16) for n in (dim, v_dim))
        at = np.arange(8, dtype=np.int32)
        inputs = KernelInputs(q, q, v, at, at, ScoreRules(1.0, Band(), softcap))
        of_queries, of_keys = HeldTiling.of_queries(inputs), HeldTiling.of_keys(inputs)
        assert of_queries.sums == ("dq",) and [name for x in of_keys for name in x.sums] == ["dk", "dv"]
        for tiling in (of_queries, *of_keys):
            assert tiling.shared_memory <= SHARED_BYTES[HOPPER] and tiling.stages >= 3
            assert dim <= tiling.BD and v_dim <= tiling.BV and tiling.PASSING % 16 == tiling.threads % 128 == 0
            sums = {"dq": tiling.BD, "dk": tiling.BD, "dv": tiling.BV}
            scores = 1 if tiling.sums == ("dv",) else 2 if softcap is None else 3
            registers = (sum(sums[name] for name in tiling.sums) + scores * tiling.PASSING) // 2
            assert registers <= 200, "sums and scores stay in registers"


def test_blocks_hold_dk_and_dv_together_as_far_as_registers_do() -> None:
    at = np.arange(8, dtype=np.int32)
    for dim, v_dim, calls in ((128, 128, 1), (192, 128, 1), (256, 64, 1), (192, 192, 2), (256, 256, 2)):
        q, v = (mx.zeros((1, 1, 8, n), mx.bfloat16) for n in (dim, v_dim))
        assert len(HeldTiling.of_keys(KernelInputs(q, q, v, at, at, ScoreRules(1.0, Band())))) == calls


def test_key_tiles_are_dealt_evenly() -> None:
    reach = np.array([[i, i, 40, 40] for i in range(40)], np.int32)  # causal
    dealt = deal(reach, 8)
    work = [sum(40 - i for i in tiles if i >= 0) for tiles in dealt]
    assert max(work) - min(work) <= 8
    assert deal(reach[:3], 8).shape == (8, 1)


def test_what_the_kernels_do_not_take_goes_to_plain_operations(model) -> None:
    for shape in ((1, 2, 5, 264), (1, 2, 0, 64)):
        x = mx.ones(shape)
        assert ra.attention(x, x, x, backend="cuda").shape == shape
    assert not model


def test_kernels_of_other_text_have_other_names(model) -> None:
    x = mx.ones((1, 2, 70, 64))
    for options in ({}, {"mask": "causal"}, {"softcap": 2.0}, {"out_dtype": mx.float16}, {"mask": mx.zeros((70, 70))}):
        mx.eval(ra.attention(x, x, x, backend="cuda", **options))
        mx.eval(ra.attention(x.astype(mx.bfloat16), *[x.astype(mx.bfloat16)] * 2, backend="cuda", **options))
    assert len({call.name for call in model}) == len({call.header for call in model}) == len(model)


# Selection


def test_the_backend_needs_an_nvidia_gpu(monkeypatch) -> None:
    monkeypatch.setattr(launch.launcher, "executor", launch.launcher.gpu)
    monkeypatch.setattr(launch, "gpu", lambda: False)
    with pytest.raises(ArgumentError, match="'cuda' needs an NVIDIA GPU.*expected 'host' or 'reference'"):
        backends.select("cuda")
    assert "cuda" not in backends.available()


def test_it_is_the_default_on_an_nvidia_gpu(monkeypatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    for gpu, name in ((True, "cuda"), (False, "reference")):
        monkeypatch.setattr(launch, "gpu", lambda gpu=gpu: gpu)
        assert backends.select(None).name == name


def test_an_executor_is_a_function() -> None:
    with pytest.raises(ArgumentTypeError, match="fn: int, expected a function"):
        set_executor(3)  # type: ignore[arg-type]


# Trials


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(launch, "default", lambda: True)
    monkeypatch.setattr(launch, "gpu", lambda: True)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_passes_its_trial(as_on_a_gpu, feature: str, recwarn) -> None:
    case = FEATURES[feature]()
    check(case, *attend(case))
    assert list(launch.self_test.verdicts.values()) == [True]
    assert not [x for x in recwarn if issubclass(x.category, KernelWarning)]


@pytest.mark.parametrize("feature", FEATURES)
def test_the_gradient_of_every_feature_passes_its_trial(as_on_a_gpu, feature: str, recwarn) -> None:
    gradients(FEATURES[feature]())
    assert list(launch.self_test.verdicts.values()) == [True] * 3  # forward, rows, gradient
    assert not [x for x in recwarn if issubclass(x.category, KernelWarning)]


@pytest.mark.parametrize("seed", (12, 18, 21, 34))
def test_the_trial_of_rows_with_one_key_does_not_compare_rounding(as_on_a_gpu, seed: int, recwarn) -> None:
    gradients(random_case(seed))
    assert not [x for x in recwarn if issubclass(x.category, KernelWarning)]


def test_the_gradient_stays_lazy_and_works_in_mx_compile(monkeypatch) -> None:
    monkeypatch.setattr(launch.launcher, "executor", zeros)
    monkeypatch.setattr(gradient_plans, "WORKSPACE", 1 << 17)  # several calls
    x = mx.ones((1, 2, 300, 64))
    found = mx.compile(mx.grad(lambda q: ra.attention(q, q, q, mask="causal", backend="cuda").sum()))(x)
    assert mx.array_equal(found, mx.zeros(x.shape))


def test_rows_are_tried_in_their_dtypes(as_on_a_gpu, model) -> None:
    arrays = [mx.ones((2, 3, 5, 8), mx.bfloat16), mx.ones((2, 3, 5)), mx.ones((2, 3, 5, 8)), mx.ones((2, 3, 5))]
    mx.compile(gradient._few)(arrays[0])
    gradient.rows(*arrays)
    assert [x.dtype for x in model[0].inputs] == [x.dtype for x in arrays]
    assert [len(x.shape) for x in model[0].inputs] == [4, 4, 3, 3]


def broken(call):
    raise RuntimeError("Failed to compile kernel\nerror: identifier is undefined")


def wrong(call):
    return [x + 1 for x in cuda_model.run(call)]


def test_a_kernel_by_wgmma_that_does_not_work_leaves_the_other(
    as_on_a_gpu, forward_by_wgmma, model, monkeypatch
) -> None:
    right = launch.launcher.executor
    monkeypatch.setattr(launch.launcher, "executor", lambda call: (broken if "hopper" in call.name else right)(call))
    case = FEATURES["causal, bfloat16"]()
    with pytest.warns(KernelWarning, match="wgmma.*Failed to compile kernel") as warned:
        check(case, *attend(case))
        check(case, *attend(case))
    assert len(warned) == 1
    assert set(kernels(model)) == {"forward"}


def test_a_gradient_by_wgmma_that_does_not_work_leaves_the_other_kernel(
    as_on_a_gpu, hopper, model, monkeypatch
) -> None:
    def run(call):
        return broken(call) if "hopper" in call.name else gradient_model(call)

    gradient_model = launch.launcher.executor
    monkeypatch.setattr(launch.launcher, "executor", run)
    with pytest.warns(KernelWarning, match="wgmma.*Failed to compile kernel") as warned:
        gradients(in_half(FEATURES["causal"]()))
        gradients(in_half(FEATURES["causal"]()))
    assert len(warned) == 1
    assert any(call.name.startswith("ringattn_cuda_backward_") for call in model)


@pytest.mark.parametrize("run,what", [(broken, "Failed to compile kernel"), (wrong, "its answer is wrong")])
def test_what_does_not_work_is_replaced_with_one_warning(as_on_a_gpu, monkeypatch, run, what: str) -> None:
    monkeypatch.setattr(launch.launcher, "executor", run)
    case = FEATURES["causal"]()
    with pytest.warns(KernelWarning, match=f"CUDA kernel .*float32 to float32.*{what}.*ringattn verify") as warned:
        check(case, *attend(case))
        check(case, *attend(case))
    assert len(warned) == 1
