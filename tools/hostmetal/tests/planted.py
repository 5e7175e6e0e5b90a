"""Small kernels with planted bugs, which the host runtime must report.

The tests prove that the runtime reports each bug, and reports nothing for the same kernel without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ringattn.metal.launch import KernelCall

THREADS = 64
GROUPS = 2
COUNT = THREADS * GROUPS
VALUES = np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)


@dataclass(frozen=True)
class Planted:
    """A kernel of 2 threadgroups of 64 threads that reads `x` and writes `y`, and a bug.

    Attributes:
        name: The bug.
        kind: The expected report: a kind of report, ``numbers``, ``lint`` or ``compile``.
        source: The kernel without the bug.
        old: The part of the source that the bug replaces.
        new: The replacement.
        expected: The output of the correct kernel, from `x`.
        header: The text before the kernel; `old` may be in it.
        size: The number of elements of `y`.
    """

    name: str
    kind: str
    source: str
    old: str
    new: str
    expected: Callable[[np.ndarray], np.ndarray]
    header: str = ""
    size: int = COUNT

    def call(self, bug: bool) -> KernelCall:
        source, header = self.source, self.header
        if bug:
            assert (source + header).count(self.old) == 1, self.name
            source, header = source.replace(self.old, self.new), header.replace(self.old, self.new)
        return KernelCall(
            name="planted",
            input_names=["x"],
            output_names=["y"],
            source=source,
            header=header,
            inputs=[mx.array(VALUES)],
            template=[("T", mx.float32)],
            grid=(COUNT, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(self.size,)],
            output_dtypes=[mx.float32],
        )


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _reversed(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, THREADS)[:, ::-1].ravel()


def _lanes_reversed(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 32)[:, ::-1].ravel()


def _lane_sums(x: np.ndarray) -> np.ndarray:
    return np.repeat(x.reshape(-1, 32).sum(1), 32)


def _group_sums(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, THREADS).sum(1)


_INDEX = "uint i = thread_position_in_grid.x; uint t = thread_index_in_threadgroup;\n"
_COPY = _INDEX + "y[i] = x[i];\n"
_REVERSE = (
    _INDEX
    + """threadgroup T s[64];
