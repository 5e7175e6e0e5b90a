"""Translation of Metal kernels to CUDA by rules, and an executor that runs them with MLX."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import mlx.core as mx

from ringattn.kernels.gpu import launch
from ringattn.metal import KernelCall

WORDS = Path(__file__).parent / "words.cuh"
MOST_GROUPS = 65_535  # of a CUDA grid in y and in z
REWRITES = (  # in this order
    (r"//[^\n]*|/\*.*?\*/", " "),
    # Declarations of threadgroup arrays have only a type, a name and a size. Pointers have a star.
    (r"\bthreadgroup\s+((?:alignas\s*\([^)]*\)\s*)?[\w:]+\s+\w+\s*(?:\[|;))", r"__shared__ \1"),
    (r"\b(?:device|threadgroup|constant|thread)\s+(?=[\w:])", ""),
    # The GPU can use constexpr variables unchanged. Functions need __device__.
    (r"\binline\s+__attribute__\s*\(\(\s*__always_inline__\s*\)\)", "__device__ __forceinline__"),
    (r'_Pragma\s*\(\s*"clang loop unroll\(full\)"\s*\)', '_Pragma("unroll")'),
)


@cache
def translate(text: str) -> str:
    """Translate Metal for MLX's `metal_kernel` to CUDA for its `cuda_kernel`. `words.cuh` must stand before it."""
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.S)
    return text


@cache
def header(text: str) -> str:
    """Build the text before a kernel: Metal's names, and the kernel's own header."""
    return WORDS.read_text() + translate(text)


def groups(call: KernelCall) -> tuple[int, int, int]:
    """Count the threadgroups of `call` in x, y and z."""
    x, y, z = (-(-threads // size) for threads, size in zip(call.grid, call.threadgroup))
    return x, y, z


def cuda_executor(call: KernelCall) -> list[mx.array]:
    """Run `call` on the NVIDIA GPU; an executor for `ringattn.metal.set_executor`.

    On CUDA the last threadgroups are whole even where the grid is not, unlike on Metal. In kernels, threads beyond the
    grid must do nothing. The Metal kernels of ringattn satisfy this.

    Raises:
        ValueError: If `call` needs something that CUDA or this translation does not have.
    """
    if call.atomic_outputs:
        raise ValueError(f"{call.name}: {call.atomic_outputs=}, expected a kernel without atomics")
    if max(groups(call)[1:]) > MOST_GROUPS:
        raise ValueError(f"{call.name}: {groups(call)=}, expected at most {MOST_GROUPS} in y and z")
    return launch.run_on_gpu(translated(call), mx.fast.cuda_kernel)


def translated(call: KernelCall) -> launch.KernelCall:
    """The call of the CUDA kernel that the kernel of `call` is translated to."""
    same = {field.name: getattr(call, field.name) for field in fields(launch.KernelCall)}
    return launch.KernelCall(**(same | {"source": translate(call.source), "header": header(call.header)}))
