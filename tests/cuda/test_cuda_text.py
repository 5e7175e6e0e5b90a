"""Tests of the CUDA kernels' text: what can be said of it without a GPU, and what nvcc says where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import ringattn as ra
from ringattn.cuda import KernelCall, dispatch, gradient_plans, launch
from ringattn.cuda.device import HOPPER
from ringattn.cuda.source import KERNELS, TYPES

NVCC = shutil.which("nvcc")
# What MLX's cuda_kernel puts before a kernel, as far as these need it
BEFORE = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#define inf cuda::std::numeric_limits<float>::infinity()
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 8>;
using Strides = cuda::std::array<int64_t, 8>;
}
"""
IDS = mx.zeros((1, 90), mx.int32)
EVERYTHING = {"window": 9, "softcap": 5.0, "segments": (IDS, IDS), "sinks": mx.zeros(4)}


def arrays(dtype: mx.Dtype, dim: int, v_dim: int | None = None, q_len: int = 90, k_len: int = 90) -> list[mx.array]:
    shapes = (4, q_len, dim), (2, k_len, dim), (2, k_len, v_dim or dim)
    return [mx.ones((1, *shape), dtype) for shape in shapes]


def attend(*shape, **options):
    return ra.attention(*arrays(*shape), backend="cuda", return_lse=True, **options)


def gradient(*shape, **options) -> list[mx.array]:
    def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return ra.attention(q, k, v, backend="cuda", **options).astype(mx.float32).sum()

    return list(mx.grad(run, argnums=(0, 1, 2))(*arrays(*shape)))


VARIANTS: dict[str, Callable[[], object]] = {
    "bfloat16, 128, causal": lambda: attend(mx.bfloat16, 128, mask="causal"),
    "float16, 64, everything": lambda: attend(mx.float16, 64, mask=mx.ones((90, 90), mx.bool_), **EVERYTHING),
    "bfloat16, 256, additive mask": lambda: attend(mx.bfloat16, 256, mask=mx.zeros((90, 90), mx.bfloat16)),
    "float32, 128, causal": lambda: attend(mx.float32, 128, mask="causal"),
    "float32, 256, everything": lambda: attend(mx.float32, 256, mask=mx.zeros((90, 90)), **EVERYTHING),
    "gradient, bfloat16, 128, causal": lambda: gradient(mx.bfloat16, 128, mask="causal"),
    "gradient, float16, 80 and 33, everything": lambda: gradient(
        mx.float16, 80, 33, mask=mx.ones((90, 90), mx.bool_), **EVERYTHING
    ),
    "gradient, bfloat16, 256, additive mask": lambda: gradient(mx.bfloat16, 256, mask=mx.zeros((90, 90), mx.bfloat16)),
    "gradient, float32, 128, causal": lambda: gradient(mx.float32, 128, mask="causal"),
    "gradient by wgmma, bfloat16, 128, causal": lambda: gradient(mx.bfloat16, 128, mask="causal"),
    "gradient by wgmma, float16, 80 and 33, everything": lambda: gradient(
        mx.float16, 80, 33, mask=mx.ones((90, 90), mx.bool_), **EVERYTHING
    ),
    "gradient by wgmma, bfloat16, 64, additive mask": lambda: gradient(mx.bfloat16, 64, mask=mx.zeros((90, 90))),
    "float16, 80 and 32, keys split": lambda: attend(mx.float16, 80, 32, 1, 2048, sinks=mx.zeros(4)),
}


def calls_of(monkeypatch, name: str) -> list[KernelCall]:
    """The kernel calls of a variant; their outputs are zeros."""
    calls: list[KernelCall] = []

    def zeros(call: KernelCall) -> list[mx.array]:
        calls.append(call)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(call.output_shapes, call.output_dtypes)]

    with monkeypatch.context() as patch:
        patch.setattr(launch.launcher, "executor", zeros)
        patch.setattr(gradient_plans, "capability", lambda: HOPPER if "wgmma" in name else (8, 0))
        mx.eval(VARIANTS[name]())
    return calls


def program(call: KernelCall) -> str:
    """What MLX's `cuda_kernel` has compiled for `call`."""
    types = {**TYPES, mx.bool_: "bool", mx.int32: "int32_t"}
    parameters = []
    for name, array in zip(call.input_names, call.inputs):
        parameters.append(f"const {types[array.dtype]}* {name}")
        for kind, suffix in (("Shape", "shape"), ("Strides", "strides")):
            if f"{name}_{suffix}" in call.source:
                parameters.append(f"const __grid_constant__ {kind} {name}_{suffix}")
    parameters += [f"{types[dtype]}* {name}" for name, dtype in zip(call.output_names, call.output_dtypes)]
    head = f"namespace mlx::core::cu {{\n__global__ void {call.name}({', '.join(parameters)}) {{\n"
    return f"{BEFORE}{call.header}{head}{call.source}\n}}\n}}\n"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_switch_is_defined_and_braces_match(monkeypatch, name: str) -> None:
    for call in calls_of(monkeypatch, name):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", call.header + call.source)
        defined = set(re.findall(r"#define (RA_\w+)", text))
        assert set(re.findall(r"\bRA_\w+\b(?!##)", text)) <= defined
        for pair in ("{}", "()", "[]"):
            assert text.count(pair[0]) == text.count(pair[1])
        assert all(re.search(rf"\b{name}\b", call.source) for name in call.output_names)


def test_every_file_is_used_and_in_the_package() -> None:
    assert {path.suffix for path in KERNELS.iterdir()} == {".cu", ".cuh"}
    assert "cuda/kernels/*" in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_no_kernel_has_atomics() -> None:
    assert not [
        path.name for path in KERNELS.iterdir() if re.search(r"\batomic[A-Z]|(?<!cta\.)\bred\.", path.read_text())
    ]


@pytest.mark.cuda
@pytest.mark.skipif(NVCC is None, reason="no nvcc here: CUDA's compiler is what this test asks")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kernel_compiles(monkeypatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(dispatch, "LEAST_KEYS", 512)
    for i, call in enumerate(calls_of(monkeypatch, name)):
        source = tmp_path / f"{i}.cu"
        source.write_text(program(call))
        target = "90a" if "wgmma" in call.header else "80"
        target = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [NVCC, "-cubin", "-std=c++17", target, "-diag-suppress", "177", "-o", f"{source}.cubin"]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[:2000]
