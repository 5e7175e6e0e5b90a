"""The partition of new tokens: which rank computes which, and which keeps their keys. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

from ...core.intervals import intersection
from ...layout import Layout

LEAST = 16  # tokens a rank: sharing the work of fewer takes longer than doing all of it on every rank
LEAST_HEAD = 1 << 24  # bytes of an output layer that ranks divide: fewer are read in the time of an exchange
RUN = 256  # tokens in a row that one rank keeps during decoding, so that layouts stay short


@dataclass(frozen=True)
class Cost:
    """The cost of one token in a layer, in any unit: its linear part, and attention to one earlier token."""

    linear: float
    attention: float


@dataclass(frozen=True)
class Step:
    """New tokens that pass through the layers in one call of the model.

    Attributes:
        new: The rank that keeps the keys and values of each token.
        shared: Whether each rank computes only the tokens that it keeps; otherwise every rank computes all.
    """

    new: Layout
    shared: bool


def next_step(held: Layout, tokens: int, weights: Sequence[float], cost: Cost) -> Step:
    """The step for `tokens` new ones after those `held`; `weights` are the ranks' speeds and memories.

    Many tokens are cut into one contiguous chunk a rank, so that each chunk takes the same time. Few tokens are
    computed by every rank, and one rank keeps them.
    """
    if tokens >= LEAST * held.size:
        return Step(round_layout(held.stop, tokens, tuple(weights), cost), True)
    keeper = emptiest(held, weights)
    spans = tuple(((held.stop, held.stop + tokens),) if rank == keeper else () for rank in range(held.size))
    return Step(Layout(spans, held.stop), False)


@lru_cache(maxsize=16)
def round_layout(start: int, tokens: int, weights: tuple[float, ...], cost: Cost) -> Layout:
    """One chunk a rank, at least one token long, whose work under a causal mask is in proportion to the weights.

    The first x of the tokens cost ``F(x) = (linear + attention * start) x + attention x^2 / 2``. The share of a rank
    ends where F reaches the rank's part of the whole.
    """
    a = cost.linear + cost.attention * start
    b = cost.attention
    total = sum(weights)
    whole = a * tokens + b * tokens**2 / 2
    done = 0.0
    ends: list[int] = []
    for rank, weight in enumerate(weights[:-1]):
        done += weight / total
        x = 2 * done * whole / (a + sqrt(a * a + 2 * b * done * whole))
        least = ends[-1] + 1 if ends else 1
        ends.append(min(max(round(x), least), tokens - (len(weights) - 1 - rank)))
    ends.append(tokens)
    starts = [0, *ends]
    return Layout(tuple(((start + i, start + j),) for i, j in zip(starts, ends)), start)


def emptiest(held: Layout, weights: Sequence[float]) -> int:
    """The rank that keeps the next token: the rank of the last one, until others have room for one run more."""
    fill = [held.local_length(rank) / max(weight, 1e-9) for rank, weight in enumerate(weights)]
    least = min(range(held.size), key=lambda rank: (fill[rank], rank))
    last = max(range(held.size), key=lambda rank: held.spans[rank][-1][1] if held.spans[rank] else -1)
    ahead = (fill[last] - fill[least]) * weights[last]
    return last if held.length and ahead < RUN and held.spans[last][-1][1] % RUN else least


@lru_cache(maxsize=32)
def extended(held: Layout, new: Layout) -> Layout:
    """`held` followed by `new`: one object for all layers."""
    return held.extend(new)


@lru_cache(maxsize=32)
def within(held: Layout, start: int, stop: int) -> Layout:
    """The part of `held` with the positions from `start` to `stop`."""
    return Layout(tuple(intersection(spans, ((start, stop),)) for spans in held.spans), start)
