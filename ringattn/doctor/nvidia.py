"""Software that MLX needs on an NVIDIA GPU: the driver, the CUDA wheel and NCCL."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
CUDA_MAJORS = (13, 12)


def description() -> str:
    """Describe the software, such as ``"driver 580.159.04, mlx-cuda-13 0.32.4, NCCL 2.28.9"``."""
    wheels = [f"{name} {found}" for name in _named("mlx-cuda-{}") if (found := _version(name))]
    nccl = next((found for name in _named("nvidia-nccl-cu{}") if (found := _version(name))), None)
    return ", ".join(
        [
            f"driver {driver() or 'unknown'}",
            *(wheels or ["no mlx-cuda wheel"]),
            f"NCCL {nccl}" if nccl else "no NCCL wheel",
        ]
    )


def driver(path: Path = DRIVER) -> str | None:
    """Version of the kernel's NVIDIA driver, or ``None`` if it is not loaded."""
    try:
        text = path.read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found.group(1) if found else None


def _named(pattern: str) -> list[str]:
    return [pattern.format(major) for major in CUDA_MAJORS]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
