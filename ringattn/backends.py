"""The kernel backends by name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import mlx.core as mx

from .errors import ArgumentError
from .metal import launch

_MODULES = {"host": "cpu.forward", "metal": "metal.backend", "reference": "kernels.reference"}
NAMES = tuple(_MODULES)


def select(name: str | None) -> ModuleType:
    """The kernel module called `name`; ``None`` takes the best for the default device.

    That is the fused kernel on a CPU and on an Apple GPU, and plain mx operations on another GPU.
    """
    if name is None:
        name = _best()
    if name not in NAMES:
        raise ArgumentError(f"backend: {name!r}, expected one of {', '.join(map(repr, NAMES))}, or None")
    if name == "metal" and not launch.available():
        raise ArgumentError(
            "backend: 'metal' needs an Apple GPU, and MLX finds none here; expected 'host' or 'reference'"
        )
    return import_module(f".{_MODULES[name]}", __package__)


def available() -> list[str]:
    """The names of the kernels that run on this machine."""
    return [name for name in NAMES if name != "metal" or launch.available()]


def _best() -> str:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "host"
    return "metal" if mx.metal.is_available() else "reference"
