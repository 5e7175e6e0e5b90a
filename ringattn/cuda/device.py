"""Properties of the NVIDIA GPU that decide how work is cut."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from ..native import cuda
from . import launch
from .tiling import MULTIPROCESSORS

HOPPER = (9, 0)  # the compute capability whose matrix units multiply by wgmma
LEAST_SHARED_BYTES = 101_376  # that a block can have on every GPU of compute capability 8.0 and later
# The CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHARED_BYTES = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448, (11, 0): 232_448}


@cache
def capability() -> tuple[int, int]:
    """The compute capability of this machine's GPU; ``(0, 0)`` without one."""
    if not launch.gpu():
        return 0, 0
    info = mx.device_info(mx.gpu)
    return int(info.get("compute_capability_major", 0)), int(info.get("compute_capability_minor", 0))


@cache
def multiprocessors() -> int:
    """How many multiprocessors this machine's GPU has; those of an H100 where that is not known."""
    return (cuda.multiprocessors() if launch.gpu() else None) or MULTIPROCESSORS


@cache
def shared_bytes() -> int:
    """Bytes of shared memory that a block can have on this machine's GPU."""
    return SHARED_BYTES.get(capability(), LEAST_SHARED_BYTES)
