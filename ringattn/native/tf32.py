"""Full float32 products in MLX. By default MLX rounds their inputs to TF32 on an M5 and on NVIDIA GPUs.

TF32 keeps 10 of the 23 bits of float32: an error of 8e-4 instead of 3e-7. The blockwise gradient and the "reference"
backend use MLX's products. MLX reads `VARIABLE` once, at its first float32 product on such a device (`enable_tf32` in
mlx/utils.h). Setting it after ``import mlx`` is in time unless the program has multiplied before.
"""

from __future__ import annotations

import os
import sys
import warnings

VARIABLE = "MLX_ENABLE_TF32"
SIZE = 128  # rows and columns: enough for MLX's kernels of full tiles


def disable() -> bool:
    """Set `VARIABLE` to 0 unless the user has set it. Return whether that may be too late."""
    if VARIABLE in os.environ:
        return False
    os.environ[VARIABLE] = "0"
    return "mlx.core" in sys.modules


def in_force() -> bool:
    """Return whether MLX's default device multiplies in TF32, by one product that needs 12 bits."""
    import mlx.core as mx

    x = mx.full((SIZE, SIZE), 1 + 2.0**-12)
    return not mx.array_equal(_product(x, mx.eye(SIZE)), x)


def check() -> None:
    """Warn if MLX multiplies in TF32 despite `disable`."""
    if in_force():
        warnings.warn(
            f"MLX multiplies float32 in TF32, because it had multiplied before ringattn was imported: import ringattn "
            f"first, or set {VARIABLE}=0 (or {VARIABLE}=1 to keep TF32)",
            RuntimeWarning,
            stacklevel=3,
        )


def describe() -> str:
    """Describe the precision of MLX's float32 products, for reports."""
    value = os.environ.get(VARIABLE)
    setting = f"{VARIABLE} not set" if value is None else f"{VARIABLE}={value}"
    return f"{'TF32' if in_force() else 'full float32'} ({setting})"


def _product(x, y):
    return x @ y
