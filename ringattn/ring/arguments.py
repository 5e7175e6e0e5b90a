"""Checks of the arguments that all ring calls share."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError, ArgumentTypeError
from ..layout import Layout
from ..transport.base import Ring


def check_ring(ring: Any) -> None:
    """Check for a ring. Without one no other check can be collective."""
    if not isinstance(ring, Ring):
        raise ArgumentTypeError(f"ring: {type(ring).__name__}, expected a ring from ringattn.init()")


def check_layout(name: str, layout: object, ring: Ring, tokens: dict[str, int]) -> Layout:
    """Check for a layout of the ring's size that gives this rank as many tokens as its arrays have."""
    if not isinstance(layout, Layout):
        raise ArgumentTypeError(f"{name}: {type(layout).__name__}, expected a Layout")
    if layout.size != ring.size:
        raise ArgumentError(f"{name}: for {layout.size} ranks, expected {ring.size}, the size of the ring")
    expected = layout.local_length(ring.rank)
    for array, n in tokens.items():
        if n != expected:
            raise ArgumentError(f"{array}: {n} tokens, expected {expected}, what {name} gives to rank {ring.rank}")
    return layout
