"""Inverse of a unit lower triangular matrix."""

from __future__ import annotations

import mlx.core as mx

from .decays import triangle


def unit_inverse(lower: mx.array) -> mx.array:
    """Invert ``I + lower`` for strictly lower triangular matrices ``[..., C, C]``; C is a power of two.

    Blocks are substituted: the inverse of ``[[A, 0], [B, D]]`` is ``[[A^-1, 0], [-D^-1 B A^-1, D^-1]]``. The product
    ``(I - N)(I + N^2)(I + N^4)...`` is also exact, but the powers of N can be huge where the inverse is not.
    """
    if lower.shape[-1] == 1:
        return mx.ones_like(lower)
    middle = lower.shape[-1] // 2
    diagonal = mx.stack([lower[..., :middle, :middle], lower[..., middle:, middle:]])
    first, last = unit_inverse(diagonal)
    return triangle(first, -(last @ lower[..., middle:, :middle]) @ first, last)
