"""Tests of the forward kernel for the M5's matrix units: results, work compared with MLX, and the fallback."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest
from metal_executor import restore_executor

import ringattn as ra
from ringattn.errors import KernelWarning
from ringattn.metal import launch, set_executor
from ringattn.metal.device import matrix_units
from ringattn.metal.tiling import TENSOR_DIMS, Tiling
from ringattn.verify.features import FEATURES
from ringattn.verify.oracle import Case, check, random_case
from tools.hostmetal import Runtime
from tools.hostmetal.mlx_kernel import steel_attention

pytestmark = pytest.mark.host_runtime  # a device with the M5's matrix units

HALF = (mx.float16, mx.bfloat16)


@pytest.fixture
def runtime():
    """Runtime of a device with matrix units."""
    runtime = Runtime("shuffled")
    set_executor(runtime, tensor_ops=True)
    yield runtime
    restore_executor()


def normal(seed: int, *shape: int, dtype: mx.Dtype) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def in_dtype(case: Case, dtype: mx.Dtype) -> Case:
    return Case(*(x.astype(dtype) for x in (case.q, case.k, case.v)), case.q_pos, case.k_pos, case.options)


def run(case: Case) -> tuple[mx.array, mx.array]:
    return ra.attention(case.q, case.k, case.v, backend="metal", return_lse=True, **case.options)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(runtime, feature, dtype):
    case = in_dtype(FEATURES[feature](), dtype)
    check(case, *run(case))
    fits = case.q.shape[2] >= 64 and max(case.q.shape[3], case.v.shape[3]) <= TENSOR_DIMS
    assert (runtime.last.tensor_ops > 0) == fits


@pytest.mark.parametrize("seed", range(24))
def test_random_combinations(runtime, seed):
    case = in_dtype(random_case(seed, lengths=(64, 97, 130)), HALF[seed % 2])
    check(case, *run(case))
    assert runtime.counters.tensor_ops > 0 and runtime.counters.matmuls == 0


@pytest.mark.parametrize("dims", [(8, 8), (40, 72), (80, 80), (96, 128), (128, 16)])
def test_head_dims(runtime, dims):
    k_len = 75
    q, k = (normal(i, 1, 2, n, dims[0], dtype=mx.float16) for i, n in enumerate((70, k_len)))
    case = Case(q, k, normal(2, 1, 2, k_len, dims[1], dtype=mx.float16), np.arange(5, k_len), np.arange(k_len))
    case.options = {"mask": "causal"}
    check(case, *run(case))
    assert runtime.last.tensor_ops > 0


def test_strided_slices_of_a_cache(runtime):
    cache = normal(0, 1, 300, 2, 64, dtype=mx.float16).swapaxes(1, 2)[:, :, 17:217]
    across = mx.contiguous(cache.swapaxes(2, 3)).swapaxes(2, 3)  # a large stride between head dims
    case = Case(cache, across, cache, np.arange(200), np.arange(200), {"mask": "causal"})
    check(case, *run(case))


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_odd_values_reach_only_those_who_see_them(runtime, odd):
    q, k, v = (np.array(normal(i, 1, 1, 80, 64, dtype=mx.float32)) for i in range(3))
    v[:, :, 50, 3] = odd
    k[:, :, 70, 2] = np.nan
    out, lse = (np.array(x) for x in run(Case(*(mx.array(x).astype(mx.float16) for x in (q, k, v)), np.arange(80),
                                              np.arange(80), {"mask": "causal"})))  # fmt: skip
    assert np.isfinite(out[:, :, :50]).all() and np.isnan(out[:, :, 70:]).all() and np.isnan(lse[:, :, 70:]).all()
    assert not np.isfinite(out[:, :, 50:70, 3]).any() and np.isfinite(np.delete(out[:, :, 50:70], 3, -1)).all()


def test_state_is_carried(runtime, monkeypatch):
    case = in_dtype(FEATURES["causal, float16"](), mx.float16)
    one = run(case)
    assert runtime.counters.groups == 2 * case.q.shape[1]
    monkeypatch.setattr("ringattn.metal.dispatch.device", lambda: ra.metal.device.Device(1, 1))
    check(case, *run(case))
    check(case, *one)


def test_float32_keeps_its_bits(runtime):
    check(FEATURES["causal"](), *run(FEATURES["causal"]()))
    assert runtime.last.tensor_ops == 0 and runtime.last.matmuls > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(512, 512), (301, 459)])
def test_work_is_at_most_that_of_mlx(runtime, head_dim, causal, lengths):
    q, k, v = (normal(i, 1, 1, n, head_dim, dtype=mx.float16) for i, n in enumerate((lengths[0], *2 * lengths[1:])))
    ra.attention(q, k, v, mask="causal" if causal else None, backend="metal")
    ours = runtime.last
    steel_attention(runtime, q, k, v, causal=causal, scale=head_dim**-0.5, tensor_ops=True)
    theirs = runtime.last
    assert 0 < ours.tensor_ops <= theirs.tensor_ops
    assert ours.exp2 <= theirs.exp2 and ours.barriers <= theirs.barriers
    moved = [sum(x.device_read.values()) + sum(x.device_written.values()) for x in (ours, theirs)]
    assert moved[0] <= 1.02 * moved[1]


def test_plain_kernel_takes_over_where_it_fails(monkeypatch):
    runtime = Runtime()

    def without_units(call):
        if "tensor" in call.name:
            raise RuntimeError("program_source:2: fatal error: 'MetalPerformancePrimitives' file not found")
        return runtime(call)

    monkeypatch.setattr(launch, "default", lambda: True)
    monkeypatch.setattr(launch, "available", lambda: True)
    monkeypatch.setattr(launch.self_test, "verdicts", {})
    set_executor(without_units, tensor_ops=True)
    try:
        case = FEATURES["causal, float16"]()
        with pytest.warns(KernelWarning, match="tensor operations.*not found.*ringattn verify") as warned:
            check(case, *run(case))
            check(case, *run(case))
        assert len(warned) == 1 and runtime.last.matmuls > 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_executor(runtime, tensor_ops=True)
            monkeypatch.setattr(launch.self_test, "verdicts", {})
            check(case, *run(case))
        assert runtime.last.tensor_ops > 0
    finally:
        restore_executor()


@pytest.mark.parametrize(
    "architecture,macos,there",
    [
        ("applegpu_g17s", "26.2", True),
        ("applegpu_g17g", "27.0.1", True),
        ("applegpu_g17s", "26.1", False),
        ("applegpu_g16d", "26.2", False),
        ("applegpu_g17p", "26.2", False),
        ("applegpu_g18p", "26.2", True),
        ("sm_90", "26.2", False),
        ("applegpu_g17s", "", False),
    ],
)
def test_which_machines_have_matrix_units(architecture, macos, there):
    assert matrix_units(architecture, macos) is there


def test_few_rows_are_left_to_the_plain_kernel():
    assert not Tiling.of(mx.float16, 128, 128, 63, tensor_ops=True).tensor
    assert Tiling.of(mx.float16, 128, 128, 64, tensor_ops=True).BQ == 64
    assert Tiling.of(mx.float16, 128, 128, 64, tensor_ops=True).threadgroup_bytes == 0
