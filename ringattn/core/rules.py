"""ScoreRules of a kernel call: which keys a query sees, and how scores are computed."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .masks import Band


@dataclass(frozen=True)
class ScoreRules:
    """ScoreRules of one kernel call: which keys a query sees, and how scores are computed.

    Attributes:
        scale: The factor of q . k.
        band: The positions that each query sees.
        softcap: ``c`` of ``c * tanh(score / c)``, or ``None``.
        mask: Boolean or additive array ``[B or 1, Hq or 1, Lq or 1, columns or 1]``, or ``None``.
        columns: The column of each key in `mask`, int ``[Lk]``; ``None`` where key j is column j.
        segments: The ids of queries ``[B, Lq]`` and of keys ``[B, Lk]``, or ``None``.
    """

    scale: float
    band: Band
    softcap: float | None = None
    mask: mx.array | None = None
    columns: np.ndarray | None = None
    segments: tuple[mx.array, mx.array] | None = None
