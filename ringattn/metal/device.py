"""What the GPU can do, as far as planning needs it: estimates on the careful side."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

SECONDS = 0.15  # of one dispatch: macOS ends a command buffer after about 5
CORE_FLOPS = 0.2e12  # a second, sustained by the slowest core of an Apple silicon GPU (M1: 2.6e12 at its peak with 8)
TENSOR_MACOS = (26, 2)  # and a GPU of generation 17, or 18 for a phone's: as MLX asks
CORES = {"p": 4, "g": 8, "s": 16, "c": 32, "d": 48}  # the least by the architecture's last letter: phone ... Ultra


@dataclass(frozen=True)
class Device:
    """Estimates for one GPU.

    Attributes:
        cores: GPU cores.
        budget: Floating-point operations of one dispatch.
    """

    cores: int
    budget: int

    @property
    def threadgroups(self) -> int:
        """How many threadgroups fill the GPU."""
        return 8 * self.cores


@cache
def device(architecture: str | None = None) -> Device:
    """The device of this architecture, such as ``"applegpu_g13s"``; by default of this machine; else a small one."""
    name = architecture if architecture is not None else str(mx.device_info().get("architecture", ""))
    cores = CORES.get(name[-1:], CORES["g"]) if name.startswith("applegpu") else CORES["g"]
    return Device(cores, int(cores * CORE_FLOPS * SECONDS))


@cache
def matrix_units(architecture: str | None = None, macos: str | None = None) -> bool:
    """Whether the GPU has the M5's matrix units, and the system the tensor operations of Metal 4 that reach them.

    Args:
        architecture: Such as ``"applegpu_g17s"``; by default that of this machine.
        macos: The system's version, such as ``"26.2"``; by default that of this machine.
    """
    name = architecture if architecture is not None else str(mx.device_info().get("architecture", ""))
    gpu = re.fullmatch(r"applegpu_g(\d+)(\w)", name)
    version = re.match(r"(\d+)\.(\d+)", macos if macos is not None else platform.mac_ver()[0])
    if gpu is None or version is None:
        return False
    return int(gpu[1]) >= (18 if gpu[2] == "p" else 17) and tuple(map(int, version.groups())) >= TENSOR_MACOS
