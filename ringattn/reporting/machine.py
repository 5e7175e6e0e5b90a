"""Description of this machine for reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata


def machine() -> str:
    """Versions and the device, in two lines."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ringattn", "mlx", "numpy", "mpi4py"))
    return f"{versions}\nPython {platform.python_version()}, {platform.platform()}, {device()}"


def device() -> str:
    """Device on which MLX computes."""
    import mlx.core as mx

    if not mx.metal.is_available():
        kind = mx.default_device().type.name
        return f"MLX on {os.cpu_count()} CPU cores" if kind == "cpu" else f"MLX on a {kind.upper()}"
    info = mx.device_info()
    return f"{info['device_name']}, {int(info['memory_size']) >> 30} GiB"


def version(name: str) -> str:
    """Installed version of a package, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
