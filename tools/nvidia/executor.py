"""Metal kernels as CUDA kernels: their text, rewritten by rule, and an executor that has MLX run them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ringattn.metal import KernelCall

WORDS = Path(__file__).parent / "words.cuh"
MOST_GROUPS = 65_535  # of a CUDA grid in y and in z
REWRITES = (  # in this order
    (r"//[^\n]*|/\*.*?\*/", " "),
    # Threadgroup arrays are declared with nothing but a type, a name and a size: pointers have a star.
    (r"\bthreadgroup\s+((?:alignas\s*\([^)]*\)\s*)?[\w:]+\s+\w+\s*(?:\[|;))", r"__shared__ \1"),
    (r"\b(?:device|threadgroup|constant|thread)\s+(?=[\w:])", ""),
    # constexpr variables can be used on the GPU as they are; functions say that they are for it.
    (r"\binline\s+__attribute__\s*\(\(\s*__always_inline__\s*\)\)", "__device__ __forceinline__"),
    (r'_Pragma\s*\(\s*"clang loop unroll\(full\)"\s*\)', '_Pragma("unroll")'),
)


def translate(text: str) -> str:
    """CUDA for MLX's `cuda_kernel` from Metal for its `metal_kernel`, given the words of `words.cuh` before it."""
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.S)
    return text


def header(text: str) -> str:
    """What stands before a kernel: Metal's words, and what stood there in Metal."""
    return WORDS.read_text() + translate(text)


@cache
def _built(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, before: str, flat: bool) -> Any:
    return mx.fast.cuda_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=translate(source),
        header=header(before),
        ensure_row_contiguous=flat,
    )


def groups(call: KernelCall) -> tuple[int, int, int]:
    """How many threadgroups `call` has in x, y and z."""
    x, y, z = (-(-threads // size) for threads, size in zip(call.grid, call.threadgroup))
    return x, y, z


def cuda_executor(call: KernelCall) -> list[mx.array]:
    """The outputs of `call`, from the NVIDIA GPU; for `ringattn.metal.set_executor`.

    Where the grid is not whole threadgroups the last ones are whole on CUDA, other than on Metal: kernels must let
    threads beyond the grid do nothing, as these do.

    Raises:
        ValueError: `call` asks for something that CUDA or this translation does not have.
    """
    if call.atomic_outputs:
        raise ValueError(f"{call.name}: {call.atomic_outputs=}, expected a kernel without atomics")
    if max(groups(call)[1:]) > MOST_GROUPS:
        raise ValueError(f"{call.name}: {groups(call)=}, expected at most {MOST_GROUPS} in y and z")
    kernel = _built(
        call.name,
        tuple(call.input_names),
        tuple(call.output_names),
        call.source,
        call.header,
        call.ensure_row_contiguous,
    )
    return kernel(
        inputs=call.inputs,
        template=call.template,
        grid=call.grid,
        threadgroup=call.threadgroup,
        output_shapes=call.output_shapes,
        output_dtypes=call.output_dtypes,
        init_value=call.init_value,
    )
