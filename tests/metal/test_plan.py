"""Tests of the plan of the Metal backend: tiles, dispatches of bounded work, and calls of the executor."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_executor import restore_executor, usual_executor

import ringattn as ra
from ringattn.core.masks import Band, Tile
from ringattn.core.rules import ScoreRules
from ringattn.kernels.gpu.key_tiles import key_tile_ranges
from ringattn.kernels.interface import KernelInputs, OutputSpec
from ringattn.metal import device, dispatch, set_executor
from ringattn.metal.backend import MetalKernel
from ringattn.metal.device import Device
from ringattn.metal.dispatch import Plan
from ringattn.metal.tiling import THREADGROUP_BYTES, Tiling, split_dispatches
from ringattn.verify.oracle import FLOATS, Case, check
from tools.hostmetal import Runtime

DIMS = (1, 7, 8, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threadgroup_memory(dtype):
    for dim in DIMS:
        for v_dim in DIMS:
            for rows in (1, 9, 17, 64, 1000):
                tiling = Tiling.of(dtype, dim, v_dim, rows)
                assert tiling.threadgroup_bytes <= THREADGROUP_BYTES
                assert dim <= tiling.BD and v_dim <= tiling.BV and min(rows, 32) <= tiling.BQ


@pytest.mark.parametrize("seed", range(40))
def test_key_tile_ranges(seed):
    """Ranges agree with the mask, tile by tile."""
    r = np.random.default_rng(seed)
    q_pos, k_pos = (np.sort(r.choice(400, n, replace=False)).astype(np.int32) for n in r.integers(1, 200, 2))
    band = [Band(), Band(None, 0), Band(-30, 0), Band(-5, 60), Band(0, 0)][seed % 5]
    rows, group, BK = int(r.choice([8, 16, 32])), int(r.choice([1, 1, 3])), int(r.choice([16, 32]))
    tiles = key_tile_ranges(band, q_pos, k_pos, rows, group, BK)
    assert len(tiles) == -(-len(q_pos) * group // rows)
    for i, (first, full_first, full_last, last) in enumerate(tiles):
        queries = q_pos[i * rows // group : (min((i + 1) * rows, len(q_pos) * group) - 1) // group + 1]
        for j in range(-(-len(k_pos) // BK)):
            keys = k_pos[j * BK : (j + 1) * BK]
            seen = band.visible(queries, keys)
            if not first <= j < last:
                assert not seen.any()
            if full_first <= j < full_last:
                assert seen.all() and len(keys) == BK
                assert band.tile(queries[0], queries[-1], keys[0], keys[-1]) is Tile.FULL


LENGTHS = {"64K": 65_536, "262K": 262_144, "1M": 1_048_576}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("architecture", ["applegpu_g13g", "applegpu_g15s", "applegpu_g14d"])
def test_dispatches_are_bounded(length, causal, architecture):
    """With 32 heads of 128 dims every pair is in one dispatch, and no dispatch exceeds the budget."""
    tokens, heads, dims = LENGTHS[length], 32, 256
    gpu, tiling = device.device(architecture), Tiling.of(mx.bfloat16, 128, 128, 1000)
    positions = np.arange(tokens, dtype=np.int32)
    tiles = key_tile_ranges(Band(None, 0 if causal else None), positions, positions, tiling.BQ, 1, tiling.BK)
    least = -(-gpu.threadgroups // heads)
    cuts = split_dispatches(tiles, (tiling.BQ, tiling.BK), (tokens, tokens), 2 * dims * heads, gpu.budget, least)
    at = 0
    for queries, keys in cuts:
        assert queries.start == at and keys[0].start == 0
        own = tiles[queries.start // tiling.BQ : -(-queries.stop // tiling.BQ)]
        assert keys[-1].stop >= own[:, 3].max() * tiling.BK
        for before, after in zip(keys, keys[1:]):
            assert before.stop == after.start
        for run in keys:
            seen = np.clip(own[:, 3] * tiling.BK, run.start, run.stop) - run.start
            assert seen.sum() * tiling.BQ * 2 * dims * heads <= gpu.budget
        at = queries.stop
    assert at == tokens
    dispatches = sum(len(keys) for _, keys in cuts)
    least_possible = tiles[:, 3].astype(np.int64).sum() * tiling.BQ * tiling.BK * 2 * dims * heads / gpu.budget
    assert least_possible <= dispatches <= 2 * least_possible + len(cuts)


def test_the_device_sets_the_budget():
    small, large = device.device("applegpu_g13g"), device.device("applegpu_g14d")
    assert large.budget > small.budget and large.threadgroups > small.threadgroups
    assert device.device("x86_64") == device.device("something else")


def case_of(q_len: int, k_len: int, *, heads=2, kv_heads=1, dim=64, dtype=mx.float16, batch=1, **options) -> Case:
    r = np.random.default_rng(q_len + k_len + dim)

    def normal(heads: int, tokens: int) -> mx.array:
        return mx.array(r.standard_normal((batch, heads, tokens, dim)).astype(np.float32)).astype(dtype)

    q, k, v = normal(heads, q_len), normal(kv_heads, k_len), normal(kv_heads, k_len)
    return Case(q, k, v, np.arange(k_len - q_len, k_len), np.arange(k_len), options)


def run(case: Case):
    return ra.attention(case.q, case.k, case.v, backend="metal", return_lse=True, **case.options)


# The configurations of ml-explore/mlx PR 3306


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_pr_3306_head_dims(dtype, dim):
    case = case_of(64, 64, dim=dim, dtype=dtype)
    check(case, *run(case))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pr_3306_causal(dtype):
    case = case_of(100, 100, dtype=dtype, mask="causal")
    check(case, *run(case))


def test_pr_3306_cross_attention():
    case = case_of(40, 170)
    check(case, *run(case))


@pytest.mark.parametrize("heads,kv_heads", [(8, 2), (8, 1), (4, 4)])
def test_pr_3306_grouped_heads(heads, kv_heads):
    case = case_of(40, 40, heads=heads, kv_heads=kv_heads, mask="causal")
    check(case, *run(case))


def test_pr_3306_batches():
    case = case_of(40, 40, batch=4, mask="causal")
    check(case, *run(case))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pr_3306_8k_keys(dtype):
    case = case_of(33, 8192, dtype=dtype, kv_heads=2)
    check(case, *run(case))


@pytest.mark.parametrize("options", [{}, {"mask": "causal"}, {"heads": 8, "kv_heads": 2}], ids=str)
def test_pr_3306_lse(options):
    case = case_of(50, 90, dtype=mx.float32, **options)
    exact = case.exact()[1]
    np.testing.assert_allclose(np.array(run(case)[1]), exact, rtol=0, atol=4e-6)


@pytest.mark.parametrize("keys", [65_536, 131_072, 262_144])
def test_pr_3306_few_rows_against_many_keys(monkeypatch, keys):
    """Dispatches have at most 30,000 keys, and each carries its state to the next."""
    case = case_of(4, keys)
    tiling = Tiling.of(mx.float16, 64, 64, 8)
    budget = 30_000 * tiling.BQ * 2 * (tiling.BD + tiling.BV)
    monkeypatch.setattr(dispatch, "device", lambda: Device(1, budget))
    calls, run_kernel = [], usual_executor(checks=False)
    set_executor(lambda call: calls.append(call) or run_kernel(call))
    out, lse = run(case)
    restore_executor()
    forward = [call for call in calls if "forward" in call.name]
    assert len(forward) == -(-keys // (30_000 // tiling.BK * tiling.BK))
    assert all(call.inputs[1].shape[2] <= 30_000 for call in forward)
    check(case, out, lse)


# Calls of the executor


def captured(case: Case, **more) -> list:
    calls, run_kernel = [], usual_executor()
    set_executor(lambda call: calls.append(call) or run_kernel(call))
    ra.attention(case.q, case.k, case.v, backend="metal", **{**case.options, **more})
    restore_executor()
    return calls


@pytest.mark.host_runtime
def test_without_lse_there_is_no_trace_of_it():
    """A kernel without lse has no operation and no byte for it. `attention` needs it for the gradient."""
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, 70, 64)), mx.float16)
    runtime, counted = Runtime(checks=False), []
    set_executor(runtime)
    for with_lse in (False, True):
        positions = np.arange(70, dtype=np.int32)
        inputs = KernelInputs(x, x, x, positions, positions, ScoreRules(0.125, Band()))
        out, lse = MetalKernel().finish(inputs, OutputSpec(x.dtype, with_lse))
        assert (lse is not None) is with_lse
        counted.append(runtime.last)
    restore_executor()
    off, on = counted
    assert "lse" not in off.device_written and on.device_written["lse"] == 4 * 70
    assert off.log == 0 and on.log == 70 and off.device_written["out"] == on.device_written["out"]
    assert off.device_read == on.device_read and off.exp2 == on.exp2 and off.matmuls == on.matmuls


def visible_tiles(case: Case) -> int:
    """Count the tiles of 32 x 32 in which any query sees any key, from the mask."""
    seen = np.pad(case.visible, [(0, 0), (0, 0), (0, -len(case.q_pos) % 32), (0, -len(case.k_pos) % 32)])
    tiles = seen.reshape(*seen.shape[:2], seen.shape[2] // 32, 32, seen.shape[3] // 32, 32)
    return int(tiles.any((3, 5)).sum())


def packed(n: int) -> dict:
    ids = mx.array(np.repeat(np.arange(7), -(-n // 7))[None, :n].astype(np.int32))
    return {"segments": (ids, ids), "mask": "causal"}


@pytest.mark.host_runtime
@pytest.mark.parametrize("options", [{"window": 40}, {"window": (70, 10)}, packed(512), {"mask": "causal"}], ids=str)
def test_work_is_in_proportion_to_the_tiles_that_are_seen(options):
    case = case_of(512, 512, heads=1, kv_heads=1, **options)
    runtime = Runtime(checks=False)
    set_executor(runtime)
    ra.attention(case.q, case.k, case.v, backend="metal", **options)
    counted = runtime.last
    restore_executor()
    tiles, dim = visible_tiles(case), case.q.shape[3]
    assert counted.matmuls <= tiles * 2 * (32 // 8) ** 2 * (dim // 8)
    assert counted.exp2 <= tiles * (32 * 32 + 128)  # and for each of the 128 threads the factor of its row
    read = sum(counted.device_read[name] for name in ("keys", "values"))
    assert read == tiles * 2 * 32 * dim * case.q.dtype.size


def test_heads_that_share_keys_share_tiles_when_rows_are_few():
    (call,) = captured(case_of(2, 100, heads=8, kv_heads=2))
    assert call.grid[1:] == (2, 1) and dict(call.template)["G"] == 4


def test_a_kernel_is_the_same_whatever_the_lengths():
    """Otherwise each new token would compile a kernel."""
    few, more = (captured(case_of(100, n, mask="causal"))[0] for n in (300, 301))
    assert (few.name, few.source, few.header, few.template) == (more.name, more.source, more.header, more.template)


def test_larger_head_dims_go_to_plain_operations():
    case = case_of(20, 30, dim=320, mask="causal")
    assert captured(case) == []
    check(case, *run(case))


def test_without_a_gpu_metal_is_refused():
    set_executor(None)
    try:
        if mx.metal.is_available():
            pytest.skip("there is an Apple GPU")
        case = case_of(2, 2)
        with pytest.raises(ra.ArgumentError, match="backend: 'metal' needs an Apple GPU"):
            run(case)
    finally:
        restore_executor()


def test_an_executor_is_a_function():
    with pytest.raises(ra.ArgumentTypeError, match="fn: int, expected a function"):
        set_executor(3)


def test_plan_fills_the_gpu_with_runs_of_keys():
    case = case_of(1, 5000, heads=4, kv_heads=1)
    inputs = KernelInputs(case.q, case.k, case.v, case.q_pos, case.k_pos, ScoreRules(0.125, Band()))
    plan = Plan.of(inputs, Device(10, 10**12))
    assert plan.group == 4 and plan.splits(inputs) == 5000 // dispatch.LEAST_KEYS
