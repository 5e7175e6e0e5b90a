"""The local attention kernels, one module each, with one signature.

    forward(q, k, v, q_pos, k_pos, rules, state) -> state

q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]`` and v ``[B, Hkv, Lk, Dv]`` share one dtype; `q_pos` and `k_pos` are
ascending int32 positions; `state` is what earlier keys left, or ``None``, and is used up: the kernel may write into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError
from ..mask import Band


@dataclass(frozen=True)
class Rules:
    """Which keys count and how their scores are made, for one kernel call.

    Attributes:
        scale: What q . k is multiplied with.
        band: The positions each query sees.
        softcap: ``c`` of ``c * tanh(score / c)``, or ``None``.
        mask: Boolean or additive array ``[B or 1, Hq or 1, Lq or 1, columns or 1]``, or ``None``.
        columns: For each key its column in `mask`, int ``[Lk]``; ``None`` where key j is column j.
        segments: The ids ``[B, Lq]`` and ``[B, Lk]`` of queries and keys, or ``None``.
    """

    scale: float
    band: Band
    softcap: float | None = None
    mask: mx.array | None = None
    columns: np.ndarray | None = None
    segments: tuple[mx.array, mx.array] | None = None


NAMES = ("host", "reference")


def select(name: str | None) -> ModuleType:
    """The kernel module called `name`; ``None`` takes the fused CPU kernel, or plain mx operations on a GPU."""
    if name is None:
        name = "host" if mx.default_device().type == mx.DeviceType.cpu else "reference"
    if name not in NAMES:
        raise ArgumentError(f"backend: {name!r}, expected one of {', '.join(map(repr, NAMES))}, or None")
    if name == "host":
        from . import host

        return host
    from . import reference

    return reference
