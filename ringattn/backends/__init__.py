"""The local attention kernels, one module each, with one signature.

    forward(q, k, v, q_pos, k_pos, rules, state) -> state

q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]`` and v ``[B, Hkv, Lk, Dv]`` share one dtype; `q_pos` and `k_pos` are
ascending int32 positions; `state` is what earlier keys left, or ``None``, and is used up: the kernel may write into it.

    finished(q, k, v, q_pos, k_pos, rules, sinks, dtype, with_lse) -> (out, lse)

ends in `out` in `dtype` and, where it is wanted, the lse, else ``None``; `sinks` ``[Hq]`` or ``None``.

    rows(out, lse, dout, dlse) -> rows
    backward(q, k, v, q_pos, k_pos, rules, rows, sums) -> sums

are the gradient (see `ringattn.gradient`): `rows` is what it needs of each query row, from results and the gradients of
the loss by them; `backward` adds the gradients of this block of queries and keys to `sums`, which are used up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import mlx.core as mx
import numpy as np

from ..errors import ArgumentError
from ..mask import Band
from ..merge import State, finish
from ..metal import executor


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


def ending(forward: Callable[..., State]) -> Callable[..., tuple[mx.array, mx.array]]:
    """The `finished` of a kernel that has nothing better than to finish what its `forward` returns."""

    def finished(q, k, v, q_pos, k_pos, rules, sinks, dtype: mx.Dtype, with_lse: bool):
        return finish(forward(q, k, v, q_pos, k_pos, rules, None), sinks, dtype)

    return finished


NAMES = ("host", "metal", "reference")


def select(name: str | None) -> ModuleType:
    """The kernel module called `name`; ``None`` takes the best for the default device.

    That is the fused kernel on a CPU and on an Apple GPU, and plain mx operations on another GPU.
    """
    if name is None:
        name = _best()
    if name not in NAMES:
        raise ArgumentError(f"backend: {name!r}, expected one of {', '.join(map(repr, NAMES))}, or None")
    if name == "metal" and not executor.available():
        raise ArgumentError(
            "backend: 'metal' needs an Apple GPU, and MLX finds none here; expected 'host' or 'reference'"
        )
    return import_module(f".{name}", __name__)


def available() -> list[str]:
    """The names of the kernels that run on this machine."""
    return [name for name in NAMES if name != "metal" or executor.available()]


def _best() -> str:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "host"
    return "metal" if mx.metal.is_available() else "reference"
