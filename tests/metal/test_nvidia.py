"""Compilation of the Metal kernels, translated to CUDA. `tools.nvidia.check` runs them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

import ringattn as ra
from ringattn.metal import KernelCall, launch
from tools.nvidia.executor import header, translate

pytestmark = pytest.mark.cuda

NVCC = shutil.which("nvcc")
CUDA_TYPES = {
    mx.bool_: "bool",
    mx.int32: "int32_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
UTILS = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
BEFORE = '#include "mlx/backend/cuda/device/utils.cuh"\n#include <cooperative_groups.h>\n'


def program(call: KernelCall) -> str:
    """Build the program that MLX's `cuda_kernel` compiles. See build_kernel in its backend/cuda/custom_kernel.cpp."""
    source = translate(call.source)
    parameters = []
    for name, array in zip(call.input_names, call.inputs):
        parameters.append(f"const {CUDA_TYPES[array.dtype]}* {name}")
        for kind, suffix in (("Shape", "shape"), ("Strides", "strides"), ("int", "ndim")):
            if array.ndim > 0 and f"{name}_{suffix}" in source:
                parameters.append(f"const __grid_constant__ {kind} {name}_{suffix}")
    outputs = zip(call.output_names, call.output_dtypes)
    parameters += [f"{CUDA_TYPES[dtype]}* {name}" for name, dtype in outputs]
    constants = "".join(f"  {_constant(name, value)};\n" for name, value in call.template)
    return (
        f"{BEFORE}{header(call.header)}namespace mlx::core::cu {{\n__global__ void custom_kernel_{call.name}(\n"
        f"    {', '.join(parameters)}) {{\n{constants}{source}\n}}\n}}\n"
    )


def _constant(name: str, value: mx.Dtype | int | bool) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {CUDA_TYPES[value]}"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"constexpr {kind} {name} = {int(value)}"


def capture(monkeypatch: pytest.MonkeyPatch, attend: Callable[[], object]) -> list[KernelCall]:
    """Record the kernel calls that `attend` makes, with zeros for outputs."""
    calls: list[KernelCall] = []

    def zeros(call: KernelCall) -> list[mx.array]:
        calls.append(call)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(call.output_shapes, call.output_dtypes)]

    with monkeypatch.context() as patch:
        patch.setattr(launch.launcher, "executor", zeros)
        mx.eval(attend())
    return calls


def gradient(dtype: mx.Dtype, dim: int, **options):
    return mx.grad(lambda q: attention(dtype, dim, q=q, return_lse=True, **options)[1].sum())(
        mx.ones((1, 4, 40, dim), dtype)
    )


def attention(dtype: mx.Dtype, dim: int, q_len: int = 40, k_len: int = 40, v_dim: int | None = None, **options):
    q = options.pop("q", mx.ones((1, 4, q_len, dim), dtype))
    k, v = (mx.ones((1, 2, k_len, d), dtype) for d in (dim, dim if v_dim is None else v_dim))
    return ra.attention(q, k, v, backend="metal", **options)


IDS = mx.zeros((1, 40), mx.int32)
VARIANTS: dict[str, Callable[[], object]] = {
    "float16, 64, every switch": lambda: attention(
        mx.float16,
        64,
        mask=mx.ones((40, 40), mx.bool_),
        window=9,
        softcap=5.0,
        segments=(IDS, IDS),
        sinks=mx.zeros(4),
        return_lse=True,
    ),
    "bfloat16, 128, additive mask": lambda: attention(mx.bfloat16, 128, mask=mx.zeros((40, 40), mx.bfloat16)),
    "float32, 256, causal": lambda: attention(mx.float32, 256, mask="causal", return_lse=True),
    "bfloat16, 256, plain": lambda: attention(mx.bfloat16, 256),
    "gradient, float32, every switch": lambda: gradient(
        mx.float32, 64, mask=mx.zeros((40, 40)), window=9, softcap=5.0, segments=(IDS, IDS)
    ),
    "gradient, bfloat16": lambda: gradient(mx.bfloat16, 128),
    "float16, 80 and 32, keys split": lambda: attention(
        mx.float16, 80, 1, 2048, 32, sinks=mx.zeros(4), mask="causal", return_lse=True
    ),
}


@pytest.fixture(scope="module")
def include(tmp_path_factory) -> Path:
    """Folder with the parts of MLX's headers that the kernels use."""
    folder = tmp_path_factory.mktemp("include")
    utils = folder / "mlx/backend/cuda/device/utils.cuh"
    utils.parent.mkdir(parents=True)
    utils.write_text(UTILS)
    return folder


def compile_ptx(text: str, name: str, include: Path) -> subprocess.CompletedProcess:
    source = include / f"{name}.cu"
    source.write_text(text)
    command = [
        NVCC,
        "-ptx",
        "-std=c++17",
        "-arch=sm_90",
        "-diag-suppress",
        "177",
        f"-I{include}",
        "-o",
        str(source.with_suffix(".ptx")),
    ]  # 177: unused definitions
    return subprocess.run([*command, str(source)], capture_output=True, text=True)


@pytest.mark.skipif(NVCC is None, reason="no nvcc here: CUDA's compiler is what this test asks")
def test_every_kernel_compiles_as_cuda(monkeypatch, include):
    calls = [call for attend in VARIANTS.values() for call in capture(monkeypatch, attend)]
    with ThreadPoolExecutor(2) as pool:
        names = [f"kernel{i}" for i in range(len(calls))]
        results = list(pool.map(compile_ptx, map(program, calls), names, [include] * len(calls)))
    complaints = {call.name: r.stderr for call, r in zip(calls, results) if r.returncode or "warning" in r.stderr}
    assert not complaints, "\n".join(f"{name}:\n{text[:2000]}" for name, text in complaints.items())
