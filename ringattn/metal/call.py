"""One launch of a Metal kernel, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx


@dataclass(frozen=True)
class KernelCall:
    """What `mx.fast.metal_kernel` and the call of what it returns take, and nothing else.

    Attributes:
        name: The kernel's name; calls with the same source, header and names share it.
        input_names: The names of the buffers read, as they are in `source`.
        output_names: The names of the buffers written.
        source: The body of the kernel, in the Metal shading language.
        header: What stands before the kernel: types, constants and functions.
        inputs: The arrays for `input_names`.
        template: The template arguments ``(name, value)``: dtypes, ints or bools.
        grid: How many threads run, in x, y and z.
        threadgroup: How many of them make one threadgroup.
        output_shapes: The shapes for `output_names`.
        output_dtypes: Their dtypes.
        init_value: What outputs hold before the kernel runs; ``None`` leaves them as they come.
        ensure_row_contiguous: Whether strided inputs are copied first.
        atomic_outputs: Whether outputs are declared atomic.
        compile_options: Options of the Metal compiler, such as ``{"math_mode": "safe"}``.
    """

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str
    inputs: list[mx.array]
    template: list[tuple[str, mx.Dtype | int | bool]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    init_value: float | None = None
    ensure_row_contiguous: bool = False
    atomic_outputs: bool = False
    compile_options: dict[str, str] = field(default_factory=dict)
