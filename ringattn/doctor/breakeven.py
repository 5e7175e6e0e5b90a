"""Number of tokens per rank from which a hop's transfer hides behind its compute."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionModel:
    """Attention of a layer.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Head dimension of keys and values.
        bytes: Bytes of one element.
        causal: Whether the mask is causal. Half of the pairs are then visible (with a zigzag layout: at every hop).
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    bytes: int = 2
    causal: bool = True

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a key token in a pass-KV hop."""
        return self.kv_heads * 2 * self.head_dim * self.bytes

    @property
    def flops_per_pair(self) -> float:
        """Operations of the two matrix products per pair of a local query and a key of the block.

        Hidden pairs count as pairs without operations.
        """
        return 4.0 * self.heads * self.head_dim * (0.5 if self.causal else 1.0)


def break_even(flops: float, bandwidth: float, latency: float = 0.0, model: AttentionModel | None = None) -> int:
    """Number of tokens per rank from which a hop computes for at least as long as it transfers.

    With L tokens per rank a hop computes for ``flops_per_pair L^2 / flops`` seconds and transfers for ``latency +
    bytes_per_token L / bandwidth``. Both are equal at the result, which is rounded up.

    Args:
        flops: Floating-point operations per second of one rank's attention, above 0.
        bandwidth: Bytes per second of the slowest link, in one direction while all links are in use, above 0.
        latency: Seconds of a small message, at least 0.
        model: Default: 32/8 heads of 128, 2 bytes, causal.

    Returns:
        Number of tokens, at least 1.
    """
    model = model or AttentionModel()
    compute = model.flops_per_pair / flops
    transfer = model.bytes_per_token / bandwidth
    tokens = (transfer + math.sqrt(transfer**2 + 4 * compute * latency)) / (2 * compute)
    return max(1, math.ceil(tokens))
