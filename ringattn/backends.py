"""The kernel backends by name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .core.device import uses_gpu
from .cpu.backend import HostKernel
from .cuda import launch as cuda_launch
from .cuda.backend import CudaKernel
from .errors import ArgumentError
from .kernels.interface import Kernel
from .kernels.reference import ReferenceKernel
from .metal import launch
from .metal.backend import MetalKernel

_KERNELS: dict[str, type[Kernel]] = {
    "host": HostKernel,
    "metal": MetalKernel,
    "cuda": CudaKernel,
    "reference": ReferenceKernel,
}
NAMES = tuple(_KERNELS)
_GPUS: dict[str, tuple[str, Any]] = {"metal": ("an Apple GPU", launch), "cuda": ("an NVIDIA GPU", cuda_launch)}


def select(name: str | None) -> Kernel:
    """Return the kernel called `name`. ``None`` chooses the best one for the default device.

    The best one is the fused kernel on a CPU, an Apple GPU and an NVIDIA GPU, and plain mx operations on another GPU.
    """
    if name is None:
        name = _best()
    if name not in NAMES:
        raise ArgumentError(f"backend: {name!r}, expected one of {', '.join(map(repr, NAMES))}, or None")
    if name in _GPUS and name not in available():
        raise ArgumentError(
            f"backend: {name!r} needs {_GPUS[name][0]}, and MLX finds none here; expected 'host' or 'reference'"
        )
    return _KERNELS[name]()


def available() -> list[str]:
    """List the names of the kernels that run on this machine."""
    return [name for name in NAMES if name not in _GPUS or _GPUS[name][1].available()]


def _best() -> str:
    if not uses_gpu():
        return "host"
    if mx.metal.is_available():
        return "metal"
    return "cuda" if cuda_launch.gpu() else "reference"
