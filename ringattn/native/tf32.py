"""Full float32 products in MLX, which rounds their inputs to TF32 by default on an M5 and on NVIDIA GPUs.

TF32 keeps 10 of float32's 23 bits: an error of 8e-4 instead of 3e-7. The blockwise gradient and the "reference" backend
multiply through MLX. MLX reads `VARIABLE` once, at its first float32 product on such a device (`enable_tf32` in
mlx/utils.h), so setting it after ``import mlx`` is in time unless the program has multiplied before.
"""

from __future__ import annotations

import os
import sys
import warnings

VARIABLE = "MLX_ENABLE_TF32"
SIZE = 128  # rows and columns: enough for MLX's kernels of full tiles


def disable() -> bool:
    """Set `VARIABLE` to 0 unless the user has set it. Return whether that may be too late to count."""
    if VARIABLE in os.environ:
        return False
    os.environ[VARIABLE] = "0"
    return "mlx.core" in sys.modules


def in_force() -> bool:
    """Whether products on MLX's default device are TF32, found by one product that needs 12 bits."""
    import mlx.core as mx

    x = mx.full((SIZE, SIZE), 1 + 2.0**-12)
    return not mx.array_equal(_product(x, mx.eye(SIZE)), x)


def check() -> None:
    """Warn if products are TF32 all the same."""
    if in_force():
        warnings.warn(
            f"MLX multiplies float32 in TF32, because it had multiplied before ringattn was imported: import ringattn "
            f"first, or set {VARIABLE}=0 (or {VARIABLE}=1 to keep TF32)",
            RuntimeWarning,
            stacklevel=3,
        )


def describe() -> str:
    """The precision of MLX's float32 products, for reports."""
    value = os.environ.get(VARIABLE)
    setting = f"{VARIABLE} not set" if value is None else f"{VARIABLE}={value}"
    return f"{'TF32' if in_force() else 'full float32'} ({setting})"


def _product(x, y):
    return x @ y
