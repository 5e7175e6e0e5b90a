"""Launch of Metal kernels: by MLX on an Apple GPU, or by an executor that a test or an emulator sets."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..kernels.gpu import launch
from ..kernels.gpu.self_test import SelfTest
from .device import matrix_units


@dataclass(frozen=True)
class KernelCall(launch.KernelCall):
    """Arguments of `mx.fast.metal_kernel` and of the function that it returns, and nothing else.

    The arguments that CUDA's function takes too are in `ringattn.kernels.gpu.launch.KernelCall`.

    Attributes:
        atomic_outputs: Whether outputs are declared atomic.
        compile_options: Options of the Metal compiler, such as ``{"math_mode": "safe"}``.
    """

    atomic_outputs: bool = False
    compile_options: dict[str, str] = field(default_factory=dict)

    def build_options(self) -> tuple[tuple[str, Hashable], ...]:
        options = tuple(sorted(self.compile_options.items()))
        return ("atomic_outputs", self.atomic_outputs), ("compile_options", options)


Executor = launch.Executor[KernelCall]


def set_executor(fn: Executor | None, *, tensor_ops: bool = False) -> None:
    """Run every kernel call of the Metal backend with `fn`.

    Args:
        fn: Takes a `KernelCall` and returns its outputs; ``None`` restores the default, which builds each kernel once
            with `mx.fast.metal_kernel` and runs it on the Apple GPU.
        tensor_ops: Whether the device of `fn` has the matrix units of the M5.

    Raises:
        ArgumentTypeError: If `fn` is neither callable nor ``None``.
    """
    global _tensor_ops
    launcher.set_executor(fn)
    _tensor_ops = None if fn is None else bool(tensor_ops)


def available() -> bool:
    """Return whether kernel calls can run here: on an Apple GPU, or with an executor that was set."""
    return not default() or mx.metal.is_available()


def tensor_ops() -> bool:
    """Return whether kernels may use the M5's matrix units, from `set_executor` or from this GPU."""
    return matrix_units() if _tensor_ops is None else _tensor_ops


def _metal_kernel(*, compile_options: tuple[tuple[str, str], ...], **others: Any) -> Any:
    return mx.fast.metal_kernel(compile_options=dict(compile_options), **others)


launcher: launch.Launcher[KernelCall] = launch.Launcher(lambda call: launch.run_on_gpu(call, _metal_kernel))
run = launcher.run
default = launcher.default
self_test = SelfTest("Metal")
_tensor_ops: bool | None = None
