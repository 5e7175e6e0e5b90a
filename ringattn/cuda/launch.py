"""Where kernel calls are run: by MLX on an NVIDIA GPU, or by a function that a test has set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from ..errors import ArgumentTypeError


@dataclass(frozen=True)
class KernelCall:
    """The arguments of `mx.fast.cuda_kernel` and of the kernel that it returns.

    Attributes:
        name: The kernel's name; calls with the same source, header and names share it.
        input_names: The names of the buffers read, as they are in `source`.
        output_names: The names of the buffers written.
        source: The body of the kernel, in CUDA.
        header: The text before the kernel: switches, constants and functions.
        inputs: The arrays for `input_names`; strided ones are passed as they are.
        blocks: The numbers of thread blocks in x, y and z.
        threads: Threads of a block.
        output_shapes: The shapes for `output_names`.
        output_dtypes: Their dtypes.
        shared_memory: Bytes of dynamic shared memory for each block.
    """

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str
    inputs: list[mx.array]
    blocks: tuple[int, int, int]
    threads: int
    output_shapes: list[tuple[int, ...]]
    output_dtypes: list[mx.Dtype]
    shared_memory: int = 0


Executor = Callable[[KernelCall], list[mx.array]]


def run(call: KernelCall) -> list[mx.array]:
    """Run `call` by the executor that is set, and return its outputs."""
    return _executor(call)


def set_executor(fn: Executor | None) -> None:
    """Have `fn` run every kernel call of the CUDA backend.

    Args:
        fn: Takes a `KernelCall` and returns its outputs; ``None`` restores the default, which builds each kernel once
            with `mx.fast.cuda_kernel` and runs it on the NVIDIA GPU.

    Raises:
        ArgumentTypeError: If `fn` is neither callable nor ``None``.
    """
    global _executor
    if fn is not None and not callable(fn):
        raise ArgumentTypeError(f"fn: {type(fn).__name__}, expected a function of a KernelCall, or None")
    _executor = _nvidia_gpu if fn is None else fn


def available() -> bool:
    """Whether kernel calls can run here: on an NVIDIA GPU, or by an executor that was set."""
    return not default() or gpu()


def default() -> bool:
    """Whether kernel calls go to the NVIDIA GPU."""
    return _executor is _nvidia_gpu


def gpu() -> bool:
    """Whether MLX can use an NVIDIA GPU."""
    return bool(mx.cuda.is_available())


@cache
def _built(name: str, inputs: tuple, outputs: tuple, source: str, header: str, shared_memory: int) -> Any:
    return mx.fast.cuda_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=False,
        shared_memory=shared_memory,
    )


def _nvidia_gpu(call: KernelCall) -> list[mx.array]:
    kernel = _built(
        call.name, tuple(call.input_names), tuple(call.output_names), call.source, call.header, call.shared_memory
    )
    x, y, z = call.blocks
    return kernel(
        inputs=call.inputs,
        template=[],
        grid=(x * call.threads, y, z),
        threadgroup=(call.threads, 1, 1),
        output_shapes=call.output_shapes,
        output_dtypes=call.output_dtypes,
    )


_executor: Executor = _nvidia_gpu
