"""Properties of the GPU that planning needs. The estimates are conservative."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

SECONDS = 0.15  # for one dispatch: macOS ends a command buffer after about 5 s
CORE_FLOPS = 0.2e12  # per second, sustained by the slowest core of an Apple GPU (M1: 2.6e12 at its peak with 8 cores)
TENSOR_MACOS = (26, 2)  # MLX requires this too, and a GPU of generation 17, or 18 for a phone
CORES = {
    "p": 4,
    "g": 8,
    "s": 16,
    "c": 32,
    "d": 48,
}  # the fewest, by the last letter of the architecture: phone to Ultra


@dataclass(frozen=True)
class Device:
    """Estimates for one GPU.

    Attributes:
        cores: GPU cores.
        budget: Floating-point operations allowed in one dispatch.
    """

    cores: int
    budget: int

    @property
    def threadgroups(self) -> int:
        """Number of threadgroups that fill the GPU."""
        return 8 * self.cores


@cache
def device(architecture: str | None = None) -> Device:
    """Return the device of an architecture such as ``"applegpu_g13s"``, by default that of this machine.

    An unknown architecture gives a small device.
    """
    name = architecture if architecture is not None else str(mx.device_info().get("architecture", ""))
    cores = CORES.get(name[-1:], CORES["g"]) if name.startswith("applegpu") else CORES["g"]
    return Device(cores, int(cores * CORE_FLOPS * SECONDS))


@cache
def matrix_units(architecture: str | None = None, macos: str | None = None) -> bool:
    """Return whether the GPU has the M5's matrix units and macOS the tensor operations of Metal 4 that use them.

    Args:
        architecture: The GPU, such as ``"applegpu_g17s"``. Default: that of this machine.
        macos: The version of macOS, such as ``"26.2"``. Default: that of this machine.
    """
    name = architecture if architecture is not None else str(mx.device_info().get("architecture", ""))
    gpu = re.fullmatch(r"applegpu_g(\d+)(\w)", name)
    version = re.match(r"(\d+)\.(\d+)", macos if macos is not None else platform.mac_ver()[0])
    if gpu is None or version is None:
        return False
    return int(gpu[1]) >= (18 if gpu[2] == "p" else 17) and tuple(map(int, version.groups())) >= TENSOR_MACOS
