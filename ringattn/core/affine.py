"""Affine maps of a recurrent layer's state: the effect of a span of tokens on the state before it.

One step of a linear recurrence is affine in the state, and so is a span of steps (arXiv 2502.07563). The map of a span
does not depend on the state before it, so each rank finds the maps of its own tokens and any rank can apply them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


class AffineMap(NamedTuple):
    """The map of a span of tokens: ``state @ transition + offset``, or with decays ``state * transition + offset``.

    Attributes:
        transition: For a delta rule a matrix ``[..., key dim, key dim]``; for decays an array that broadcasts to the
            state. ``None`` where the state before the span was known: then `offset` is the state after it.
        offset: The state after the span from a state of zeros: ``[..., value dim, key dim]``, float32.
    """

    transition: mx.array | None
    offset: mx.array


def apply(step: AffineMap, state: mx.array, matrix: bool) -> mx.array:
    """Return the state after the span of `step`; `matrix`: whether its transition is a matrix and no decay."""
    if step.transition is None:
        return step.offset
    return (state @ step.transition if matrix else state * step.transition) + step.offset


def states_of_spans(state: mx.array, maps: Sequence[AffineMap], matrix: bool) -> list[mx.array]:
    """Return the states before each of the spans of `maps`, which are in the order of the tokens, and after the last.

    Args:
        state: The state before the first span ``[..., value dim, key dim]``, float32.
        maps: The maps of all spans of a sequence.
        matrix: Whether the transitions are matrices.
    """
    states = [state]
    for step in maps:
        states.append(apply(step, states[-1], matrix))
    return states
