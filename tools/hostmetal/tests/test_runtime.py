"""Tests of the host runtime of Metal kernels: the language, the checks and the counters."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from planted import PLANTED, VALUES, Planted

from ringattn.metal.launch import KernelCall
from tools.hostmetal import CompileError, LintError, Runtime, RuntimeFault
from tools.hostmetal.mlx_kernel import steel_attention

pytestmark = pytest.mark.emulator

ORDERS = ("forward", "backward", "shuffled")
REFUSALS = {"lint": LintError, "compile": CompileError}


def run(source, inputs, outputs, threads=(32, 1, 1), group=None, runtime=None, **fields):
    """Run a kernel on named `inputs`. `outputs` are (name, shape, dtype)."""
    call = KernelCall(
        name="test",
        input_names=list(inputs),
        output_names=[name for name, _, _ in outputs],
        source=source,
        header=fields.pop("header", ""),
        inputs=list(inputs.values()),
        template=fields.pop("template", []),
        grid=threads,
        threadgroup=group or threads,
        output_shapes=[shape for _, shape, _ in outputs],
        output_dtypes=[dtype for _, _, dtype in outputs],
        **fields,
    )
    made = (runtime or Runtime())(call)
    return made[0] if len(made) == 1 else made


def as_numpy(array):
    return np.array(array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: p.name)
def test_planted_bug_is_caught(planted: Planted, order):
    call = planted.call(bug=True)
    if planted.kind in REFUSALS:
        with pytest.raises(REFUSALS[planted.kind]):
            Runtime(order)(call)
    elif planted.kind == "numbers":
        assert not np.allclose(Runtime(order)(call)[0], planted.expected(VALUES), atol=1e-4)
    else:
        with pytest.raises(RuntimeFault) as caught:
            Runtime(order)(call)
        assert planted.kind in caught.value.kinds, str(caught.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: p.name)
def test_its_healthy_twin_passes(planted: Planted, order):
    (y,) = Runtime(order)(planted.call(bug=False))
    np.testing.assert_allclose(y, planted.expected(VALUES), atol=1e-5)


def test_a_report_says_what_happened_where():
    with pytest.raises(RuntimeFault) as caught:
        source = "uint i = thread_position_in_grid.x;\ny[i] = x[i + 1];"
        run(source, {"x": mx.zeros(64)}, [("y", (64,), mx.float32)], (64, 1, 1))
    report = caught.value.reports[0]
    assert (report.kind, report.buffer, report.offset) == ("out_of_bounds", "x", 256)
    assert (report.thread, report.group) == (63, (0, 0, 0))
    assert "thread 63 reads 4 bytes at x[64], which has 64 elements of 4 bytes" in str(caught.value)


def test_ragged_grid_reaches_every_thread_once():
    source = """
      uint3 p = thread_position_in_grid;
      y[(p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x] = thread_index_in_threadgroup
          + 1000 * threads_per_threadgroup.x + 100000 * simdgroups_per_threadgroup;
    """
    runtime = Runtime()
    y = np.array(run(source, {}, [("y", (2, 5, 70), mx.int32)], (70, 5, 2), (32, 2, 1), runtime))
    assert runtime.last.groups == 3 * 3 * 2
    assert y[0, 1, 33] == 33 + 32000 + 200000
    assert y[1, 4, 69] == 5 + 6000 + 100000  # this corner has 6 x 1 threads


def test_inputs_arrive_as_mlx_passes_them():
    x = mx.arange(24).reshape(2, 3, 4).transpose(0, 2, 1)[:, ::2]
    source = """
      uint i = thread_position_in_grid.x;
      uint at = elem_to_loc(i, x_shape, x_strides, x_ndim);
      y[i] = x[at] + few[2] * one;
    """
    inputs = {"x": x, "few": mx.array([1, 2, 3], mx.int32), "one": mx.array(10, mx.int32)}
    runtime = Runtime()
    y = run(source, inputs, [("y", x.shape, mx.int32)], (x.size, 1, 1), (x.size, 1, 1), runtime)
    np.testing.assert_array_equal(y, np.array(x) + 30)
    assert runtime.last.device_read == {"x": 4 * x.size}
    assert runtime.last.constant_read > 8 * x.size  # `few`, `one`, and the shape and strides


def test_a_view_ends_where_its_last_element_does():
    cache = mx.zeros((4, 16))
    with pytest.raises(RuntimeFault, match="out_of_bounds of x"):
        source = "y[0] = x[thread_position_in_grid.x];"
        run(source, {"x": cache[:, :4]}, [("y", (1,), mx.float32)], (53, 1, 1), (1, 1, 1))


def test_rows_are_made_contiguous_on_request():
    x = mx.arange(12).reshape(3, 4).T
    source = "uint i = thread_position_in_grid.x; y[i] = x[i];"
    y = run(source, {"x": x}, [("y", x.shape, mx.int32)], (12, 1, 1), ensure_row_contiguous=True)
    np.testing.assert_array_equal(y, np.array(x))


def test_outputs_start_at_their_initial_value():
    y = run("if (thread_position_in_grid.x == 3) y[3] += 1;", {}, [("y", (8,), mx.float16)], (8, 1, 1), init_value=2.0)
    np.testing.assert_array_equal(y, [2, 2, 2, 3, 2, 2, 2, 2])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.int32, mx.uint8], ids=str)
def test_template_arguments_and_dtypes(dtype):
    source = "uint i = thread_position_in_grid.x; y[i] = NEGATE ? T(x[i] * T(TIMES)) : x[i];"
    x = mx.arange(40).astype(dtype)
    template = [("T", dtype), ("TIMES", 3), ("NEGATE", True)]
    y = run(source, {"x": x}, [("y", (40,), dtype)], (40, 1, 1), template=template)
    assert mx.array_equal(y, x * 3)


def test_bfloat_rounds_to_nearest_even():
    x = mx.random.normal((64,), key=mx.random.key(0))
    source = "uint i = thread_position_in_grid.x; y[i] = bfloat(x[i]);"
    y = run(source, {"x": x}, [("y", (64,), mx.bfloat16)], (64, 1, 1))
    assert mx.array_equal(y, x.astype(mx.bfloat16))


def test_vectors():
    source = """
      uint i = thread_position_in_grid.x;
      const device half4* rows = (const device half4*)x;
      float4 v = float4(rows[i]);
      float4 w = float4(v.xy, 1.0, 2) + vec<float, 4>(v.w);
      *(device float4*)(y + 4 * i) = select(w, clamp(w, 0.0f, 1.0f), v < 0);
    """
    x = mx.random.normal((8, 4), key=mx.random.key(1)).astype(mx.float16)
    y = run(source, {"x": x}, [("y", (8, 4), mx.float32)], (8, 1, 1))
    v = as_numpy(x).astype(np.float32)
    w = np.stack([v[:, 0], v[:, 1], np.full(8, 1), np.full(8, 2)], 1) + v[:, 3:]
    np.testing.assert_array_equal(y, np.where(v < 0, np.clip(w, 0, 1), w).astype(np.float32))


LANE_OPERATIONS = {
    "simd_shuffle(v, 31 - lane)": lambda x: x[::-1],
    "simd_shuffle_xor(v, 5)": lambda x: x[np.arange(32) ^ 5],
    "simd_shuffle_up(v, 3)": lambda x: np.concatenate([x[:3], x[:-3]]),
    "simd_shuffle_down(v, 3)": lambda x: np.concatenate([x[3:], x[-3:]]),
    "simd_shuffle_rotate_up(v, 3)": lambda x: np.roll(x, 3),
    "simd_broadcast(v, 7)": lambda x: np.full(32, x[7]),
    "simd_broadcast_first(v)": lambda x: np.full(32, x[0]),
    "simd_sum(v)": lambda x: np.full(32, x.sum()),
    "simd_max(v)": lambda x: np.full(32, x.max()),
    "simd_min(v)": lambda x: np.full(32, x.min()),
    "simd_prefix_inclusive_sum(v)": lambda x: np.cumsum(x),
    "simd_prefix_exclusive_sum(v)": lambda x: np.cumsum(x) - x,
    "T(simd_any(v > 30))": lambda x: np.ones(32),
    "T(simd_all(v > 30))": lambda x: np.zeros(32),
    "T(popcount(uint(ulong(simd_ballot(v > 8)))))": lambda x: np.full(32, (x > 8).sum()),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32], ids=str)
def test_operations_of_a_simdgroup(dtype):
    lines = [f"y[{32 * i} + lane] = {expression};" for i, expression in enumerate(LANE_OPERATIONS)]
    source = "\n".join(["ushort lane = thread_index_in_simdgroup;", "T v = x[lane];", *lines])
    x = mx.array(np.random.default_rng(0).permutation(32), dtype)
    outputs = [("y", (len(LANE_OPERATIONS), 32), dtype)]
    for order in ORDERS:
        y = run(source, {"x": x}, outputs, template=[("T", dtype)], runtime=Runtime(order))
        np.testing.assert_array_equal(y, [reference(as_numpy(x)) for reference in LANE_OPERATIONS.values()])


def test_reductions_of_bits():
    source = """
      uint t = thread_index_in_simdgroup, v = 1 << (t % 8);
      y[3 * t] = simd_or(v);
      y[3 * t + 1] = simd_and(v | 3);
      y[3 * t + 2] = simd_xor(v);
    """
    y = run(source, {}, [("y", (32, 3), mx.uint32)])
    assert (np.array(y) == [255, 3, 0]).all()


@pytest.mark.parametrize("left", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("right", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_matrix_multiply(left, right):
    source = """
      threadgroup float tile[80];
      simdgroup_matrix<A, 8, 8> a;
      simdgroup_matrix<B, 8, 8> b;
      simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
      simdgroup_load(a, left + 2, 12);
      simdgroup_load(b, right, 8, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(c, a, b, c);
      simdgroup_store(c, tile, 10);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      for (ushort i = thread_index_in_simdgroup; i < 64; i += 32) {
        y[i] = tile[i / 8 * 10 + i % 8];
      }
    """
    a = mx.random.normal((8, 12), key=mx.random.key(0)).astype(left)
    b = mx.random.normal((8, 8), key=mx.random.key(1)).astype(right)
    runtime = Runtime()
    template = [("A", left), ("B", right)]
    y = run(source, {"left": a, "right": b}, [("y", (8, 8), mx.float32)], template=template, runtime=runtime)
    np.testing.assert_allclose(y, 1 + as_numpy(a)[:, 2:10] @ as_numpy(b).T, atol=1e-5)
    assert runtime.last.matmuls == 1
    assert runtime.last.threadgroup_bytes == 320


def test_elements_of_a_matrix_are_where_a_gpu_has_them():
    source = """
      uint lane = thread_index_in_simdgroup, group = lane / 4;
      simdgroup_float8x8 m;
      simdgroup_load(m, x);
      uint row = (group & 4) + (lane / 2) % 4, column = (group & 2) * 2 + (lane % 2) * 2;
      y[2 * lane] = m.thread_elements()[0] - x[8 * row + column];
      y[2 * lane + 1] = m.thread_elements()[1] - x[8 * row + column + 1];
    """
    y = run(source, {"x": mx.random.normal((8, 8))}, [("y", (64,), mx.float32)])
    np.testing.assert_array_equal(y, 0)


def test_mathematics():
    expressions = {
        "fast::exp2(v)": np.exp2,
        "precise::exp(v)": np.exp,
        "metal::log(abs(v))": lambda x: np.log(abs(x)),
        "precise::log(abs(v))": lambda x: np.log(abs(x)),
        "log2(abs(v))": lambda x: np.log2(abs(x)),
        "precise::tanh(v)": np.tanh,
        "rsqrt(v * v)": lambda x: 1 / abs(x),
        "max(v, NAN)": lambda x: x,
        "min(v, INFINITY)": lambda x: x,
        "clamp(v, -0.5f, 0.5f)": lambda x: np.clip(x, -0.5, 0.5),
        "isnan(v - INFINITY + INFINITY) ? 1.0 : 0.0": np.ones_like,
        "as_type<float>(as_type<int>(v) ^ INT_MIN)": lambda x: -x,
        "fma(v, v, -1.0f)": lambda x: x * x - 1,
        "float(1.0h / half(3))": lambda x: np.full_like(x, np.float16(1) / np.float16(3)),
        "floor(v) + ceil(v)": lambda x: np.floor(x) + np.ceil(x),
    }
    lines = [f"y[{32 * i} + t] = {expression};" for i, expression in enumerate(expressions)]
    x = mx.random.normal((32,), key=mx.random.key(3))
    runtime = Runtime()
    source = "\n".join(["uint t = thread_position_in_grid.x; float v = x[t];", *lines])
    y = run(source, {"x": x}, [("y", (len(expressions), 32), mx.float32)], runtime=runtime)
    for row, (expression, reference) in zip(np.array(y), expressions.items()):
        np.testing.assert_allclose(row, reference(np.array(x)), rtol=2e-6, atol=1e-6, err_msg=expression)
    counted = runtime.last
    assert (counted.exp2, counted.exp, counted.log, counted.tanh) == (32, 32, 96, 32)


def test_counters_add_up_until_reset():
    runtime = Runtime()
    source = """
      threadgroup half s[64];
      uint t = thread_index_in_threadgroup;
      s[t] = x[thread_position_in_grid.x];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      y[thread_position_in_grid.x] = s[t ^ 1];
    """
    for _ in range(2):
        outputs = [("y", (128,), mx.float16)]
        run(source, {"x": mx.zeros((128,), mx.float16)}, outputs, (128, 1, 1), (64, 1, 1), runtime)
    assert runtime.counters.barriers == 4
    assert runtime.counters.groups == 4
    assert runtime.counters.device_read["x"] == runtime.counters.device_written["y"] == 512
    assert runtime.counters.threadgroup_read == runtime.counters.threadgroup_written == 512
    assert runtime.counters.threadgroup_bytes == 128
    assert runtime.last.barriers == 2
    runtime.reset()
    assert str(runtime.counters) == ""


def test_without_checks_bounds_still_hold():
    racy = next(p for p in PLANTED if p.name == "no barrier")
    Runtime(checks=False)(racy.call(bug=True))
    far = next(p for p in PLANTED if p.name == "one too far")
    with pytest.raises(RuntimeFault, match="out_of_bounds"):
        Runtime(checks=False)(far.call(bug=True))


def _call_of_size(count):
    shape = (count >> 30, 1 << 30)
    x = mx.broadcast_to(mx.zeros((1,), mx.float16), shape)
    source = """
      long i = threadgroup_position_in_grid.x * 1048576l * 1024 + thread_index_in_threadgroup;
      y[i] = x[i] + half(1);
    """
    return KernelCall(
        name="large",
        input_names=["x"],
        output_names=["y"],
        source=source,
        header="",
        inputs=[x],
        template=[],
        grid=(32 * (count >> 30), 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[shape],
        output_dtypes=[mx.float16],
    )


@pytest.mark.parametrize("kind", ["array", "file"])
def test_buffers_larger_than_memory(kind, tmp_path):
    count = 5 << 30  # 10 GB
    file = tmp_path / "x"
    x = np.memmap(file, np.float16, "w+", shape=(count,)) if kind == "file" else np.zeros(count, np.float16)
    x[(4 << 30) + 5] = 6
    y = Runtime().run(_call_of_size(count), {"x": x}, groups=[(4, 0, 0), (1, 0, 0)])["y"]
    assert y[4, 5] == 7
    assert y[1, 0] == 1
    assert y[0, 0] == 0


def test_raw_buffers_keep_their_strides():
    x = np.arange(64, dtype=np.float32).reshape(8, 8)[::-1, ::2]
    call = KernelCall(
        name="strided",
        input_names=["x"],
        output_names=["y"],
        source="uint2 p = thread_position_in_grid.xy; y[p.y * 4 + p.x] = x[p.y * x_strides[0] + p.x * x_strides[1]];",
        header="",
        inputs=[mx.zeros((8, 4))],
        template=[],
        grid=(4, 8, 1),
        threadgroup=(4, 8, 1),
        output_shapes=[(8, 4)],
        output_dtypes=[mx.float32],
    )
    np.testing.assert_array_equal(Runtime().run(call, {"x": x})["y"], x)
    with pytest.raises(TypeError, match="'x'. must be float32, got float64"):
        Runtime().run(call, {"x": x.astype(np.float64)})


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_that_meet_again_after_a_branch_are_at_one_place(order):
    """The compiler may copy the code after a branch into both sides, or merge the calls of two functions."""
    header = "template <typename T> T row_max(T v) { v = max(v, simd_shuffle_xor(v, 1)); return simd_max(v); }"
    source = """
      uint t = thread_index_in_threadgroup;
      float v = x[t];
      if (t % 3 == 0 && v > 0) {
        v = v * v;
      } else if (t > 40) {
        v = 2 - v;
      }
      float sum = row_max(v);
      for (uint i = 0; i < 3; i++) {
        const int from = simd_shuffle(int(t), ushort(31 - t % 32));
        bool sees = v > 0.5f && from % 2 == int(i % 2);
        sees = sees & simd_any(t % 5 == i);
        sum += i % 2 == 0 ? row_max(sees ? v : -v) : row_max(sees ? -v : v);
        threadgroup_barrier(mem_flags::mem_none);
      }
      y[t] = sum;
    """
    x = mx.random.normal((64,), key=mx.random.key(5))
    run(source, {"x": x}, [("y", (64,), mx.float32)], (64, 1, 1), header=header, runtime=Runtime(order))


def test_wrong_order_is_refused():
    with pytest.raises(ValueError, match="order='sideways' must be one of"):
        Runtime("sideways")


def test_compile_errors_say_what_the_compiler_said():
    with pytest.raises(CompileError, match="undeclared identifier 'z'"):
        run("y[0] = z;", {}, [("y", (1,), mx.float32)], (1, 1, 1))


# MLX's own attention kernel, as it is in the wheel


def reference_attention(q, k, v, causal, scale):
    q, k, v = (as_numpy(x).astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if causal:
        q_len, k_len = scores.shape[2:]
        scores = np.where(np.arange(k_len) > np.arange(q_len)[:, None] + k_len - q_len, -np.inf, scores)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bhkd->bhqd", weights / total, v), (top + np.log(total))[..., 0]


def random_qkv(dtype, head_dim, q_len, k_len, heads=2, kv_heads=1):
    keys = mx.random.split(mx.random.key(head_dim + q_len), 3)
    shapes = [(1, heads, q_len, head_dim)] + 2 * [(1, kv_heads, k_len, head_dim)]
    return [mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys)]


TOLERANCE = {mx.float16: 2e-3, mx.bfloat16: 1.5e-2, mx.float32: 5e-6}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_attention_of_mlx(dtype, head_dim, causal):
    q, k, v = random_qkv(dtype, head_dim, 45, 77)
    save_lse = head_dim < 256  # at 256 pairs of simdgroups write the same lse, which is a race
    runtime = Runtime("shuffled")
    out, lse = steel_attention(runtime, q, k, v, causal=causal, scale=head_dim**-0.5, save_lse=save_lse)
    expected, expected_lse = reference_attention(q, k, v, causal, head_dim**-0.5)
    np.testing.assert_allclose(as_numpy(out), expected, atol=TOLERANCE[dtype])
    if save_lse:
        np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_attention_of_mlx_is_counted():
    q, k, v = random_qkv(mx.float16, 128, 64, 96)
    runtime = Runtime()
    steel_attention(runtime, q, k, v, causal=False, scale=0.1)
    counted = runtime.last
    groups = 2 * 2
    key_tiles = 96 // 16
    simdgroups = 4
    assert counted.groups == groups
    assert counted.threadgroup_bytes == 2 * (32 * (128 + 8) + 128 * (16 + 8))
    # a simdgroup has 8 rows: 16 x 2 products for the scores of 16 keys, and as many for the output
    assert counted.matmuls == groups * key_tiles * simdgroups * (16 * 2 + 2 * 16)
    # two elements for each of two matrices, and the factor of the row
    assert counted.exp2 == groups * key_tiles * 128 * (2 * 2 + 1)
    assert counted.barriers == groups * (2 + 4 * key_tiles)
    assert counted.shuffles == groups * key_tiles * simdgroups * (2 * 2 * 2)
    assert counted.device_read == {"q": 2 * 2 * 64 * 128, "k": 4 * 2 * 96 * 128, "v": 4 * 2 * 96 * 128}
    assert counted.device_written == {"out": 2 * 2 * 64 * 128}


def test_race_in_what_mlx_saves_is_seen():
    q, k, v = random_qkv(mx.float16, 256, 32, 32)
    with pytest.raises(RuntimeFault, match="race of lse"):
        steel_attention(Runtime(), q, k, v, causal=False, scale=0.1, save_lse=True)


@pytest.mark.parametrize("dtype, atol", [(mx.float16, 2e-3), (mx.bfloat16, 1.5e-2), (mx.float32, 4e-3)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_of_mlx_with_tensor_operations(dtype, atol, head_dim):
    q, k, v = random_qkv(dtype, head_dim, 70, 100)
    runtime = Runtime("backward")
    out, lse = steel_attention(runtime, q, k, v, causal=True, scale=head_dim**-0.5, save_lse=True, tensor_ops=True)
    expected, expected_lse = reference_attention(q, k, v, True, head_dim**-0.5)
    np.testing.assert_allclose(as_numpy(out), expected, atol=atol)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3 if dtype == mx.float32 else 2e-6)
    # of 2 heads, 2 tiles of 64 queries and 3 and 4 tiles of 32 keys, 16 x 32 x 16 at a time, twice
    assert runtime.last.tensor_ops == 2 * (3 + 4) * 2 * (64 * 32 * head_dim) // (16 * 32 * 16)
    assert runtime.last.matmuls == 0


def test_workers_count_what_one_counts():
    q, k, v = random_qkv(mx.float16, 64, 200, 300)
    alone, together = Runtime(workers=1), Runtime(workers=3)
    out, _ = steel_attention(alone, q, k, v, causal=True, scale=0.1)
    again, _ = steel_attention(together, q, k, v, causal=True, scale=0.1)
    assert mx.array_equal(out, again)
    assert alone.last == together.last


@pytest.mark.parametrize("line", ["y[0] = x[i];", "y[i] = y[(i + 96) % 1024];", "y[i] = x[i + (i > 900) * 200];"])
def test_workers_report_what_one_reports(line):
    source = f"uint i = thread_position_in_grid.x;\n{line}"
    reports = []
    for workers in (1, *4 * [4]):
        with pytest.raises(RuntimeFault) as caught:
            inputs = {"x": mx.zeros(1024)}
            outputs = [("y", (1024,), mx.float32)]
            run(source, inputs, outputs, (1024, 1, 1), (32, 1, 1), Runtime(workers=workers))
        reports.append(str(caught.value))
    assert reports == 5 * reports[:1]
