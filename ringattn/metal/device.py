"""What the GPU can do, as far as planning needs it: estimates on the careful side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

SECONDS = 0.15  # of one dispatch: macOS ends a command buffer after about 5
CORE_FLOPS = 0.2e12  # a second, sustained by the slowest core of an Apple silicon GPU (M1: 2.6e12 at its peak with 8)
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
