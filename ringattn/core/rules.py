"""What decides which keys count and how scores are made."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .masks import Band


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
