"""The kernel backends by name."""

from __future__ import annotations

import mlx.core as mx

from .cpu.backend import HostKernel
from .errors import ArgumentError
from .kernels.interface import Kernel
from .kernels.reference import ReferenceKernel
from .metal import launch
from .metal.backend import MetalKernel

_KERNELS: dict[str, type[Kernel]] = {"host": HostKernel, "metal": MetalKernel, "reference": ReferenceKernel}
NAMES = tuple(_KERNELS)


def select(name: str | None) -> Kernel:
    """Return the kernel called `name`. ``None`` chooses the best one for the default device.

    The best one is the fused kernel on a CPU and on an Apple GPU, and plain mx operations on another GPU.
    """
    if name is None:
        name = _best()
    if name not in NAMES:
        raise ArgumentError(f"backend: {name!r}, expected one of {', '.join(map(repr, NAMES))}, or None")
    if name == "metal" and not launch.available():
        raise ArgumentError(
            "backend: 'metal' needs an Apple GPU, and MLX finds none here; expected 'host' or 'reference'"
        )
    return _KERNELS[name]()


def available() -> list[str]:
    """List the names of the kernels that run on this machine."""
    return [name for name in NAMES if name != "metal" or launch.available()]


def _best() -> str:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "host"
    return "metal" if mx.metal.is_available() else "reference"
