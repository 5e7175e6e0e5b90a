"""The device on which MLX computes by default."""

from __future__ import annotations


def uses_gpu() -> bool:
    """Return whether MLX's default device is a GPU."""
    import mlx.core as mx  # late: commands that show their help need no MLX

    return bool(mx.default_device().type == mx.DeviceType.gpu)