s[t] = x[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = s[63 - t];
"""
)
_REVERSE_LANES = (
    _INDEX
    + """threadgroup T s[64];
s[t] = x[i];
simdgroup_barrier(mem_flags::mem_threadgroup);
y[i] = s[t ^ 31];
"""
)
_LANE_SUM = (
    _INDEX
    + """T sum = x[i];
for (ushort step = 1; step < 32; step *= 2) {
  sum += simd_shuffle_xor(sum, step);
}
y[i] = sum;
"""
)
_SIMD_SUM = _INDEX + "T sum = x[i];\nsum = simd_sum(sum);\ny[i] = sum;\n"
_GROUP_SUM = (
    _INDEX
    + """T sum = 0;
if (t == 0) {
  for (uint j = 0; j < 64; j++) {
    sum += x[i + j];
  }
  y[threadgroup_position_in_grid.x] = sum;
}
"""
)
_MASKED = (
    _INDEX
    + """T sum = 0;
for (uint j = 0; j < 64; j++) {
  sum += j <= t ? x[i - t + j] : T(0);
}
y[i] = sum;
"""
)
_MATRIX_ONES = (
    _INDEX
    + """simdgroup_float8x8 a(1.0f), b = make_filled_simdgroup_matrix<float, 8, 8>(1.0f), c(0.0f);
simdgroup_multiply_accumulate(c, a, b, c);
y[i] = x[i] * c.thread_elements()[0];
"""
)
_TENSOR_ONES = (
    _INDEX
    + """mpp::tensor_ops::matmul2d<mpp::tensor_ops::matmul2d_descriptor(16, 32, 16), metal::execution_simdgroup> op;
auto a = op.get_left_input_cooperative_tensor<half, half, float>();
auto b = op.get_right_input_cooperative_tensor<half, half, float>();
auto c = op.get_destination_cooperative_tensor<decltype(a), decltype(b), float>();
for (ushort e = 0; e < 16; e++) {
  a[e % 8] = 0.0625h;
  b[e] = 1.0h;
  c[e] = 0;
}
op.run(a, b, c);
y[i] = x[i] * c[t % 16];
"""
)
_TENSOR_HEADER = "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n"
_HELPED = _INDEX + "y[i] = twice(x + i) - x[i];\n"
_HELPER = "template <typename T>\nT twice(const device T* p) {\n  T sum = p[0] + p[0];\n  return sum;\n}\n"
_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_SIMDGROUP_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
_TWO_SUMS = "if (t < 9) sum = simd_sum(sum);\nelse sum = simd_sum(sum);"
_TWO_SHUFFLES = "if (t % 2) sum += simd_shuffle_xor(sum, step);\nelse sum += simd_shuffle_xor(sum, step);"
_EITHER = f"if (t < 32) {{\n  {_BARRIER}\n}} else {{\n  {_BARRIER}\n}}"


def _running_sums(x: np.ndarray) -> np.ndarray:
    return np.cumsum(x.reshape(-1, THREADS), axis=1).ravel()


PLANTED = [
    Planted("no barrier", "race", _REVERSE, _BARRIER, "", _reversed),
    Planted("barrier of no memory", "race", _REVERSE, "mem_threadgroup", "mem_none", _reversed),
    Planted("barrier of other memory", "race", _REVERSE, "mem_threadgroup", "mem_device", _reversed),
    Planted("barrier of a simdgroup", "race", _REVERSE, "threadgroup_barrier", "simdgroup_barrier", _reversed),
    Planted("next use at once", "race", _REVERSE + "y[i] += 0 * s[t];\n", "y[i] +=", "s[t] +=", _reversed),
    Planted("race of lanes", "race", _REVERSE_LANES, _SIMDGROUP_BARRIER, "", _lanes_reversed),
    Planted("lanes after no memory", "race", _REVERSE_LANES, "mem_threadgroup", "mem_none", _lanes_reversed),
    Planted("read of another group", "race", _COPY, "x[i];", "i < 64 ? x[i] : y[i - 64];", _same),
    Planted("read before another group", "race", _COPY, "x[i];", "x[i] + (t == 0 ? 0 * y[0] : 0);", _same),
    Planted("one too far", "out_of_bounds", _COPY, "x[i]", "x[i + 1]", _same),
    Planted("one too early", "out_of_bounds", _COPY, "x[i]", "x[int(i) - 1]", _same),
    Planted("written too far", "out_of_bounds", _COPY, "y[i]", "y[i + 1]", _same),
    Planted("far away", "out_of_bounds", _COPY, "x[i]", "x[i + (1l << 32)]", _same),
    Planted("outside of an array", "out_of_bounds", _REVERSE, "s[63 - t]", "s[64 - t]", _reversed),
    Planted("write to an input", "write_to_input", _COPY, "x[i];", "x[i];\nconst_cast<device T*>(x)[i] = T(1);", _same),
    Planted("element left out", "unwritten_output", _COPY, "y[i]", "if (i != 70) y[i]", _same),
    Planted("both groups", "write_conflict", _GROUP_SUM, ".x] =", ".x / 2] =", _group_sums, size=2),
    Planted("array not filled", "uninitialised", _REVERSE, "s[t] = x[i]", "if (t != 9) s[t] = x[i]", _reversed),
    Planted("output read first", "uninitialised", _COPY, "y[i] =", "y[i] +=", _same),
    Planted("two barriers", "divergence", _REVERSE, _BARRIER, _EITHER, _reversed),
    Planted("barrier of some", "divergence", _REVERSE, _BARRIER, f"if (t < 40) {{ {_BARRIER} }}", _reversed),
    Planted("early return", "divergence", _REVERSE, _BARRIER, f"if (t > 47) return;\n{_BARRIER}", _reversed),
    Planted(
        "early return of all lanes", "divergence", _REVERSE, _BARRIER, f"if (t > 31) return; {_BARRIER}", _reversed
    ),
    Planted("simd sum of some", "divergence", _SIMD_SUM, "sum = simd", "if (t % 32 < 16) sum = simd", _lane_sums),
    Planted("two simd operations", "divergence", _SIMD_SUM, "sum = simd_sum(sum);", _TWO_SUMS, _lane_sums),
    Planted("two shuffles", "divergence", _LANE_SUM, "sum += simd_shuffle_xor(sum, step);", _TWO_SHUFFLES, _lane_sums),
    Planted("matrix product of some", "divergence", _MATRIX_ONES, "simdgroup_mul", "if (t % 2) simdgroup_mul", _same),
    Planted("tensor product of some", "divergence", _TENSOR_ONES, "op.run", "if (t % 2) op.run", _same, _TENSOR_HEADER),
    Planted("no such lane", "bad_shuffle", _LANE_SUM, "shuffle_xor(sum, step)", "shuffle(sum, t + step)", _lane_sums),
    Planted("too much memory", "threadgroup_overflow", _REVERSE.replace("s[64]", "s[8192]"), "92]", "93]", _reversed),
    Planted("shuffle of a wrong distance", "numbers", _LANE_SUM, "step *= 2", "step *= 3", _lane_sums),
    Planted("no mask", "numbers", _MASKED, "j <= t ? x[i - t + j] : T(0)", "x[i - t + j]", _running_sums),
    Planted("mask off by one", "numbers", _MASKED, "j <= t", "j < t", _running_sums),
    Planted("pointer without address space", "lint", _HELPED, "const device T* p", "const T* p", _same, _HELPER),
    Planted("double", "lint", _HELPED, "T sum = p", "double sum = p", _same, _HELPER),
    Planted("stray array", "lint", _HELPED, "T sum = p", "threadgroup T s[2];\nT sum = p", _same, _HELPER),
    Planted("other address space", "compile", _HELPED, "const device T* p", "const threadgroup T* p", _same, _HELPER),
    Planted("cast of address space", "compile", _HELPED, "p[0] + ", "((const constant T*)p)[0] + ", _same, _HELPER),
    Planted("float to bfloat", "compile", _HELPED, "T sum = p", "bfloat sum = p", _same, _HELPER),
]
