"""Launch of CUDA kernels: by MLX on an NVIDIA GPU, or by an executor that a test sets."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import mlx.core as mx

from ..kernels.gpu import launch
from ..kernels.gpu.self_test import SelfTest
from ..native.cuda import has_gpu


@dataclass(frozen=True)
class KernelCall(launch.KernelCall):
    """Arguments of `mx.fast.cuda_kernel` and of the function that it returns.

    Attributes:
        shared_memory: Bytes of dynamic shared memory for each block.
    """

    shared_memory: int = 0

    def build_options(self) -> tuple[tuple[str, Hashable], ...]:
        return (("shared_memory", self.shared_memory),)


Executor = launch.Executor[KernelCall]


def set_executor(fn: Executor | None) -> None:
    """Run every kernel call of the CUDA backend with `fn`.

    Args:
        fn: Takes a `KernelCall` and returns its outputs; ``None`` restores the default, which builds each kernel once
            with `mx.fast.cuda_kernel` and runs it on the NVIDIA GPU.

    Raises:
        ArgumentTypeError: If `fn` is neither callable nor ``None``.
    """
    launcher.set_executor(fn)


def available() -> bool:
    """Return whether kernel calls can run here: on an NVIDIA GPU, or with an executor that was set."""
    return not default() or gpu()


def gpu() -> bool:
    """Return whether MLX can use an NVIDIA GPU."""
    return has_gpu()


launcher: launch.Launcher[KernelCall] = launch.Launcher(lambda call: launch.run_on_gpu(call, mx.fast.cuda_kernel))
run = launcher.run
default = launcher.default
self_test = SelfTest("CUDA")
