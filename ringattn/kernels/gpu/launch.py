"""Kernel calls of the GPU backends, and their launch: by MLX on a GPU, or by an executor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import mlx.core as mx

from ...errors import ArgumentTypeError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class KernelCall:
    """Arguments that `mx.fast.metal_kernel` and `mx.fast.cuda_kernel` share, with those of the function they return.

    Attributes:
        name: The kernel's name. Calls with the same source, header and names share it.
        input_names: The names of the buffers read, as they are in `source`.
        output_names: The names of the buffers written.
        source: The body of the kernel.
        header: Types, constants and functions, placed before the kernel.
        inputs: The arrays for `input_names`.
        template: The template arguments ``(name, value)``: dtypes, ints or bools.
        grid: The number of threads in x, y and z.
        threadgroup: The number of threads of a threadgroup in x, y and z.
        output_shapes: The shapes for `output_names`.
        output_dtypes: The dtypes for `output_names`.
        init_value: The initial value of the outputs; ``None`` leaves them uninitialised.
        ensure_row_contiguous: Whether strided inputs are copied first.
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

    def with_inputs(self, arrays: Mapping[str, mx.array | None]) -> Self:
        """Replace the inputs that `arrays` names."""
        call = copy(self)
        inputs = [arrays.get(name, x) for name, x in zip(self.input_names, self.inputs)]
        object.__setattr__(call, "inputs", inputs)  # several times as fast as `replace`, in a call that lasts 50 us
        return call

    def build_options(self) -> tuple[tuple[str, Hashable], ...]:
        """List the further arguments of the function that builds the kernel."""
        return ()


Call = TypeVar("Call", bound=KernelCall)
Executor = Callable[[Call], list[mx.array]]


class Launcher(Generic[Call]):
    """Launch of the kernel calls of one backend.

    Attributes:
        gpu: The executor that runs calls on the GPU.
        executor: The current executor.
    """

    def __init__(self, gpu: Executor[Call]) -> None:
        self.gpu = gpu
        self.executor = gpu

    def run(self, call: Call) -> list[mx.array]:
        """Run `call` with the current executor and return its outputs."""
        return self.executor(call)

    def set_executor(self, fn: Executor[Call] | None) -> None:
        """Run every call with `fn`. ``None`` restores the GPU.

        Raises:
            ArgumentTypeError: If `fn` is neither callable nor ``None``.
        """
        if fn is not None and not callable(fn):
            raise ArgumentTypeError(f"fn: {type(fn).__name__}, expected a function of a KernelCall, or None")
        self.executor = self.gpu if fn is None else fn

    def default(self) -> bool:
        """Return whether calls run on the GPU."""
        return self.executor is self.gpu


def run_on_gpu(call: KernelCall, build: Callable[..., Any]) -> list[mx.array]:
    """Run `call` with the kernel that `build`, a function of `mx.fast`, makes. Each kernel is built once."""
    names = tuple(call.input_names), tuple(call.output_names)
    texts = call.source, call.header
    kernel = _built(build, call.name, *names, *texts, call.ensure_row_contiguous, call.build_options())
    return kernel(
        inputs=call.inputs,
        template=call.template,
        grid=call.grid,
        threadgroup=call.threadgroup,
        output_shapes=call.output_shapes,
        output_dtypes=call.output_dtypes,
        init_value=call.init_value,
    )


@cache
def _built(
    build: Callable[..., Any],
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    source: str,
    header: str,
    contiguous: bool,
    options: tuple[tuple[str, Hashable], ...],
) -> Any:
    return build(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=contiguous,
        **dict(options),
    )
