"""Launch of kernel calls: by MLX on an Apple GPU, or by an executor that a test or an emulator sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx

from ..errors import ArgumentTypeError
from .device import matrix_units


@dataclass(frozen=True)
class KernelCall:
    """Arguments of `mx.fast.metal_kernel` and of the function that it returns, and nothing else.

    Attributes:
        name: The kernel's name. Calls with the same source, header and names share it.
        input_names: The names of the buffers read, as they are in `source`.
        output_names: The names of the buffers written.
        source: The body of the kernel, in the Metal shading language.
        header: Types, constants and functions, placed before the kernel.
        inputs: The arrays for `input_names`.
        template: The template arguments ``(name, value)``: dtypes, ints or bools.
        grid: The number of threads in x, y and z.
        threadgroup: The number of threads of a threadgroup in x, y and z.
        output_shapes: The shapes for `output_names`.
        output_dtypes: The dtypes for `output_names`.
        init_value: The initial value of the outputs; ``None`` leaves them uninitialised.
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


Executor = Callable[[KernelCall], list[mx.array]]


def run(call: KernelCall) -> list[mx.array]:
    """Run `call` with the current executor and return its outputs."""
    return _executor(call)


def set_executor(fn: Executor | None, *, tensor_ops: bool = False) -> None:
    """Run every kernel call of the Metal backend with `fn`.

    Args:
        fn: Takes a `KernelCall` and returns its outputs; ``None`` restores the default, which builds each kernel once
            with `mx.fast.metal_kernel` and runs it on the Apple GPU.
        tensor_ops: Whether the device of `fn` has the matrix units of the M5.

    Raises:
        ArgumentTypeError: If `fn` is neither callable nor ``None``.
    """
    global _executor, _tensor_ops
    if fn is not None and not callable(fn):
        raise ArgumentTypeError(f"fn: {type(fn).__name__}, expected a function of a KernelCall, or None")
    _executor = _apple_gpu if fn is None else fn
    _tensor_ops = None if fn is None else bool(tensor_ops)


def available() -> bool:
    """Return whether kernel calls can run here: on an Apple GPU, or with an executor that was set."""
    return not default() or mx.metal.is_available()


def default() -> bool:
    """Return whether kernel calls run on the Apple GPU."""
    return _executor is _apple_gpu


def tensor_ops() -> bool:
    """Return whether kernels may use the M5's matrix units, from `set_executor` or from this GPU."""
    return matrix_units() if _tensor_ops is None else _tensor_ops


@cache
def _built(name: str, inputs: tuple, outputs: tuple, source: str, header: str, flags: tuple, options: tuple) -> Any:
    contiguous, atomic = flags
    return mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=contiguous,
        atomic_outputs=atomic,
        compile_options=dict(options),
    )


def _apple_gpu(call: KernelCall) -> list[mx.array]:
    kernel = _built(
        call.name,
        tuple(call.input_names),
        tuple(call.output_names),
        call.source,
        call.header,
        (call.ensure_row_contiguous, call.atomic_outputs),
        tuple(sorted(call.compile_options.items())),
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


_executor: Executor = _apple_gpu
_tensor_ops: bool | None = None
